"""Which modules of a decoder stay unquantized, by full name (spec: quantization 7)."""

import re
from collections.abc import Collection, Iterable, Sequence

from omnispeech.errors import ConfigError

# linears that read the same vectors share their channel scales, and servers fuse them
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
NAMED = 3  # linears in a text before it says that there are more
LINEARS = (*FUSED[0], "self_attn.o_proj", *FUSED[1], "mlp.down_proj")


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def layer_linears(index: int) -> tuple[str, ...]:
    return tuple(layer_prefix(index) + name for name in LINEARS)


def kept_modules(
    layers: int, indices: Iterable[int], parts: Sequence[str], outside: Collection[str]
) -> tuple[str, ...]:
    """Full names of the linears that stay float, in the order of the model.

    indices: decoder layers, negative from the end.
    parts: full names, or parts of names; a number in them is matched as a whole.
    outside: names of tensors that are never quantized; a part may name one of them.
    Raises ConfigError for a layer that does not exist and for a part that fits nothing.
    """
    whole = {_layer(index, layers) for index in indices}
    names = [name for i in range(layers) for name in layer_linears(i)]
    patterns = [_pattern(part) for part in parts]
    for part, pattern in zip(parts, patterns, strict=True):
        if not any(pattern.search(name) for name in (*names, *outside)):
            raise ConfigError(
                f"modules_to_not_convert names {part!r}, which is part of no module; "
                f"a module is called, for example, {names[0]}"
            )
    kept = {name for i in whole for name in layer_linears(i)}
    kept |= {name for name in names if any(pattern.search(name) for pattern in patterns)}
    return tuple(name for name in names if name in kept)


def split_sets(layers: int, kept: Collection[str]) -> list[list[str]]:
    """Linears that read the same vectors, of which some are kept and some are not."""
    sets = [[layer_prefix(i) + name for name in names] for i in range(layers) for names in FUSED]
    return [names for names in sets if 0 < sum(name in kept for name in names) < len(names)]


def kept_text(kept: Sequence[str]) -> str:
    """For people: whole layers by their number, other linears by name, not all if they are many."""
    numbers = sorted({int(name.split(".")[2]) for name in kept})
    whole = [i for i in numbers if set(layer_linears(i)) <= set(kept)]
    single = [name for name in kept if int(name.split(".")[2]) not in whole]
    texts = [f"layer{'s' * (len(whole) > 1)} {', '.join(map(str, whole))}"] if whole else []
    if single:
        named = ", ".join(single[:NAMED]) + (" ..." if len(single) > NAMED else "")
        texts.append(f"{len(single)} linears: {named}" if len(single) > 1 else named)
    return " and ".join(texts) or "no linear of a layer"


def _layer(index: int, layers: int) -> int:
    if not -layers <= index < layers:
        raise ConfigError(
            f"keep_fp_layers names layer {index}; the model has layers 0 to {layers - 1}, "
            f"or -{layers} to -1 from the end"
        )
    return index % layers


def _pattern(part: str) -> re.Pattern[str]:
    """`model.layers.1` is layer 1 alone, not layers 10 to 19 (a plain substring would be both)."""
    if not part:
        raise ConfigError("modules_to_not_convert holds an empty name, which fits every module")
    before = r"(?<!\d)" if part[0].isdigit() else ""
    after = r"(?!\d)" if part[-1].isdigit() else ""
    return re.compile(before + re.escape(part) + after)

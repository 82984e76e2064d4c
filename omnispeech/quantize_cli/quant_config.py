"""`--quant_config`: the JSON of the guides, under the names of the flags."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omnispeech.errors import ConfigError
from omnispeech.quantization.methods.settings import BITS, GROUP_SIZES

# {key: (name of the flag, type of its value)}
COMMON: dict[str, tuple[str, type]] = {
    "bits": ("bits", int),
    "group_size": ("group_size", int),
    "modules_to_not_convert": ("modules", list),
}
AWQ = COMMON | {
    "w_bit": ("bits", int),
    "q_group_size": ("group_size", int),
    "zero_point": ("zero_point", bool),
    "version": ("layout", str),
}
GPTQ = COMMON | {
    "desc_act": ("desc_act", bool),
    "static_groups": ("static_groups", bool),
    "damp_percent": ("damping", float),
    "dataset": ("dataset", str),
    "sym": ("symmetric", bool),
    "true_sequential": ("sequential", bool),
}
ALWAYS = {"symmetric": "sym", "sequential": "true_sequential"}  # no other value is written
ALLOWED = {"bits": BITS, "group_size": GROUP_SIZES}


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and where the user wrote it."""

    value: Any
    where: str


def read_quant_config(text: str, *, gptq: bool) -> dict[str, Given]:
    """Values under the names of the flags; null means the default.

    Raises ConfigError for what is no JSON object, and for keys and types that are not known, or
    a key that is there twice.
    """
    try:
        raw = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once_each)
    except ValueError as exc:
        raise ConfigError(f"--quant_config is not valid JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"--quant_config holds {type(raw).__name__}; allowed: one JSON object")
    known = GPTQ if gptq else AWQ
    values: dict[str, Given] = {}
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(
                f"--quant_config: unknown key {key!r}; known: {', '.join(sorted(known))}"
            )
        name, kind = known[key]
        if value is not None:
            given = Given(_checked(key, value, kind), f"{key} in --quant_config")
            add_given(values, name, given)
    return _without_fixed(values)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--quant_config: {twice[0]!r} is there twice; give it once")
    return dict(pairs)


def add_given(values: dict[str, Given], name: str, given: Given) -> None:
    """Raises ConfigError if it is not allowed, or was given otherwise before."""
    allowed = ALLOWED.get(name)
    if allowed is not None and given.value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ConfigError(f"{given.where} is {given.value!r}; allowed: {choices}")
    before = values.setdefault(name, given)
    if before.value != given.value:
        raise ConfigError(
            f"{before.where} is {before.value!r} and {given.where} is {given.value!r}; give it once"
        )


def _checked(key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    wrong_items = kind is list and isinstance(value, list) and not _texts(value)
    if type(value) is not kind or wrong_items:
        noun = "list of names" if kind is list else kind.__name__
        raise ConfigError(f"--quant_config: {key} is {value!r}; allowed: {noun}")
    return value


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _without_fixed(values: Mapping[str, Given]) -> dict[str, Given]:
    for name, key in ALWAYS.items():
        if name in values and not values[name].value:
            raise ConfigError(
                f"--quant_config: {key} is false; servers read only files where it is true"
            )
    return {name: value for name, value in values.items() if name not in ALWAYS}

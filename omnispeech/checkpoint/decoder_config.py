"""`config.yaml` of a speech decoder, read as data: no tag in it is imported or called."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omnispeech.errors import CheckpointError
from omnispeech.models.flow import SCHEDULES, FlowConfig
from omnispeech.models.flow_encoder import ACTIVATIONS, FlowEncoderConfig
from omnispeech.models.hift import HiFTConfig
from omnispeech.models.unet import GELU_FORMS, UNetConfig

CLASS = "!new"  # key under which a tagged mapping keeps the name of its class


@dataclass(frozen=True, slots=True)
class Reference:
    path: str  # `key`, or `key[inner]`


class TagsAsData(yaml.SafeLoader):
    """Knows what every tag holds and not what it means."""


def _construct(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        name = suffix.removeprefix("!").partition(":")[2]
        return {CLASS: name, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    text = str(loader.construct_scalar(node))  # type: ignore[arg-type]
    if suffix == "!ref":
        return Reference(text.strip().removeprefix("<").removesuffix(">"))
    return text


TagsAsData.add_multi_constructor("", _construct)


@dataclass(frozen=True, slots=True)
class Section:
    """One mapping of the file; complaints name the key by its path."""

    path: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise CheckpointError(f"{self.path}.{key} is missing")
        return self.values[key]

    def mapping(self, key: str) -> "Section":
        if not isinstance(self[key], Mapping):
            raise CheckpointError(f"{self.path}.{key} is {self[key]!r} and not a mapping")
        return Section(f"{self.path}.{key}", self[key])

    def section(self, key: str, class_name: str) -> "Section":
        inner = self.mapping(key)
        found = str(inner.values.get(CLASS, "")).rpartition(".")[2]
        if found != class_name:
            raise CheckpointError(
                f"{inner.path} is a {found or 'plain mapping'!r}; known: {class_name}"
            )
        return inner

    def entries(self, key: str) -> list[Any]:
        if not isinstance(self[key], list):
            raise CheckpointError(f"{self.path}.{key} is {self[key]!r} and not a list")
        return list(self[key])

    def whole(self, key: str) -> int:
        value = self[key]
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{self.path}.{key} is {value!r} and not a whole number")
        return value

    def number(self, key: str) -> float:
        try:
            return float(self[key])  # YAML 1.1 reads 1e-6 as a text
        except (TypeError, ValueError) as exc:
            raise CheckpointError(f"{self.path}.{key} is {self[key]!r} and not a number") from exc

    def wholes(self, key: str) -> tuple[int, ...]:
        value = self.entries(key)
        if not all(type(v) is int and v > 0 for v in value):
            raise CheckpointError(f"{self.path}.{key} is {value!r}; allowed: whole numbers above 0")
        return tuple(value)

    def dilations(self, key: str) -> tuple[tuple[int, ...], ...]:
        rows = Section(f"{self.path}.{key}", {str(i): r for i, r in enumerate(self.entries(key))})
        return tuple(rows.wholes(name) for name in rows.values)

    def one_of(self, key: str, known: Iterable[Any], default: Any = None) -> Any:
        value = self[key] if default is None else self.values.get(key, default)
        if value not in list(known):
            allowed = ", ".join(str(name) for name in known)
            raise CheckpointError(f"{self.path}.{key} is {value!r}; known: {allowed}")
        return value


def read_config(path: Path) -> tuple[FlowConfig, HiFTConfig]:
    """The two networks that `config.yaml` describes; raises CheckpointError for any other."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path} does not exist") from exc
    try:
        file = yaml.load(text, TagsAsData)
    except yaml.YAMLError as exc:
        raise CheckpointError(f"{path} is not valid YAML: {exc}") from exc
    if not isinstance(file, dict):
        raise CheckpointError(f"{path} holds no mapping")
    try:
        # The other sections (llm, seeds) have no weights here and are not even resolved.
        top = {key: resolved(file[key], file) for key in ("flow", "hift") if key in file}
        root = Section(path.name, top)
        flow = flow_config(root.section("flow", "MaskedDiffWithXvec"))
        hift = root.section("hift", "HiFTGenerator")
        hift.one_of("in_channels", (flow.output_size,))
        return flow, hift_config(hift)
    except CheckpointError as exc:
        raise CheckpointError(f"{path.parent}: {exc}") from exc


def resolved(value: Any, file: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> Any:
    """`value` with every reference replaced by what it names in the file."""
    if isinstance(value, Reference):
        if value.path in seen:
            raise CheckpointError(f"!ref <{value.path}> refers to itself")
        return resolved(_looked_up(value.path, file), file, seen | {value.path})
    if isinstance(value, dict):
        return {key: resolved(inner, file, seen) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner, file, seen) for inner in value]
    return value


def _looked_up(path: str, file: Mapping[str, Any]) -> Any:
    value: Any = file
    for key in path.replace("]", "").split("["):
        if not isinstance(value, Mapping) or key not in value:
            raise CheckpointError(f"!ref <{path}> names nothing in the file")
        value = value[key]
    return value


def flow_config(flow: Section) -> FlowConfig:
    regulator = flow.section("length_regulator", "InterpolateRegulator")
    matching = flow.section("decoder", "ConditionalCFM")
    solver = matching.mapping("cfm_params")
    if "content" in solver.values:  # omegaconf.DictConfig(content={...})
        solver = solver.mapping("content")
    solver.one_of("solver", ("euler",))
    mels = flow.whole("output_size")
    flow.one_of("output_type", ("mel",), "mel")
    regulator.one_of("channels", (mels,))
    regulator.one_of("out_channels", (mels,), mels)
    estimator = matching.section("estimator", "ConditionalDecoder")
    estimator.one_of("in_channels", (4 * mels,))  # state, encoder, speaker, prompt
    estimator.one_of("out_channels", (mels,))
    return FlowConfig(
        input_size=flow.whole("input_size"),
        output_size=mels,
        spk_embed_dim=flow.whole("spk_embed_dim"),
        vocab_size=flow.whole("vocab_size"),
        input_frame_rate=flow.number("input_frame_rate"),
        regulator_layers=len(regulator.entries("sampling_ratios")),
        regulator_groups=regulator.whole("groups") if "groups" in regulator.values else 1,
        schedule=solver.one_of("t_scheduler", SCHEDULES),
        guidance=solver.number("inference_cfg_rate"),
        encoder=encoder_config(flow.section("encoder", "BlockConformerEncoder")),
        estimator=unet_config(estimator),
    )


def encoder_config(encoder: Section) -> FlowEncoderConfig:
    encoder.one_of("input_layer", ("linear",))
    encoder.one_of("pos_enc_layer_type", ("rel_pos_espnet",))
    encoder.one_of("selfattention_layer_type", ("block_rel_selfattn",))
    encoder.one_of("normalize_before", (True,))
    encoder.one_of("use_cnn_module", (False,))
    encoder.one_of("macaron_style", (False,))
    encoder.one_of("key_bias", (True,), True)
    encoder.one_of("static_chunk_size", (0,), 0)
    encoder.one_of("use_dynamic_chunk", (False,), False)
    width, heads = encoder.whole("output_size"), encoder.whole("attention_heads")
    if heads == 0 or width % heads or width % 2:
        raise CheckpointError(
            f"{encoder.path}: {width} channels; allowed: even, and a multiple of {heads} heads"
        )
    return FlowEncoderConfig(
        input_size=encoder.whole("input_size"),
        output_size=width,
        attention_heads=heads,
        linear_units=encoder.whole("linear_units"),
        num_blocks=encoder.whole("num_blocks"),
        block_size=encoder.whole("block_size"),
        activation=encoder.one_of("activation_type", ACTIVATIONS, "swish"),
    )


def unet_config(estimator: Section) -> UNetConfig:
    channels = estimator.wholes("channels")
    if not channels or any(width % 8 for width in channels):
        raise CheckpointError(f"{estimator.path}.channels is {channels}; allowed: multiples of 8")
    return UNetConfig(
        in_channels=estimator.whole("in_channels"),
        out_channels=estimator.whole("out_channels"),
        channels=channels,
        attention_head_dim=estimator.whole("attention_head_dim"),
        n_blocks=estimator.whole("n_blocks"),
        num_mid_blocks=estimator.whole("num_mid_blocks"),
        num_heads=estimator.whole("num_heads"),
        act_fn=estimator.one_of("act_fn", GELU_FORMS),
    )


def hift_config(hift: Section) -> HiFTConfig:
    f0 = hift.section("f0_predictor", "ConvRNNF0Predictor")
    f0.one_of("num_class", (1,), 1)
    f0.one_of("in_channels", (hift.whole("in_channels"),))
    istft = hift.mapping("istft_params")
    for key, per in (
        ("upsample_kernel_sizes", "upsample_rates"),
        ("source_resblock_kernel_sizes", "upsample_rates"),
        ("source_resblock_dilation_sizes", "upsample_rates"),
        ("resblock_dilation_sizes", "resblock_kernel_sizes"),
    ):
        if len(hift.entries(key)) != len(hift.entries(per)):
            raise CheckpointError(f"{hift.path}.{key} has not one entry for each of {per}")
    return HiFTConfig(
        in_channels=hift.whole("in_channels"),
        base_channels=hift.whole("base_channels"),
        nb_harmonics=hift.whole("nb_harmonics"),
        sampling_rate=hift.whole("sampling_rate"),
        nsf_alpha=hift.number("nsf_alpha"),
        nsf_sigma=hift.number("nsf_sigma"),
        nsf_voiced_threshold=hift.number("nsf_voiced_threshold"),
        upsample_rates=hift.wholes("upsample_rates"),
        upsample_kernel_sizes=hift.wholes("upsample_kernel_sizes"),
        n_fft=istft.whole("n_fft"),
        hop_len=istft.whole("hop_len"),
        resblock_kernel_sizes=hift.wholes("resblock_kernel_sizes"),
        resblock_dilation_sizes=hift.dilations("resblock_dilation_sizes"),
        source_resblock_kernel_sizes=hift.wholes("source_resblock_kernel_sizes"),
        source_resblock_dilation_sizes=hift.dilations("source_resblock_dilation_sizes"),
        lrelu_slope=hift.number("lrelu_slope"),
        audio_limit=hift.number("audio_limit"),
        f0_channels=f0.whole("cond_channels"),
    )

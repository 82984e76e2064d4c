"""Loads an OpenS2S checkpoint directory: everything in it fits exactly, or an error says what."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from omnispeech.checkpoint.files import build_on_meta, held_bytes, size_text
from omnispeech.checkpoint.hearing import load_hearing, with_wavlm
from omnispeech.checkpoint.kernel_ready import KernelReady
from omnispeech.checkpoint.lora import merged
from omnispeech.checkpoint.prepared import Prepared, copies_of
from omnispeech.checkpoint.prepared_key import Machine
from omnispeech.checkpoint.quantized import kernels_of, plan_causal_lm, read_quantization
from omnispeech.checkpoint.shards import Shards
from omnispeech.checkpoint.wavlm_paths import ENCODER, WavLMPaths, own_wavlm
from omnispeech.checkpoint.weight_plan import Target, WeightPlan
from omnispeech.errors import CheckpointError
from omnispeech.json_file import read_json
from omnispeech.layers.linear import QuantizedLinear
from omnispeech.models.omnispeech import OmniSpeech, OmniSpeechConfig
from omnispeech.models.qwen3 import Qwen3Config
from omnispeech.models.speech_lm import SpeechLM
from omnispeech.models.wavlm import WavLMConfig, WavLMEncoder
from omnispeech.models.whisper import EncoderConfig
from omnispeech.phases import Phase, Phases

logger = logging.getLogger(__name__)

NEEDED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "audio/preprocessor_config.json",
    "tts/tokenizer.json",
)
LANGUAGE_MODELS = ("llm_model", "tts_lm_model")
PARTS = {"llm_model": "LLM", "tts_lm_model": "speech LM"}
REST = "audio encoder and adapters"
UNIT_LIMIT = 512  # of one reply where the checkpoint sets none: about 41 s of speech


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request does not set itself; an absent key means the default of transformers 4.51."""

    eos_ids: tuple[int, ...]
    top_k: int = 50  # 0: off
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedOpenS2S:
    model: OmniSpeech
    preprocessor: dict[str, Any]  # audio/preprocessor_config.json as it is
    text_generation: GenerationDefaults
    speech_generation: GenerationDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How the weights come in; none of it changes what is computed with them."""

    threads: int = 0  # that read; 0: see `read_tensors`
    prepare: bool = False  # use and keep kernel-ready copies, see `checkpoint/prepared.py`
    phases: Phases = field(default_factory=Phases)  # told of each part


def load_opens2s(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    llm: Path | None = None,
    speech_lm: Path | None = None,
    wavlm: WavLMPaths | None = None,
    kernel: str = "auto",
    loading: Loading | None = None,
) -> LoadedOpenS2S:
    """The whole model on `device`, its floating point weights cast to `dtype`.

    llm, speech_lm: directories of language models that take the place of those in `directory`, of
        which then no byte is read. Tokenizers and settings are still those of `directory`.
    wavlm: in place of the audio encoder, of which then no byte is read; see `checkpoint/wavlm.py`.
    kernel: of quantized linears, see `layers/linear.py`.
    """
    loading = loading or Loading()
    _check_files(directory)
    raw = read_json(directory / "config.json")
    config = OmniSpeechConfig.from_dict(raw)
    wavlm = wavlm or own_wavlm(directory)
    preprocessor = read_json(directory / "audio/preprocessor_config.json")
    if isinstance(config.audio_encoder, EncoderConfig) and not wavlm:
        _check_segments(preprocessor, config.audio_encoder)
    text = read_generation(directory / "generation_config.json", raw["llm_config"])
    speech = read_generation(
        directory / "tts/generation_config.json", raw["tts_lm_config"], limit=UNIT_LIMIT
    )
    _check_end_ids(directory / "generation_config.json", text, config.llm)
    _check_end_ids(directory / "tts/generation_config.json", speech, config.tts_lm)
    others = zip(LANGUAGE_MODELS, (llm, speech_lm), strict=True)
    replaced = {name: path for name, path in others if path}
    # before a file of weights is opened: what is replaced from now on gets another identity
    copies = copies_of(directory, replaced, Machine(device, kernel)) if loading.prepare else {}
    with loading.phases.measure("check checkpoint"):
        plans = plan_opens2s(directory, device, replaced, wavlm)
        model = cast(OmniSpeech, plans[0].model)
    target = Target(device, dtype, kernel, loading.threads)
    if wavlm and isinstance(encoder := model.audio_encoder_model, WavLMEncoder):
        load_hearing(directory, encoder, wavlm, target, loading.phases)
    for plan in plans:
        copy = copies.get(Path(plan.source)) if plan.quantized else None
        _load(plan, target, loading.phases, copy)
    return LoadedOpenS2S(
        model=model,
        preprocessor=preprocessor,
        text_generation=text,
        speech_generation=speech,
    )


def plan_opens2s(
    directory: Path,
    device: torch.device,
    others: Mapping[str, Path] | None = None,
    wavlm: WavLMPaths | None = None,
) -> list[WeightPlan]:
    """All headers are compared here: a misfit is not found after reading 22 GB.

    The first plan is of the whole model. others: directories of language models that take the
    place of those in `directory`, by name in the model; each has a plan of its own. A WavLM is in
    no plan: `load_hearing` compares it.
    """
    _check_files(directory)
    raw, others = read_json(directory / "config.json"), others or {}
    config = OmniSpeechConfig.from_dict(raw)
    config = replace(
        config, audio_encoder=with_wavlm(config.audio_encoder, wavlm or own_wavlm(directory))
    )
    model = cast(OmniSpeech, build_on_meta(lambda: OmniSpeech(config)))
    tensors = merged(Shards(directory, device), directory, raw)
    elsewhere = tuple(f"{name}." for name in others)
    if isinstance(config.audio_encoder, WavLMConfig):
        elsewhere += (ENCODER,)
    quantization = read_quantization(raw)
    return [
        WeightPlan(model, tensors, quantization, str(directory), elsewhere=elsewhere),
        *(plan_causal_lm(path, device, getattr(model, name)) for name, path in others.items()),
    ]


def read_generation(
    path: Path, nested: Mapping[str, Any], *, limit: int | None = None
) -> GenerationDefaults:
    """`nested`: the config of the same language model, asked for end ids that `path` lacks.

    `limit` is max_new_tokens where the file has none. The file itself may be absent.
    """
    raw = read_json(path) if path.exists() else {}
    eos = raw.get("eos_token_id", nested.get("eos_token_id"))
    if eos is None:
        raise CheckpointError(
            f"no eos_token_id in {path}, nor in the nested config; nothing would end a reply"
        )
    return GenerationDefaults(
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        top_k=_absent_or_null(raw, "top_k", 50, null=0),
        max_new_tokens=_absent_or_null(raw, "max_new_tokens", limit, null=limit),
    )


def _check_end_ids(path: Path, generation: GenerationDefaults, lm: Qwen3Config) -> None:
    for end in generation.eos_ids:
        if end not in range(lm.vocab_size):
            raise CheckpointError(
                f"end id {end!r} of {path} (or of config.json, if that file names none) is not "
                f"in the vocabulary; allowed: 0 to {lm.vocab_size - 1}"
            )


def _absent_or_null(raw: Mapping[str, Any], name: str, absent: Any, *, null: Any) -> Any:
    value = raw.get(name, absent)
    return null if value is None else value


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; it should hold an OpenS2S model")
    if missing := [name for name in NEEDED if not (directory / name).is_file()]:
        raise CheckpointError(
            f"{directory} is not a whole OpenS2S checkpoint; it lacks {', '.join(missing)}"
        )


def _check_segments(preprocessor: Mapping[str, Any], encoder: EncoderConfig) -> None:
    """The features must fit the audio encoder; better known now than at the first audio."""
    chunk = preprocessor.get("chunk_length", 30) * preprocessor.get("sampling_rate", 16_000)
    frames = chunk // preprocessor.get("hop_length", 160)
    if frames % (2 * encoder.max_source_positions):
        raise CheckpointError(
            f"a chunk of the preprocessor is {frames} mel frames; it must be a multiple of the "
            f"{2 * encoder.max_source_positions} that the audio encoder takes at a time"
        )
    if (bins := preprocessor.get("feature_size", 80)) != encoder.num_mel_bins:
        raise CheckpointError(
            f"feature_size={bins} of the preprocessor differs from "
            f"num_mel_bins={encoder.num_mel_bins} of the audio encoder"
        )


def _load(plan: WeightPlan, target: Target, phases: Phases, prepared: Prepared | None) -> None:
    """With the lines that the guides look for in the log."""
    kind = {OmniSpeech: "model", SpeechLM: "speech LM"}.get(type(plan.model), "LLM")
    bits = ""
    if plan.quantization:
        kind = f"{plan.quantization.method.upper()}-quantized {kind}"
        bits = f"{plan.quantization.scheme.bits}-bit, "
    logger.info("🔄 Loading %s from %s...", kind, plan.source)
    began, held = time.perf_counter(), held_bytes(plan.model)  # WavLM is there already
    ready = prepared.open(plan.forms) if prepared else None
    for part, names in _parts(plan).items():
        with phases.measure(f"load {part}") as phase:
            ready = _load_part(plan, target, names, ready, phase)
    seconds, size = time.perf_counter() - began, held_bytes(plan.model) - held
    logger.info("✅ %s loaded (%s%s, %.1f s)", kind, bits, size_text(size), seconds)
    if kernels := kernels_of(plan.model):
        logger.info("kernels of its quantized linears: %s", kernels)
    if prepared and not ready:
        with phases.measure("keep kernel-ready weights"):
            prepared.write(_quantized_linears(plan))


def _load_part(
    plan: WeightPlan, target: Target, names: set[str], ready: KernelReady | None, phase: Phase
) -> KernelReady | None:
    """-> the copy, for the next part; None if there is none that can be read."""
    before = _bytes_read(plan, ready)
    usable = ready if ready and _load_ready(plan, target, names, ready) else None
    if usable is None:
        plan.load(target, names)
    phase.size = _bytes_read(plan, ready) - before
    return usable


def _load_ready(plan: WeightPlan, target: Target, names: set[str], ready: KernelReady) -> bool:
    """Whether all is in place; what is not can be loaded again without `ready`."""
    try:
        plan.load(target, names, ready)
    except CheckpointError as exc:
        logger.warning("%s is not used, and made again: %s", ready.path.parent, exc)
        return False
    return True


def _parts(plan: WeightPlan) -> dict[str, set[str]]:
    """Names of tensors by what they are of, in the order of the files."""
    if not isinstance(plan.model, OmniSpeech):
        return {"speech LM" if isinstance(plan.model, SpeechLM) else "LLM": set(plan.names)}
    parts: dict[str, set[str]] = {}
    for name in plan.names:
        parts.setdefault(PARTS.get(name.partition(".")[0], REST), set()).add(name)
    return parts


def _bytes_read(plan: WeightPlan, ready: KernelReady | None) -> int:
    return plan.bytes_read + (ready.bytes_read if ready else 0)


def _quantized_linears(plan: WeightPlan) -> dict[str, QuantizedLinear]:
    modules = plan.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, QuantizedLinear)}

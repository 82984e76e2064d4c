"""Compares prompt, mel and audio vectors with the original, then the language models."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from omnispeech.assembly import language_models
from omnispeech.audio.features import MelConfig, log_mel
from omnispeech.checkpoint.opens2s import LoadedOpenS2S, load_opens2s
from omnispeech.engine.runner import LanguageModels
from omnispeech.errors import OmniSpeechError
from omnispeech.parity.cases import Case, case_names, checkpoints, distance, read_case
from omnispeech.parity.generation import compare_generations, is_generation
from omnispeech.parity.report import Row
from omnispeech.prompt import AUDIO_SLOT, PromptBuilder

EXACT, MEL_TOLERANCE, TOLERANCE = 0.0, 1e-4, 2e-4
MEL_WINDOW = re.compile(r"mel_(\d+)\.(\d+)")  # audio, first frame
PAD_MARGIN = 8  # frames behind the last valid one that a window still reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What this program makes of a case, under the names of the golden files."""

    facts: dict[str, Any]
    mels: list[Tensor]  # [M, T] each
    tensors: dict[str, Tensor]

    @property
    def prompt(self) -> Tensor:
        """[L, H], what the LLM reads."""
        return self.tensors["prompt_embeds"]


def compare(directory: Path) -> Iterator[Row]:
    """One row for each golden number of each case of each checkpoint in the directory.

    A case that cannot be read or run is a failing row, and the others are still compared.
    """
    for checkpoint in checkpoints(directory):
        try:
            loaded = load_opens2s(checkpoint, torch.device("cpu"), torch.float32)
            models = language_models(checkpoint, loaded, compatible=True)
            names = case_names(checkpoint)
        except OmniSpeechError as error:
            yield not_compared(checkpoint.name, error)
            continue
        for name in names:
            try:
                yield from compare_case(read_case(checkpoint, name), loaded, models)
            except OmniSpeechError as error:
                yield not_compared(f"{checkpoint.name}/{name}", error)


def compare_case(case: Case, loaded: LoadedOpenS2S, models: LanguageModels) -> Iterator[Row]:
    heard = hear(case, loaded, models.prompt)
    yield from compare_facts(case, heard)
    yield from compare_tensors(case, heard)
    yield from compare_generations(case, models, heard.prompt, heard.facts["input_ids"])


def not_compared(case: str, error: Exception) -> Row:
    return Row(case, f"not compared: {error}", float("inf"), EXACT)


@torch.inference_mode()
def hear(case: Case, loaded: LoadedOpenS2S, prompts: PromptBuilder) -> Heard:
    config = MelConfig.from_dict(loaded.preprocessor)
    longest = max(map(len, case.sounds), default=0)
    mels = [log_mel(sound, config, longest=longest) for sound in case.sounds]
    valid = [config.valid_frames(len(sound)) for sound in case.sounds]
    encoder = loaded.model.audio_encoder_model
    frames = [encoder.encode(mel, count) for mel, count in zip(mels, valid, strict=True)]
    lengths = [encoder.output_length(count) for count in valid]
    vectors = loaded.model.adapt_audio(frames, lengths, batch_rule=True)
    ids = prompts.build(case.messages)
    tensors = {
        "input_ids": torch.tensor(ids),
        "encoder_lengths": torch.tensor(lengths),
        "adapter_lengths": torch.tensor([len(v) for v in vectors]),
        "prompt_embeds": loaded.model.splice(ids, vectors),
        **_numbered("encoder_out", [f[:n] for f, n in zip(frames, lengths, strict=True)]),
        **_numbered("adapter_out", vectors),
        **_numbered("adapter_solo", _solo(case, loaded, config)),
    }
    facts = {
        "input_ids": ids,
        "prompt_text": _text(case.checkpoint, ids),
        "prompt_len": len(tensors["prompt_embeds"]),
        "mel_valid_frames": valid,
        "encoder_lengths": lengths,
        "adapter_lengths": tensors["adapter_lengths"].tolist(),
    }
    if mels:
        facts["mel_shape"] = [len(mels), *mels[0].shape]
        facts["mask_shape"] = [len(mels), mels[0].shape[1]]
        facts["encoder_out_shape"] = [len(mels), max(lengths), frames[0].shape[1]]
    return Heard(facts=facts, mels=mels, tensors=tensors)


def _solo(case: Case, loaded: LoadedOpenS2S, config: MelConfig) -> list[Tensor]:
    """The vectors of each audio as if it were alone in the request."""
    mels = [log_mel(sound, config) for sound in case.sounds]
    valid = [config.valid_frames(len(sound)) for sound in case.sounds]
    return loaded.model.embed_audio(mels, valid, batch_rule=False)


def _numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}_{i}": tensor for i, tensor in enumerate(tensors)}


def _text(checkpoint: Path, ids: Sequence[int]) -> str:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return tokenizer.decode([i for i in ids if i != AUDIO_SLOT], skip_special_tokens=False)


def compare_facts(case: Case, heard: Heard) -> Iterator[Row]:
    """What the JSON file says of text, lengths and shapes: equal or not."""
    for name in (name for name in heard.facts if name in case.facts):
        equal = heard.facts[name] == case.facts[name]
        yield Row(case.name, f"{name} (json)", 0.0 if equal else float("inf"), EXACT)
    for i, value in enumerate(case.facts.get("mel_pad_value", ())):
        start = heard.facts["mel_valid_frames"][i] + PAD_MARGIN
        padding = heard.mels[i][:, start:]
        if padding.numel():
            difference = distance(padding, torch.full_like(padding, value))
            yield Row(case.name, f"mel_pad_value_{i}", difference, MEL_TOLERANCE)


def compare_tensors(case: Case, heard: Heard) -> Iterator[Row]:
    """A golden tensor that nothing here answers to is a failure, not an omission."""
    for name, expected in sorted(case.tensors.items()):
        if is_generation(name):
            continue
        actual = _window(heard, name, expected.shape[-1]) if MEL_WINDOW.fullmatch(name) else None
        if actual is None:
            actual = heard.tensors.get(name)
        if actual is None:
            yield Row(case.name, f"{name} (unknown)", float("inf"), EXACT)
        else:
            yield Row(case.name, name, distance(actual, expected), _tolerance(name, expected))


def _window(heard: Heard, name: str, frames: int) -> Tensor | None:
    """[M, frames] of the mel that the name of a golden tensor tells."""
    match = MEL_WINDOW.fullmatch(name)
    assert match is not None, name
    audio, first = int(match[1]), int(match[2])
    if audio >= len(heard.mels):
        return None
    return heard.mels[audio][:, first : first + frames]


def _tolerance(name: str, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return EXACT
    return MEL_TOLERANCE if name.startswith("mel_") else TOLERANCE

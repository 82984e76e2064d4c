"""What calibrating on sound is worth: divergence on text after sound (M4)."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from benchmarks.byte_lm import ByteLM
from benchmarks.divergence import divergence
from benchmarks.quality import EVALUATION_SEED, LENGTH, METHODS, Effort, calibration_text, quantize
from benchmarks.sound import Ear, mixture


def compare(model: ByteLM, ear: Ear, effort: Effort) -> dict[str, Any]:
    """Default method, calibrated on text alone and on as many tokens of text with sound in it."""
    rows = [one_seed(model, ear, effort, seed) for seed in range(effort.seeds)]
    text, sound = (fmean(row[heard]["after"] for row in rows) for heard in ("text", "sound"))
    return {"seeds": rows, "text": text, "sound": sound, "times_better": text / sound}


def one_seed(
    model: ByteLM, ear: Ear, effort: Effort, seed: int
) -> Mapping[str, Mapping[str, float]]:
    mixed = mixture("evaluation", effort.evaluation, LENGTH, EVALUATION_SEED)
    vectors = ear.splice(mixed, model.embed(mixed.ids))
    exact = model.logits(model.blocks(), vectors)
    spoken = mixture("calibration", effort.calibration, LENGTH, seed)
    heard = {
        "text": calibration_text(model, effort, seed),
        "sound": ear.splice(spoken, model.embed(spoken.ids)),
    }
    result = {}
    for name, calibration in heard.items():
        blocks, _ = quantize(model, METHODS["default"], calibration)
        logits = model.logits(blocks, vectors)
        before = ~mixed.sound & ~mixed.after
        result[name] = {
            place: divergence(exact, logits, mixed.targets, counted).kl
            for place, counted in (("after", mixed.after), ("before", before))
        }
    return result


def ear_for(model: ByteLM) -> Ear:
    """Louder than the embeddings of this model."""
    embedding = model.weights["model.embed_tokens.weight"]
    return Ear(embedding.shape[1], float(torch.std(embedding)))

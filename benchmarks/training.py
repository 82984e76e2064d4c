"""Trains the models of the quality tests, in minutes on one machine, and keeps them on disk."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.byte_lm import ByteLM, Recipe, read_model, write_model
from benchmarks.corpus import pieces
from benchmarks.sound import Ear, Mixture, mixture

STEP_TOKENS = 2048
LENGTH = 128  # of a sequence
SOUND_STEPS = 400  # in which M1 learns to listen
GATE = Recipe(  # of tests/byte_lm
    hidden=128,
    inner=384,
    layers=3,
    heads=4,
    kv_heads=2,
    head_width=32,
    steps=1000,
    rate=3e-3,
)


def plain_model(recipe: Recipe, directory: Path) -> ByteLM:
    """M1. Trains once; the directory says by its name what is in it."""
    path = directory / f"byte-lm-{_name(recipe)}"
    if not (path / "model.safetensors").is_file():
        write_model(train(recipe), path)
    return read_model(path)


def sound_model(recipe: Recipe, directory: Path, ear: Ear) -> ByteLM:
    """The language model of M4: M1, trained further on text with sound in it."""
    path = directory / f"sound-lm-{_name(recipe)}-{SOUND_STEPS}"
    if not (path / "model.safetensors").is_file():
        write_model(train_on_sound(plain_model(recipe, directory), recipe, ear), path)
    return read_model(path)


def _name(recipe: Recipe) -> str:
    return f"{recipe.hidden}x{recipe.layers}-{recipe.steps}-{recipe.seed}"


def train(recipe: Recipe) -> ByteLM:
    model = _network(recipe)
    optimizer = _optimizer(model)
    for step, rate in enumerate(_rates(recipe.steps, recipe.rate)):
        ids = pieces("train", STEP_TOKENS // LENGTH, LENGTH + 1, recipe.seed * 10**6 + step)
        logits = model(input_ids=ids[:, :-1]).logits
        _improve(optimizer, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), rate)
    return ByteLM(recipe.config(), _float_weights(model))


def train_on_sound(start: ByteLM, recipe: Recipe, ear: Ear) -> ByteLM:
    """Sound stays what it is; the model alone learns."""
    model = _network(recipe)
    model.load_state_dict(dict(start.weights))
    optimizer = _optimizer(model)
    for step, rate in enumerate(_rates(SOUND_STEPS, recipe.rate / 2)):
        mixed = mixture("train", STEP_TOKENS // LENGTH, LENGTH, recipe.seed * 10**6 + step)
        _improve(optimizer, _sound_loss(model, mixed, ear), rate)
    return ByteLM(recipe.config(), _float_weights(model))


def _sound_loss(model: Any, mixed: Mixture, ear: Ear) -> Tensor:
    vectors = ear.splice(mixed, model.get_input_embeddings()(mixed.ids))
    logits = model(inputs_embeds=vectors).logits
    written = ~mixed.sound  # what follows a byte of text is to be known
    return F.cross_entropy(logits[written], mixed.targets[written])


def _network(recipe: Recipe) -> Any:
    """The network of transformers: ours keeps no gradients. Loaded here: it takes seconds."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(Qwen3Config(**recipe.config()))


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.9, 0.95))


def _rates(steps: int, highest: float) -> list[float]:
    """A short rise, then down to nothing along half a cosine."""
    rise = steps // 16
    fall = torch.linspace(0, torch.pi, steps - rise).cos().add(1).mul(highest / 2)
    return [highest * (i + 1) / rise for i in range(rise)] + fall.tolist()


def _improve(optimizer: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def _float_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach().float().clone() for name, w in model.state_dict().items()}

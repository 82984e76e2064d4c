"""One loop for every network here: AdamW, a moving average, continued after a kill."""

import io
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from omnispeech.checkpoint.whole_file import replace_file
from omnispeech.errors import OmniSpeechError

logger = logging.getLogger(__name__)

SEED = 1
Figures = dict[str, float]
Loss = Callable[[random.Random, float], tuple[Tensor, Figures]]  # rng, part of the steps done


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps: int
    rate: float  # of learning, at its highest
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 100  # steps
    average: float = 0.995  # weight of the past in what is kept
    decay_from: float = 0.4  # part of the steps after which the rate falls
    lowest: float = 0.03  # of the highest rate
    norm: float = 1.0  # gradients are clipped to

    def rate_at(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warm_up)
        done = step / self.steps
        falling = 1 - max(0.0, (done - self.decay_from) / (1 - self.decay_from))
        return self.rate * rising * max(self.lowest, falling)


def fit(name: str, module: nn.Module, plan: Plan, loss: Loss, work: Path) -> dict[str, Tensor]:
    """-> the averaged weights, also left in `module` and in `work/name.pt`."""
    done = work / f"{name}.pt"
    if not done.exists():
        Fitting(name, module, plan, loss, work).run()
    weights = torch.load(done, weights_only=True)
    module.load_state_dict(weights)
    module.eval()
    return weights


def load(work: Path, name: str) -> dict[str, Tensor]:
    """The weights of a stage that is done."""
    done = work / f"{name}.pt"
    if not done.exists():
        raise OmniSpeechError(f"{done} is missing; the stage {name} makes it")
    return torch.load(done, weights_only=True)


def save(path: Path, value: object) -> None:
    """Whole or not at all. By way of the memory: torch does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)

    def write(partial: Path) -> None:
        partial.write_bytes(buffer.getbuffer())

    replace_file(path, write)


class Clock:
    """Tells how much is done and how long the rest will take."""

    def __init__(self, done: int, of: int) -> None:
        self.first, self.of, self.began = done, of, time.monotonic()

    def told(self, done: int) -> str:
        pace_s = (time.monotonic() - self.began) / (done - self.first)
        return f"{done} of {self.of}, {pace_s * (self.of - done) / 60:.0f} min left"


class Fitting:
    SAVE_S = 120.0
    TELL = 50  # steps

    def __init__(self, name: str, module: nn.Module, plan: Plan, loss: Loss, work: Path) -> None:
        self.name, self.module, self.plan, self.loss, self.work = name, module, plan, loss, work
        groups = [
            {"params": [p for p in module.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in module.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=plan.betas)
        self.average = {n: t.detach().clone() for n, t in module.state_dict().items()}
        self.step = 0
        self.state = work / f"{name}.state"

    def run(self) -> None:
        if self.state.exists():
            self._resume()
        self.module.train()
        sums: Figures = {}
        clock, saved = Clock(self.step, self.plan.steps), time.monotonic()
        while self.step < self.plan.steps:
            figures = self._one()
            for key, value in figures.items():
                sums[key] = sums.get(key, 0.0) + value / self.TELL
            if self.step % self.TELL == 0:
                told = "  ".join(f"{key} {value:.4f}" for key, value in sums.items())
                logger.info("%s: step %s  %s", self.name, clock.told(self.step), told)
                sums = {}
            if time.monotonic() - saved > self.SAVE_S:
                self._save()
                saved = time.monotonic()
        save(self.work / f"{self.name}.pt", self.average)
        self.state.unlink(missing_ok=True)

    def _one(self) -> Mapping[str, float]:
        """The random numbers of a step depend on its number alone."""
        rng = random.Random(f"{self.name} {SEED} {self.step}")
        torch.manual_seed(rng.getrandbits(60))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        loss, figures = self.loss(rng, self.step / self.plan.steps)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.norm)
        self.optimizer.step()
        self.step += 1
        past = min(self.plan.average, self.step / (self.step + 10))
        for name, value in self.module.state_dict().items():
            self.average[name].lerp_(value.detach(), 1 - past)
        return figures

    def _save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        save(self.state, state)

    def _resume(self) -> None:
        state = torch.load(self.state, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]
        logger.info("%s goes on at step %d", self.name, self.step)

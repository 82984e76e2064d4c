"""Sums of everything heard -> the weights of a bridge."""

from copy import deepcopy
from dataclasses import dataclass

import torch

from omnispeech.bridge_training.listening import Statistics
from omnispeech.bridge_training.regression import Fit, LinearMap, choose_ridge
from omnispeech.errors import ConfigError
from omnispeech.models.wavlm import Bridge

FRAMES_PER_S = 25
ENOUGH = 10  # frames to fit with, for each number that one output is made of


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    bridge: Bridge
    ridge: float
    error: float  # on what it was fitted to, relative as everywhere


def columns(bridge: Bridge) -> int:
    """Numbers that one number of an output frame is made of."""
    conv = bridge.temporal_adapter
    return conv.in_channels * conv.kernel_size[0] + 1


def check_amount(frames: int, bridge: Bridge) -> None:
    """Raises ConfigError for fewer frames to fit with than there are numbers to find."""
    needed = columns(bridge)
    if frames < needed:
        more = (ENOUGH * needed - frames) / FRAMES_PER_S
        raise ConfigError(
            f"{frames} frames ({frames / FRAMES_PER_S:.0f} s) to fit with, and {needed} numbers to "
            f"find for each output: that has no answer; add {more:.0f} s of audio or more (an hour "
            "of the sound that will be heard is a good beginning)"
        )


def fit_bridge(statistics: Statistics, untrained: Bridge) -> Fitted:
    """The ridge is chosen on the validation files; then all are fitted to."""
    check_amount(int(statistics.training.frames), untrained)
    rank = untrained.temporal_adapter.out_channels
    ridge = choose_ridge(Fit(statistics.training, rank), statistics.validation)
    everything = statistics.training + statistics.validation
    best = Fit(everything, rank).map(ridge)
    squares = everything.yy - everything.y.square().sum() / everything.frames
    error = best.squared_error(everything) / float(squares)
    return Fitted(_as_bridge(best, untrained), ridge, error)


def untrained_bridge(hidden_size: int, d_model: int, seed: int, device: torch.device) -> Bridge:
    """As torch initialises it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        bridge = Bridge(hidden_size, d_model)
    return bridge.to(device).eval().requires_grad_(False)


def _as_bridge(best: LinearMap, shape: Bridge) -> Bridge:
    """The convolution takes off the mean and reduces, the projection expands and adds a mean."""
    state = shape.state_dict()
    weights = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in state.items()}
    rank = len(best.expand)  # channels beyond it stay zero
    kernels = weights["temporal_adapter.weight"][:rank]
    kernels.copy_(best.reduce.T.reshape(kernels.shape))
    weights["temporal_adapter.bias"][:rank] = -best.x_mean @ best.reduce
    weights["dimension_projection.weight"][:, :rank] = best.expand.T
    weights["dimension_projection.bias"].copy_(best.y_mean)
    bridge = deepcopy(shape)
    bridge.load_state_dict(weights)
    return bridge

"""Trains the flow: units -> mel.

The units of this voice say nearly everything about the mel, so the field the flow follows is a
contraction: from wherever it stands it points at the mel, with one strength at every time. Ten
Euler steps then leave less than half a percent of the noise they began with. The network starts
as exactly that, around the encoder's own estimate, and learns what that estimate lacks. The points
it is trained at lie between noise and the *estimate*, never the true mel: they tell it nothing that
it will not know when it speaks.
"""

import math
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnispeech.models.flow import Flow, FlowConfig, cosine_times
from omnispeech.models.unet import UNet
from training.answers import Sentence
from training.fitting import Figures, Plan, fit

STRENGTH = 4.0  # of the field: velocity = STRENGTH * (mel - x)
ANCHOR = 400.0  # keeps the last group norm from rescaling the difference it should pass on
LIFT = 3.0  # where mish is nearly straight
SLOPE = 0.2  # of what mish sees, over the difference
SILENT = (  # layers that start at nought: ends of residual branches, and those of the straight way
    "block2.block.1",
    "to_out.0",
    "net.2",
    "down_blocks.0.0.res_conv",
    "up_blocks.1.0.res_conv",
    "up_blocks.1.2",
    "final_block.block.0",
    "final_proj",
)
BATCH = 12
STEPS = 10  # Euler steps the server makes
ALONE = 0.35  # part of the training in which the encoder learns alone


def new_flow(config: FlowConfig) -> Flow:
    torch.manual_seed(12)
    model = Flow(config)
    for name, parameter in model.encoder.named_parameters():
        if name.endswith(("pos_bias_u", "pos_bias_v")):
            nn.init.zeros_(parameter)
    model.encoder_proj.weight.data *= 2.0
    contract(model.decoder.estimator)
    return model


def contract(unet: UNet) -> None:
    """Makes the network compute STRENGTH * (mu - x), whatever else its weights are.

    Every residual branch starts silent. The difference goes through the first and the last stage
    by their 1 x 1 convolutions. The last group norm would scale it to deviation 1: large constants
    of alternating sign beside it make the scale that of the constants. Two channels of each group
    hold minus the sum of the others of one sign, so that the norm sees no mean of them.
    """
    width, bins = unet.final_proj.in_channels, unet.final_proj.out_channels
    assert width >= bins + 16, f"{width} channels cannot pass {bins} bins"
    weights = {name: parameter.data for name, parameter in unet.named_parameters()}
    for name, value in weights.items():
        if name.rpartition(".")[0].endswith(SILENT):
            value.zero_()
    place = _places(width, bins)
    _take_difference(weights["down_blocks.0.0.res_conv.weight"], place, width // 8)
    last = f"up_blocks.{len(unet.up_blocks) - 1}"
    _keep(weights[f"{last}.0.res_conv.weight"][:, -width:, 0])  # what the first stage handed over
    _keep(weights[f"{last}.2.weight"][:, :, 1])
    _keep(weights["final_block.block.0.weight"][:, :, 1])
    signs = torch.tensor([-1.0, 1.0]).repeat(width // 2)
    weights["final_block.block.0.bias"].copy_(ANCHOR * signs)
    weights["final_block.block.1.weight"].fill_(SLOPE * ANCHOR)
    weights["final_block.block.1.bias"].copy_(LIFT - SLOPE * ANCHOR * signs)
    # a small step of it is a large one of the field
    unet.final_block.block[1].requires_grad_(False)
    level, steepness = _mish(LIFT)
    gain = STRENGTH / (SLOPE * steepness)
    weights["final_proj.weight"][range(bins), place, 0] = gain
    weights["final_proj.bias"].fill_(-gain * level)


def _take_difference(weight: Tensor, place: list[int], group: int) -> None:
    """[C, x and mu and others, 1]: mu - x in the places, and in the last two channels of each group
    minus the sum of those with the same sign of the constant."""
    for m, c in enumerate(place):
        spare = c // group * group + group - 2 + c % 2
        weight[c, m], weight[c, len(place) + m] = -1.0, 1.0
        weight[spare, m], weight[spare, len(place) + m] = 1.0, -1.0


def _keep(square: Tensor) -> None:
    square.copy_(torch.eye(len(square)))


def _mish(at: float) -> tuple[float, float]:
    """Value and slope"""
    x = torch.tensor(at, requires_grad=True)
    y = F.mish(x)
    (slope,) = torch.autograd.grad(y, x)
    return float(y.detach()), float(slope)


def _places(width: int, bins: int) -> list[int]:
    """A channel for every bin; the last two of each of the eight groups are left free."""
    group = width // 8
    return [c for c in range(width) if c % group < group - 2][:bins]


def left_of_noise() -> tuple[Tensor, Tensor]:
    """[STEPS] each: the times the server asks at, and how much of the noise is left there."""
    times = cosine_times(STEPS)
    left = torch.cumprod(1 - STRENGTH * times.diff(), 0)
    return times[:-1], torch.cat((torch.ones(1), left[:-1]))


def train_flow(
    config: FlowConfig, sentences: list[Sentence], steps: int, work: Path
) -> dict[str, Tensor]:
    model = new_flow(config)
    plan = Plan(steps=steps, rate=2e-3, warm_up=100)
    times, left = left_of_noise()

    def loss(rng: random.Random, done: float) -> tuple[Tensor, Figures]:
        units, mel = draw(model, sentences, rng)
        mu = conditions(model, units, mel.shape[2])
        near = F.l1_loss(mu, mel)
        if done < ALONE:
            return near, {"mu": float(near.detach())}
        k = torch.tensor(rng.choices(range(STEPS), k=len(mel)))
        keep = (torch.rand(len(mel), 1, 1) > 0.1).float()  # the free estimate of guidance
        shown = prefix(mel, rng) * keep
        centre = (mu * keep).detach()
        noise = torch.randn_like(mel)
        x = centre + left[k, None, None] * (noise - centre)
        voice = model.voice(None)[:, :, None].expand(len(mel), -1, mel.shape[2])
        tau = model.decoder.estimator.time_vectors(times[k])
        known = torch.cat((mu * keep, voice * keep, shown), dim=1)
        field = model.decoder.estimator(x, known, tau)
        far = F.l1_loss(x + field / STRENGTH, mel)
        return near + far, {"mu": float(near.detach()), "mel": float(far.detach())}

    return fit("flow", model, plan, loss, work)


def conditions(model: Flow, units: Tensor, frames: int) -> Tensor:
    """[B, n] -> [B, M, frames]"""
    x = model.encoder_proj(model.encoder(model.input_embedding(units)))
    return model.length_regulator(x, frames).transpose(1, 2)


def draw(model: Flow, sentences: list[Sentence], rng: random.Random) -> tuple[Tensor, Tensor]:
    """-> units [B, n], mel [B, M, F(n)]: beginnings and ends of what is said, of one length, as no
    norm here may see padding; what is too short goes on with the next sentence."""
    count = rng.choice((10, 10, 20, 20, 20, 30, 30, 40))
    units, mels = [], []
    for _ in range(BATCH):
        some: list[int] = []
        pieces: list[Tensor] = []
        while len(some) < count:
            sentence = rng.choice(sentences)
            some += sentence.units
            pieces.append(sentence.mel)
        units.append(some[:count])
        mels.append(cut(pieces, model.frames(count)))
    return torch.tensor(units), torch.stack(mels)


def cut(pieces: list[Tensor], frames: int) -> Tensor:
    """-> [M, frames]; a sentence whose last unit is not whole frames keeps the beat with silence"""
    joined = torch.cat(pieces, 1)
    if joined.shape[1] < frames:
        joined = F.pad(joined, (0, frames - joined.shape[1]), mode="replicate")
    return joined[:, :frames]


def prefix(mel: Tensor, rng: random.Random) -> Tensor:
    """[B, M, T]: what was said before is shown in half of the cases"""
    shown = torch.zeros_like(mel)
    for row in range(len(mel)):
        if rng.random() < 0.5:
            upto = math.floor(rng.random() * 0.8 * mel.shape[2])
            shown[row, :, :upto] = mel[row, :, :upto]
    return shown

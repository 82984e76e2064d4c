"""Trains the vocoder: mel -> sound, by spectra alone, without an adversary."""

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnispeech.models.hift import HiFT, HiFTConfig
from training.answers import Sentence
from training.fitting import Figures, Plan, fit
from training.spectrum import HOP, log_mel, normalised
from training.voices import RATE_HZ

FRAMES = 32  # of a piece that is trained on
BATCH = 10
WINDOWS = (256, 512, 1024, 2048)
QUIETEST = 1e-3  # magnitude below which nothing is heard


def new_vocoder(config: HiFTConfig) -> HiFT:
    torch.manual_seed(11)
    model = HiFT(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            nn.init.ones_(parameter)
        elif parameter.dim() == 3 and not name.startswith("f0_predictor"):
            nn.init.normal_(parameter, std=0.7 / (parameter[0].numel() ** 0.5))
        elif name.endswith(".bias") and not name.startswith("f0_predictor"):
            nn.init.zeros_(parameter)
    for block in (*model.resblocks, *model.source_resblocks):
        for conv in block.convs2:
            conv.weight.data *= 0.3
    bins = config.n_fft // 2 + 1
    model.conv_post.weight.data *= 0.2
    assert model.conv_post.bias is not None
    model.conv_post.bias.data[:bins] = -3.0
    model.m_source.l_linear.weight.data.fill_(0.7)
    model.f0_predictor.classifier.bias.data.fill_(50.0)
    model.f0_predictor.classifier.weight.data *= 20.0
    return model


def train_vocoder(
    config: HiFTConfig, sentences: list[Sentence], steps: int, work: Path
) -> dict[str, Tensor]:
    model = new_vocoder(config)
    plan = Plan(steps=steps, rate=1.5e-3, betas=(0.8, 0.99), norm=5.0)
    usable = [s for s in sentences if s.mel.shape[1] > FRAMES]

    def loss(rng: random.Random, done: float) -> tuple[Tensor, Figures]:
        mel, f0, samples = draw(usable, rng)
        if done > 0.6:  # what the flow will leave of its noise
            mel = mel + torch.rand(BATCH, 1, 1) * 0.05 * torch.randn_like(mel)
        told = model.f0_predictor(mel)
        pitch = F.l1_loss(told, f0)
        source_f0 = f0 if rng.random() < 0.6 else told.detach()
        made = speak(model, mel, source_f0)
        spectral = spectral_loss(made, samples)
        mels = F.l1_loss(normalised(log_mel(made, RATE_HZ)), mel)
        total = spectral + mels + 0.02 * pitch
        return total, {
            "stft": float(spectral.detach()),
            "mel": float(mels.detach()),
            "f0": float(pitch.detach()),
        }

    return fit("vocoder", model, plan, loss, work)


def draw(sentences: list[Sentence], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """-> mel [B, M, FRAMES], f0 [B, FRAMES], samples [B, FRAMES HOP]"""
    mels, pitches, samples = [], [], []
    for sentence in rng.choices(sentences, k=BATCH):
        start = rng.randrange(sentence.mel.shape[1] - FRAMES + 1)
        mels.append(sentence.mel[:, start : start + FRAMES])
        pitches.append(sentence.f0[start : start + FRAMES])
        samples.append(sentence.samples[start * HOP : (start + FRAMES) * HOP])
    return torch.stack(mels), torch.stack(pitches), torch.stack(samples)


def speak(model: HiFT, mel: Tensor, f0: Tensor) -> Tensor:
    """mel [B, M, T], f0 [B, T] -> samples [B, T hop], with random phases and noise"""
    harmonics = model.config.nb_harmonics + 1
    phases = (torch.rand(len(mel), harmonics) * 2 - 1) * torch.pi
    phases[:, 0] = 0
    noise = torch.randn(len(mel), harmonics, f0.shape[1] * model.config.hop)
    return model(mel, model.m_source(f0, phases, noise, torch.rand(len(mel)).double()))


def spectral_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """[B, N] each: difference of log magnitudes and spectral convergence, over four windows"""
    total = made.new_zeros(())
    for size in WINDOWS:
        a, b = _magnitude(made, size), _magnitude(wanted, size)
        logs = F.l1_loss(a.clamp(min=QUIETEST).log(), b.clamp(min=QUIETEST).log())
        total = total + logs + (a - b).norm() / b.norm().clamp(min=1e-3)
    return total / len(WINDOWS)


def _magnitude(samples: Tensor, size: int) -> Tensor:
    spectrum = torch.stft(
        samples, size, size // 4, window=torch.hann_window(size), return_complex=True
    )
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()

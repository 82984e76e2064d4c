"""Makes tests/golden/wavlm-hearing: a WavLM of 60 000 weights that has learnt to hear a little.

python tools/make_hearing_wavlm.py DIRECTORY [STEPS]

A random WavLM says nothing about sound that a linear map could find, as the published one does. So
this one was taught to tell the log-mel spectrum, on the clips that ship with the project: those
alone that `omnispeech train-bridge` does not hold out. Six minutes on one core.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d
from transformers import WavLMConfig, WavLMModel

from omnispeech.audio.features import MelConfig, log_mel
from omnispeech.audio.resample import Samples
from omnispeech.bridge_training.clips import find_audio, split

MEL = MelConfig(feature_size=64)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 16,
}
DETERMINISTIC = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}
STEPS = 2600
BATCH = 8
FRAMES = 100  # of 20 ms, in a crop
HOP = 320  # samples of a frame
FIELD = 400  # samples that one frame is made of


def main(directory: Path, steps: int = STEPS) -> None:
    torch.manual_seed(0)
    clips = [next(file.clips()) for file in split(find_audio(None), 0.1, 0).fitted]
    model, head = WavLMModel(WavLMConfig(**SHAPE, **DETERMINISTIC)), nn.Linear(64, 64)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step, (samples, wanted) in enumerate(batches(clips, steps)):
        loss = (head(model(samples).last_hidden_state) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            sys.stdout.write(f"step {step}: {loss.item():.3f} of the variance is left\n")
    model.half().save_pretrained(directory)


def batches(clips: list[Samples], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Crops: samples [B, N], and the spectrum of their frames [B, T, M], each band standardised."""
    draw = np.random.default_rng(0)
    spectra = [spectrum(clip) for clip in clips]
    every = torch.cat(spectra)
    mean, scale = every.mean(0), every.std(0)
    long = [i for i, frames in enumerate(spectra) if len(frames) > FRAMES + 2]
    for _ in range(steps):
        chosen = [
            (i, draw.integers(len(spectra[i]) - FRAMES - 1)) for i in draw.choice(long, BATCH)
        ]
        end = (FRAMES - 1) * HOP + FIELD
        samples = np.stack([clips[i][at * HOP : at * HOP + end] for i, at in chosen])
        wanted = torch.stack([spectra[i][at : at + FRAMES] for i, at in chosen])
        yield torch.from_numpy(samples), (wanted - mean) / scale


def spectrum(clip: Samples) -> Tensor:
    """[N] -> [T, M], 50 frames a second"""
    mel = log_mel(clip, MEL)[:, : MEL.valid_frames(len(clip))]
    return avg_pool1d(mel[None], 2)[0].T


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

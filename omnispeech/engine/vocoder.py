"""One reply: speech units in, block by block; samples out. All its state is in its stream."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from omnispeech.config import DecoderConfig
from omnispeech.engine.noise import Noise, OriginalNoise, StreamNoise
from omnispeech.errors import GenerationError
from omnispeech.models.flow import Solver
from omnispeech.models.hift import HiFT
from omnispeech.models.speech_decoder import SpeechDecoder

SOURCE_CACHE = 256  # samples that the compatible mode carries from block to block


def open_stream(
    decoder: SpeechDecoder, config: DecoderConfig, seed: int, noise: Noise | None = None
) -> "VocoderStream":
    """`seed` is not used in the compatible mode; `noise` takes the place of random numbers."""
    if config.streaming == "compatible":
        return CompatibleStream(decoder, config, noise or OriginalNoise(decoder))
    return CorrectedStream(decoder, config, noise or StreamNoise(decoder, seed))


class VocoderStream(ABC):
    overlap: int  # frames held back, to be blended with the next block

    def __init__(self, decoder: SpeechDecoder, config: DecoderConfig, noise: Noise) -> None:
        self.decoder = decoder
        self.noise = noise
        self._solver = solver_of(decoder, config)
        self._pushed = 0  # units
        self._decoded = 0  # frames the flow has made of them
        self._ids: list[int] = []  # the units the next block is made of or conditioned on
        self._finished = False

    @property
    def units(self) -> int:
        return self._pushed

    @property
    def context(self) -> int:
        """Units that the next block will be decoded together with."""
        return len(self._ids)

    def push(self, units: Sequence[int], final: bool) -> Tensor:
        """-> samples [N] on the CPU, possibly none; after `final` there is no more to come.

        A block that leaves nothing beyond the overlap waits for the next one.
        """
        if self._finished:
            raise GenerationError("units arrived after the last block of the reply")
        vocabulary = self.decoder.flow.config.vocab_size
        if units and max(units) >= vocabulary:
            raise GenerationError(f"unit {max(units)} is not below {vocabulary}, the vocabulary")
        self._ids.extend(units)
        self._pushed += len(units)
        self._finished = final
        frames = self.decoder.flow.frames(self._pushed)
        if not final and frames <= max(self._decoded, self.overlap):
            return torch.empty(0)
        with torch.inference_mode():
            samples = self._decode(frames, final)[0].float().cpu()
        self._decoded = frames
        # Not an inference tensor: the caller may write into it.
        return samples.clone()

    @abstractmethod
    def _decode(self, frames: int, final: bool) -> Tensor:
        """`frames` mel frames in all up to now -> samples [1, N]"""


def solver_of(decoder: SpeechDecoder, config: DecoderConfig) -> Solver:
    return decoder.flow.solver(
        steps=config.euler_steps,
        schedule=None if config.schedule == "checkpoint" else config.schedule,
        guidance=None if config.guidance == -1.0 else config.guidance,
    )


class CorrectedStream(VocoderStream):
    """No frame is lost, blends keep the level, the sound goes on through the seams."""

    def __init__(self, decoder: SpeechDecoder, config: DecoderConfig, noise: Noise) -> None:
        super().__init__(decoder, config, noise)
        self.overlap = config.overlap_frames
        self._context = config.context_tokens
        self._first_unit = 0  # of _ids
        self._first_frame = 0  # of _mel
        self._mel = _no_frames(decoder)  # [1, M, T], final frames
        self._ahead = _no_frames(decoder)  # [1, M, overlap], not final yet
        self._vocoder = WindowedVocoder(decoder.hift, noise)

    def _decode(self, frames: int, final: bool) -> Tensor:
        new = self._ahead
        if frames > self._decoded:
            new = raised_cosine_blend(self._ahead, self._new_mel(frames))
        settled = new.shape[2] if final else new.shape[2] - self.overlap
        mel, self._ahead = new[:, :, :settled], new[:, :, settled:].clone()
        self._mel = torch.cat((self._mel, mel), dim=2)
        self._forget(frames)
        return self._vocoder.speak(mel, self._ahead)

    def _new_mel(self, frames: int) -> Tensor:
        """-> [1, M, T], the frames from the first that is not final"""
        window = self.decoder.flow.frames(len(self._ids))
        first = frames - window  # the window ends where the reply does
        prompt = self._mel[:, :, first - self._first_frame :]
        return self.decoder.flow(self._ids, self.noise.start(first, window), self._solver, prompt)

    def _forget(self, frames: int) -> None:
        """Drops what lies before the context of the next block."""
        first_unit = self._first_context_unit(frames)
        first_frame = self.decoder.flow.frames(first_unit)
        self._ids = self._ids[first_unit - self._first_unit :]
        self._mel = self._mel[:, :, first_frame - self._first_frame :].clone()
        self._first_unit, self._first_frame = first_unit, first_frame

    def _first_context_unit(self, frames: int) -> int:
        """A window that starts here starts at its first frame or one later."""
        if not self._context:
            return 0
        flow = self.decoder.flow
        block = flow.config.encoder.block_size
        unit = max(0, self._pushed - self._context) // block * block
        while unit and flow.frames(unit) + 1 > frames - self.overlap:
            unit -= block
        return max(unit, self._first_unit)


class WindowedVocoder:
    """HiFT over the new frames with enough history for what one long run would have given."""

    def __init__(self, hift: HiFT, noise: Noise) -> None:
        self._hift = hift
        self._noise = noise
        self._history = hift.config.filter_reach + hift.config.f0_reach  # frames
        self._spoken = 0  # frames
        weight = hift.conv_pre.weight
        self._mel = weight.new_zeros(1, hift.config.in_channels, 0)  # the last ones spoken
        self._source = weight.new_zeros(1, 1, 0)  # of those frames
        self._cycles = torch.zeros(1, dtype=torch.float64, device=weight.device)

    def speak(self, mel: Tensor, ahead: Tensor) -> Tensor:
        """mel [1, M, T], ahead [1, M, A] -> samples [1, T hop]

        `ahead` are the frames to the right as far as they are known; they are not spoken.
        """
        hop = self._hift.config.hop
        if not mel.shape[2]:
            return mel.new_zeros(1, 0)
        start, stop = self._mel.shape[2], self._mel.shape[2] + mel.shape[2]
        window = torch.cat((self._mel, mel, ahead), dim=2)
        f0 = self._hift.f0_predictor(window)[:, start:]
        noise = self._noise.sines(self._spoken * hop, f0.shape[1] * hop)
        new = self._hift.m_source(f0, self._noise.phases(), noise, self._cycles)
        source = torch.cat((self._source, new), dim=2)
        samples = self._hift(window, source)[:, start * hop : stop * hop]

        self._cycles = self._hift.m_source.cycles_after(f0[:, : mel.shape[2]], self._cycles)
        self._spoken += mel.shape[2]
        kept = max(0, stop - self._history)
        self._mel = window[:, :, kept:stop].clone()
        self._source = source[:, :, kept * hop : stop * hop].clone()
        return samples


class CompatibleStream(VocoderStream):
    """The original's rules with their defects: for comparison, and for nothing else.

    One frame is lost per block from the third on, the level rises by up to 8 % where blocks are
    blended, the phase starts again in every block, and a reply that ends with a whole block
    loses what was held back.
    """

    def __init__(self, decoder: SpeechDecoder, config: DecoderConfig, noise: Noise) -> None:
        super().__init__(decoder, config, noise)
        self.overlap = decoder.flow.frames(5)
        self._prompt = _no_frames(decoder)  # [1, M, P], every frame given to the vocoder
        self.ahead = _no_frames(decoder)  # [1, M, overlap]
        self.last_frame = _no_frames(decoder)  # [1, M, 1]
        self.last_source = self._prompt.new_zeros(1, 1, 0)  # [1, 1, N]

    def _decode(self, frames: int, final: bool) -> Tensor:
        hift = self.decoder.hift
        if frames <= self._decoded:
            return self._prompt.new_zeros(1, 0)
        noise = self.noise.start(0, frames)
        new = self.decoder.flow(self._ids, noise, self._solver, self._prompt)
        mel = torch.cat((self.last_frame, hamming_blend(self.ahead, new)), dim=2)
        if not final:
            mel, self.ahead = mel[:, :, : -self.overlap], mel[:, :, -self.overlap :]
        f0 = hift.f0_predictor(mel)
        phases = self.noise.phases()
        source = hift.m_source(f0, phases, self.noise.sines(0, f0.shape[1] * hift.config.hop))
        source = torch.cat((self.last_source, source[:, :, self.last_source.shape[2] :]), dim=2)
        samples = hift(mel, source)
        self._prompt = torch.cat((self._prompt, mel), dim=2)
        if final:
            return samples
        self.last_frame, self.last_source = mel[:, :, -1:], source[:, :, -SOURCE_CACHE:]
        return samples[:, :-SOURCE_CACHE]


def _no_frames(decoder: SpeechDecoder) -> Tensor:
    """-> [1, M, 0]"""
    return torch.zeros(1, decoder.flow.config.output_size, 0, device=decoder.device)


def raised_cosine_blend(old: Tensor, new: Tensor) -> Tensor:
    """old [1, M, A], new [1, M, T] -> [1, M, T]; the weights sum to one in every frame."""
    length = old.shape[2]
    at = torch.arange(length, device=new.device) + 0.5
    rising = 0.5 - 0.5 * torch.cos(at * (math.pi / max(1, length)))
    return torch.cat((torch.lerp(old, new[:, :, :length], rising), new[:, :, length:]), dim=2)


def hamming_blend(old: Tensor, new: Tensor) -> Tensor:
    """old [1, M, A], new [1, M, T] -> [1, M, T]; the weights sum to 1.06 to 1.08."""
    length = old.shape[2]
    if not length:
        return new
    window = torch.hamming_window(
        2 * length, periodic=False, dtype=torch.float64, device=new.device
    )
    blended = new[:, :, :length] * window[:length] + old * window[length:]
    return torch.cat((blended.to(new.dtype), new[:, :, length:]), dim=2)

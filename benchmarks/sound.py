"""M4: prompts in which a model reads text, hears how it goes on, and reads on.

Sound is bytes too, but as a frozen random encoder and adapter give them: vectors of another scale,
mixed over time, with outliers in channels of their own. The text after it continues what was heard.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.corpus import VOCABULARY, Part, pieces
from benchmarks.outliers import Outliers, factors

LOUDNESS = 8.0  # root mean square of a vector's channels, times that of the embeddings
SPEECH_OUTLIERS = Outliers(sigma=0.6, times=12.0, share=0.02, seed=77)
REACH = (0.7, 0.5, 0.5)  # of a frame: its own byte and the two in front of it


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Sequences in which one stretch of 30 to 70 % is heard, not read."""

    ids: Tensor  # [B, T]
    targets: Tensor  # [B, T] the byte after each
    sound: Tensor  # [B, T] bool
    after: Tensor  # [B, T] bool: text behind the sound


def mixture(part: Part, count: int, length: int, seed: int) -> Mixture:
    whole = pieces(part, count, length + 1, seed)  # [B, T + 1]
    generator = torch.Generator().manual_seed(seed + 1)
    share = 0.3 + 0.4 * torch.rand(count, 1, generator=generator)
    before = (1 - share) / 2  # as much text in front as behind
    place = torch.arange(length) / length  # [T]
    after = place >= before + share
    return Mixture(whole[:, :-1], whole[:, 1:], (place >= before) & ~after, after)


class Ear:
    """Frozen: byte -> vector [D], as an encoder and an adapter would make it."""

    def __init__(self, width: int, embedding_scale: float) -> None:
        generator = torch.Generator().manual_seed(SPEECH_OUTLIERS.seed)
        self._table = torch.randn(VOCABULARY, width, generator=generator)
        c = factors(width, SPEECH_OUTLIERS, generator)
        self._channels = c * (LOUDNESS * embedding_scale / c.square().mean().sqrt())

    def hear(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        own = self._table[ids]
        shifted = [torch.roll(own, shift, dims=1) * w for shift, w in enumerate(REACH)]
        return torch.stack(shifted).sum(0) * self._channels

    def splice(self, mixed: Mixture, embedded: Tensor) -> Tensor:
        """Embeddings [B, T, D] with the sound in its place."""
        return torch.where(mixed.sound[..., None], self.hear(mixed.ids), embedded)

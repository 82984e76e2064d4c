"""What the quantizer listens to: sequences of vectors as the language model reads them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnispeech.calibration.items import Conversation, Item, PlainText
from omnispeech.calibration.tokens import TextTokens
from omnispeech.checkpoint.language import LanguageFiles
from omnispeech.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    vectors: Tensor  # [T, D] what the first layer reads: embeddings, or sound spliced into them
    counted: Tensor  # [T] bool: tokens that statistics and losses are taken over


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Calibration:
    samples: tuple[Sample, ...]
    tokens: Mapping[str, int]  # counted tokens of each kind: text, audio, ...
    sources: tuple[str, ...]  # where they are from, for the report
    digest: str  # sha256 of everything above: a run is only continued with the same
    seq_len: int | None = None  # most positions that a sample could have; None: no limit


class Collector:
    """Cuts sequences to length and takes them up to a number of positions.

    Nothing is padded. A position counts unless an earlier sequence was the same up to it and
    including it, as in the system message that opens every prompt: a causal model computes the
    same there, so it would only weigh more. A piece in which nothing counts is left out.
    """

    def __init__(self, *, seq_len: int, max_tokens: int) -> None:
        """seq_len: most positions of one sample; max_tokens: of all samples together.

        Raises ConfigError if one of them is less than 1.
        """
        for name, value in (("seq_len", seq_len), ("max_tokens", max_tokens)):
            if value < 1:
                raise ConfigError(f"{name}={value}; allowed: 1 or more")
        self.room = max_tokens  # positions that may still come
        self._seq_len = seq_len
        self._samples: list[Sample] = []
        self._tokens: Counter[str] = Counter()
        self._pasts: set[bytes] = set()

    def add(self, vectors: Tensor, kinds: Sequence[str]) -> None:
        """[T, D] of one sequence, and what each position is: text, audio, ..."""
        assert len(vectors) == len(kinds), (len(vectors), len(kinds))
        for start in range(0, min(len(vectors), self.room), self._seq_len):
            stop = min(start + self._seq_len, start + self.room, len(vectors))
            self._take(vectors[start:stop], kinds[start:stop])

    def finish(self, sources: Iterable[str]) -> Calibration:
        """`sources`: of everything that was offered. Raises ConfigError if nothing was taken."""
        if not self._samples:
            raise ConfigError(
                "the calibration data has no tokens; give texts or conversations that are not empty"
            )
        return Calibration(
            samples=tuple(self._samples),
            tokens=dict(sorted(self._tokens.items())),
            sources=tuple(dict.fromkeys(sources)),
            digest=_digest(self._samples),
            seq_len=self._seq_len,
        )

    def _take(self, vectors: Tensor, kinds: Sequence[str]) -> None:
        vectors = vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
        counted = self._not_seen_before(vectors)
        if not counted.any():
            return
        self.room -= len(vectors)
        self._tokens.update(kind for kind, yes in zip(kinds, counted.tolist(), strict=True) if yes)
        self._samples.append(Sample(vectors, counted))

    def _not_seen_before(self, vectors: Tensor) -> Tensor:
        """[T, D] -> [T] bool"""
        past = hashlib.blake2b(digest_size=16)
        pasts = []
        for row in vectors.numpy():
            past.update(row)
            pasts.append(past.digest())
        counted = torch.tensor([p not in self._pasts for p in pasts], dtype=torch.bool)
        self._pasts.update(pasts)
        return counted


def text_calibration(
    source: LanguageFiles,
    texts: Iterable[str | Sequence[int] | Item],
    *,
    seq_len: int,
    max_tokens: int,
    max_samples: int | None = None,
) -> Calibration:
    """Texts, lists of token ids, or items as `source` would read them (spec: quantization 2.2).

    A conversation goes through the model's chat template if it has one; of sound in it the
    transcript is read. Long texts are cut into samples of `seq_len`, never dropped. Kinds: text,
    and template for the control tokens. Raises ConfigError, with where it stands, for what cannot
    be read.
    """
    tokens = TextTokens(source.directory)
    collector = Collector(seq_len=seq_len, max_tokens=max_tokens)
    sources = []
    for number, text in enumerate(texts):
        if not collector.room or number == max_samples:
            break
        ids = _ids(tokens, text, number)[: collector.room]
        if ids:
            kinds = ["template" if i in tokens.control else "text" for i in ids]
            collector.add(source.embed(torch.tensor(ids)), kinds)
        sources.append(_origin(text))
    return collector.finish(sources)


def _ids(tokens: TextTokens, text: str | Sequence[int] | Item, number: int) -> list[int]:
    if isinstance(text, Conversation):
        return tokens.of_conversation(text)
    if isinstance(text, PlainText):
        return tokens.of_text(text.text)
    if isinstance(text, str):
        return tokens.of_text(text)
    size = tokens.size
    if wrong := [i for i in text if type(i) is not int or not 0 <= i < size]:
        raise ConfigError(
            f"sample {number} of the calibration list has the token id {wrong[0]!r}; allowed: "
            f"0 to {size - 1}"
        )
    return list(text)


def _origin(text: str | Sequence[int] | Item) -> str:
    """The file an item is from, without the line."""
    if isinstance(text, Conversation | PlainText):
        return text.source.rpartition(":")[0]
    return "a list of the caller"


def _digest(samples: Sequence[Sample]) -> str:
    """Of shapes, vectors and masks: sources and kinds do not change what is computed."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(tuple(sample.vectors.shape)).encode())
        digest.update(sample.vectors.numpy().tobytes())
        digest.update(sample.counted.numpy().tobytes())
    return digest.hexdigest()

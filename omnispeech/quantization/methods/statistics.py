"""What a linear hears: first and second moments of its inputs over the counted tokens."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from omnispeech.errors import CheckpointError, ConfigError
from omnispeech.models.qwen3 import Block
from omnispeech.quantization.methods.branches import Branch
from omnispeech.quantization.methods.grid import Rule, few_rows
from omnispeech.quantization.stream import Stream


class Moments:
    """Of the inputs x of one linear; nothing is kept that grows with the number of tokens."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self.magnitude = torch.zeros(width, device=device)  # [K] E|x|
        self.gram = torch.zeros(width, width, device=device)  # [K, K] E[x x^T]

    def add(self, x: Tensor) -> None:
        """x: [T, K]"""
        self.tokens += len(x)
        self.magnitude += x.abs().sum(0)
        self.gram.addmm_(x.T, x)

    def finish(self, name: str) -> None:
        """Sums become means. CheckpointError names the first channel that is not finite."""
        if not self.tokens:
            raise ConfigError(f"no calibration token is counted at {name}; check the token mask")
        self.magnitude /= self.tokens
        self.gram /= self.tokens
        # squares overflow first, and one bad channel spoils its whole row of the Gram matrix
        bad = ~(self.magnitude.isfinite() & self.gram.diagonal().isfinite())
        if bad.any():
            channel = int(bad.nonzero()[0])
            raise CheckpointError(
                f"the input of {name} is not finite at channel {channel} "
                f"({int(bad.sum())} of {len(bad)} channels); "
                "the weights in front of it or the calibration data are damaged"
            )

    def divide(self, scales: Tensor) -> None:
        """The moments of x / scales: [K]"""
        self.magnitude /= scales
        self.gram /= scales
        self.gram /= scales[:, None]

    @property
    def energy(self) -> Tensor:
        """[K] E[x^2]"""
        return self.gram.diagonal()


def observe(
    block: Block, branch: Branch, stream: Stream, names: Sequence[str]
) -> dict[str, Moments]:
    """Moments of the inputs of some linears of a branch, in one pass over the tokens.

    Sums grow sequence by sequence: summed batch by batch their last bits would follow the size of
    the micro-batch, and rounding with compensation makes other codes of that.
    """
    lengths: list[int] = []
    counted = torch.empty(0)
    moments: dict[str, Moments] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear)
        moments[name] = Moments(module.in_features, module.weight.device)

        def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            parts = torch.split(inputs[0], lengths)
            for x, own in zip(parts, torch.split(counted, lengths), strict=True):
                moments[name].add(x[own])

        return module.register_forward_pre_hook(hear)

    handles = [watch(name) for name in names]
    try:
        for batch in stream.batches():
            state = branch.enter(block, batch)
            for tokens, inside in branch.shares(batch):
                lengths, counted = inside, batch.counted[tokens]
                branch.run(block, batch, state[tokens])
            del state  # before the next is made
    finally:
        for handle in handles:
            handle.remove()
    for name, found in moments.items():
        found.finish(name)
    return moments


def output_energy(w: Tensor, gram: Tensor) -> Tensor:
    """[N] mean square of each output of weights [N, K]: diag(w gram w^T)."""
    return torch.cat([(rows @ gram).mul_(rows).sum(1) for rows in few_rows(w)])


def relative_losses(
    w: Tensor, result: Tensor, gram: Tensor, columns: Tensor, rule: Rule
) -> tuple[float, float]:
    """Squared output error of `result` and of plain rounding, over the energy of the output.

    w, result: [N, K] in the channels of the source; gram: of inputs divided by columns [K].
    """
    pairs = zip(few_rows(w), few_rows(result), strict=True)
    return losses_of_rows(pairs, gram, columns, rule)


def losses_of_rows(
    pairs: Iterable[tuple[Tensor, Tensor]], gram: Tensor, columns: Tensor, rule: Rule
) -> tuple[float, float]:
    """The same, of some rows of the true weight and of the result at a time."""
    energy = loss = nearest = 0.0
    for true, result in pairs:
        plain = rule.widest(true).nearest(true)
        energy += float(output_energy(true * columns, gram).sum())
        loss += float(output_energy((result - true).mul_(columns), gram).sum())
        nearest += float(output_energy(plain.sub_(true).mul_(columns), gram).sum())
    floor = max(energy, 1e-30)
    return loss / floor, nearest / floor


def check_weights(block: Block) -> None:
    """CheckpointError names the first parameter and channel that is not finite."""
    for name, parameter in block.named_parameters():
        bad = ~parameter.isfinite()
        if bad.any():
            channel = int(bad.nonzero()[0, -1])
            raise CheckpointError(f"{name} is not finite at channel {channel}: the file is damaged")

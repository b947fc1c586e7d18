"""The order in which a run sees its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Row numbers of one epoch; a function of seed and epoch alone, so that a resumed run sees the same rows.

    Args:
        rows: Number of rows, ``N``.
        batch: Rows of one optimizer step, over all processes.
        seed: Of the order.
        lengths: ``[N]`` tokens a row: batches are made of rows of like length, in random order, the longest
            first so that memory runs out at once or never.
        weights: ``[N]`` chances: ``N`` rows are drawn with replacement.
    """

    def __init__(
        self,
        rows: int,
        batch: int,
        seed: int,
        *,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.rows, self.batch, self.seed = rows, batch, seed
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is not None:
            order = torch.multinomial(self.weights, self.rows, replacement=True, generator=generator)
        else:
            order = torch.randperm(self.rows, generator=generator)
        if self.lengths is not None and self.rows > self.batch:
            order = self._grouped(order, generator)
        return iter(order.tolist())

    def _grouped(self, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert self.lengths is not None
        full = self.rows // self.batch * self.batch
        pool = self.batch * 50
        batches: list[torch.Tensor] = []
        for start in range(0, full, pool):
            some = order[start : min(start + pool, full)]
            some = some[self.lengths[some].argsort(stable=True)]
            batches += torch.split(some, self.batch)
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        lengths = self.lengths
        longest = max(range(len(shuffled)), key=lambda i: int(lengths[shuffled[i]].max()))
        shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        return torch.cat([*shuffled, order[full:]])

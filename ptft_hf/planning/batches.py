"""The batches that a run will see, by its own sampler, and which of them are the largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptft_hf import rounding

MOST_ROWS = 2_000_000
"""Of an order that is drawn out; what a longer run sees beyond it is like what it has seen."""


class Batch(NamedTuple):
    """Rows of one forward and backward pass."""

    rows: tuple[int, ...]
    width: int
    """Tokens to which they are padded."""
    more: int = 0
    """Tokens that an encoder-decoder's labels are padded to."""

    @property
    def size(self) -> int:
        """Padded tokens."""
        return len(self.rows) * (self.width + self.more)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.rows), self.width, self.more


class Schedule(NamedTuple):
    """Which batches a run sees.

    Attributes:
        steps: Optimizer steps of the run.
        micro: Batches in a step (``gradient_accumulation_steps``, or all of an epoch if these are fewer).
        batches: In their order, up to :data:`MOST_ROWS`.
        epochs: Passes over the training rows.
        passes: Batches of the run; an epoch's last step may have fewer than the others.
    """

    steps: int
    micro: int
    batches: list[Batch]
    epochs: float
    passes: int

    @property
    def first(self) -> Batch:
        """The largest of the first step, before which an optimizer has no state."""
        return max(self.batches[: self.micro], key=lambda batch: batch.size)

    @property
    def later(self) -> Batch | None:
        """The largest of all further steps."""
        return max(self.batches[self.micro :], key=lambda batch: batch.size, default=None)

    @property
    def longest(self) -> Batch:
        """The largest of all."""
        return max(self.batches, key=lambda batch: batch.size)

    @property
    def typical(self) -> Batch:
        """The median one."""
        return sorted(self.batches, key=lambda batch: batch.size)[len(self.batches) // 2]

    def largest_up_to(self, width: int) -> Batch | None:
        """The largest of no more than so many tokens."""
        return max((b for b in self.batches if b.width <= width), key=lambda batch: batch.size, default=None)

    @property
    def shapes(self) -> int:
        """How many batches are unlike all others in shape."""
        return len({batch.shape for batch in self.batches})

    @property
    def sizes(self) -> float:
        """Padded tokens of all batches of the run."""
        seen = sum(batch.size for batch in self.batches)
        return seen * self.passes / len(self.batches)


def schedule(trainer: Any) -> Schedule:
    """The schedule of a run, of its Trainer."""
    args, rows = trainer.args, trainer.train_dataset
    size = args.train_batch_size
    in_epoch = math.ceil(len(rows) / (size * args.world_size))
    in_epoch = in_epoch if not args.dataloader_drop_last else max(1, len(rows) // (size * args.world_size))
    micro = min(args.gradient_accumulation_steps, in_epoch)
    steps_in_epoch = math.ceil(in_epoch / micro)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_in_epoch)
    whole, rest = divmod(steps, steps_in_epoch)
    passes = whole * in_epoch + rest * micro
    lengths, others = rows["length"][:], _label_lengths(trainer)
    rounds = isinstance(trainer.data_collator, rounding.RoundedLengths)
    longest = max(lengths)
    batches: list[Batch] = []
    epoch = 0
    while len(batches) < passes and (not batches or epoch * len(rows) < MOST_ROWS):
        order = _order(trainer, epoch)
        for start in range(0, len(order), size):
            some = tuple(order[start : start + size])
            width = max(lengths[row] for row in some)
            if rounds:
                width = min(rounding.up(width), longest)
            batches.append(Batch(some, width, max(others[row] for row in some) if others else 0))
        epoch += 1
    return Schedule(steps, micro, batches[:passes], steps / steps_in_epoch, passes)


def _order(trainer: Any, epoch: int) -> list[int]:
    """Row numbers of an epoch; in order where upstream's own sampler makes batches of no fixed size."""
    sampler = trainer._get_train_sampler()
    if trainer.args.train_sampling_strategy == "batch_rebalance" or sampler is None:
        return list(range(len(trainer.train_dataset)))
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return list(sampler)


def _label_lengths(trainer: Any) -> Sequence[int] | None:
    """Tokens of each row's labels, where a decoder reads them."""
    rows = trainer.train_dataset
    if "labels" not in rows.column_names or not getattr(trainer.model.config, "is_encoder_decoder", False):
        return None
    labels = rows["labels"][:]
    return [len(row) for row in labels] if isinstance(labels[0], list) else None


def longest_evaluated(rows: Any, count: int) -> list[int]:
    """Numbers of the longest rows, which are evaluated together."""
    lengths = rows["length"][:]
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count]

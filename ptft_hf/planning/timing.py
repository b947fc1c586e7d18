"""From a run's sums, or from steps that were probed, to the time that it will take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ptft_hf.planning.batches import Batch
from ptft_hf.planning.counting import Counted
from ptft_hf.planning.machine import Speed
from ptft_hf.planning.sums import Sums


class Rates(NamedTuple):
    """What a step takes of a machine's speed."""

    products: float
    """Times the seconds that products of matrices would take at the speed of a large one."""
    moving: float
    """Times the seconds that what operations read and write would take at the speed of a large sum."""
    operation: float
    """Seconds of each operation beside, on a CPU mostly Python's."""


CPU = Rates(products=1.3, moving=0.5, operation=20e-6)
"""Rough, by a few runs of small encoders; a probe is for who needs to know."""


class Line(NamedTuple):
    """Seconds of a batch: ``start + each * padded tokens``."""

    start: float
    each: float

    def of(self, size: float, count: float = 1.0) -> float:
        """Seconds of so many batches with so many padded tokens in all."""
        return self.start * count + self.each * size


def of_counts(sums: Sums, speed: Speed, rates: Rates = CPU) -> Line:
    """By what the run's usual batches compute: those whose attention is like most rows'."""
    plan = sums.schedule
    counted, batch = sums.first, plan.first
    start = rates.operation * counted.operations + seconds(sums.stepping, speed, rates)
    return Line(start, (seconds(counted, speed, rates) - rates.operation * counted.operations) / batch.size)


def seconds(counted: Counted, speed: Speed, rates: Rates = CPU) -> float:
    """Of what was counted, at this speed."""
    return (
        rates.products * counted.flops / speed.flops
        + rates.moving * counted.moved / speed.bandwidth
        + rates.operation * counted.operations
    )


def through(one: tuple[Batch, float], other: tuple[Batch, float]) -> Line:
    """By two batches whose seconds were measured; by their mean, if they are of like size, and by the first alone, if
    the larger took no longer."""
    (small, quick), (large, slow) = sorted((one, other), key=lambda pair: pair[0].size)
    if large.size < 1.2 * small.size:
        return Line(0.0, (quick + slow) / (small.size + large.size))
    if slow <= quick:
        batch, taken = one
        return Line(0.0, taken / batch.size)
    each = (slow - quick) / (large.size - small.size)
    start = quick - each * small.size
    return Line(start, each) if start >= 0 else Line(0.0, quick / small.size)


def training(sums: Sums, line: Line) -> float:
    """Seconds from the first batch to the end of the last step."""
    plan = sums.schedule
    return line.of(plan.sizes, plan.passes)


def probed(sums: Sums, found: Mapping[str, Any]) -> float:
    """Seconds of training by a probe's steps, by what it took to compute its frozen layers once, and by what a new
    shape of batches took in half precision: in float32 no code is made for it, and what it takes more is chance."""
    plan = sums.schedule
    line = through((plan.typical, found["typical_seconds"]), (plan.longest, found["longest_seconds"]))
    filling = found["filling_seconds"] / found["filled_tokens"] if found["filled_tokens"] else 0.0
    in_epoch = plan.sizes / max(1.0, plan.epochs)
    shapes = max(0, plan.shapes - 1) if sums.half else 0
    new: float = found["first_seconds"] + found["shape_seconds"] * shapes
    return training(sums, line) + new + filling * in_epoch

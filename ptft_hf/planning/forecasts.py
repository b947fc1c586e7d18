"""A run's forecast: what it will take, and what to change if that is more than there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptft_hf.planning import memory, timing
from ptft_hf.planning.memory import Stage
from ptft_hf.planning.sums import Sums

TOKENIZER_FILES = 2_000_000
"""Bytes of what lies in a checkpoint beside weights and optimizer: a tokenizer, mostly."""
ERROR = 1.2
"""How many times its forecast a run may take; the worst of those in ``benchmarks/planning/REPORT.md`` took less."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will take; bytes and seconds.

    Attributes:
        stages: Bytes of each term at the peak of each stage: loading, training, evaluation, proof; of PPO loading,
            answers, reading, learning, proof.
        peak: The most that the process holds until training has ended: what ``peak_memory_mb`` of ``run.json`` is.
        peak_in_all: The same with the proof, for which the model is there twice.
        seconds: Of training, evaluation and saving left out; None where the machine's speed is not known.
        disk: Of the output folder at its fullest: the final model, and checkpoints, one of them in the making.
        steps: Optimizer steps.
        longest: Rows and tokens of the largest batch.
        probed: Whether the run's largest batch has been tried.
        counted: Of a probed run, the peak that was forecast before.
        limit: Bytes that the process may hold; None if that is not known.
        advice: Changes that would make it fit, with the peak of each; empty if it fits.
        notes: What the forecast does not know.
    """

    stages: dict[str, Stage]
    peak: int
    peak_in_all: int
    seconds: float | None
    disk: dict[str, int]
    steps: int
    longest: tuple[int, int]
    probed: bool = False
    counted: int | None = None
    limit: int | None = None
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all of the run, the proof too, stays within the limit, as far as that is known."""
        return self.limit is None or self.peak_in_all <= self.limit

    @property
    def is_close(self) -> bool:
        """Whether it fits, but would not if it took as much more as the worst forecasts were wrong by."""
        return self.limit is not None and self.peak_in_all <= self.limit < ERROR * self.peak_in_all

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as ``run.json`` has them."""
        return {
            "peak_memory_mb": self.peak / 1e6,
            "peak_memory_mb_with_proof": self.peak_in_all / 1e6,
            "stages_mb": {
                name: {term: round(size / 1e6, 1) for term, size in terms.items() if size}
                for name, terms in self.stages.items()
            },
            "seconds": self.seconds,
            "disk_mb": {name: round(size / 1e6, 1) for name, size in self.disk.items()},
            "steps": self.steps,
            "longest_batch": list(self.longest),
            "probed": self.probed,
            "counted_peak_memory_mb": None if self.counted is None else self.counted / 1e6,
            "limit_mb": None if self.limit is None else self.limit / 1e6,
            "fits": self.fits,
            "advice": [dataclasses.asdict(one) for one in self.advice],
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change of a run, and the peak that it would have then."""

    change: str
    peak: int
    fits: bool


def forecast(
    sums: Sums,
    arguments: Any,
    baseline: int,
    *,
    calibration: memory.Calibration = memory.FLOAT,
    line: timing.Line | None = None,
    reads: int = 0,
    limit: int | None = None,
) -> Forecast:
    """The forecast of a run.

    Args:
        sums: What was counted of it.
        arguments: Its ``TrainingArguments``.
        baseline: Bytes of its process before there is a model.
        calibration: Of its device and precision.
        line: Seconds of its batches.
        reads: See :func:`ptft_hf.planning.memory.stages`.
        limit: Bytes that it may hold.
    """
    found = memory.stages(sums, baseline, calibration, reads)
    batch = sums.schedule.longest
    return Forecast(
        found,
        memory.peak(found),
        memory.peak(found, proof=True),
        None if line is None else timing.training(sums, line),
        disk(sums, arguments),
        sums.schedule.steps,
        (len(batch.rows), batch.width),
        limit=limit,
    )


def with_probe(before: Forecast, sums: Sums, found: Mapping[str, Any]) -> Forecast:
    """Corrected by what a probe of the same run has measured: its peak stands for that of training, with what a
    probe does not have: all shapes of batches, and the frozen layers' activations of all rows."""
    terms = before.stages["training"]
    more = terms.get(memory.CACHE, 0)
    shapes = sums.schedule.shapes
    more += round(terms.get(memory.KERNELS, 0) * max(0, shapes - found["shapes"]) / max(1, shapes))
    measured = {"measured by the probe": int(found["peak_memory_mb"] * 1e6), "not in the probe": more}
    stages = {**before.stages, "training": measured}
    return dataclasses.replace(
        before,
        stages=stages,
        peak=memory.peak(stages),
        peak_in_all=memory.peak(stages, proof=True),
        seconds=timing.probed(sums, found),
        probed=True,
        counted=before.peak,
    )


def disk(sums: Sums, arguments: Any) -> dict[str, int]:
    """Bytes of the final model, of the checkpoints that are kept, and of the one that is being written."""
    found = {"model": sums.saved + TOKENIZER_FILES}
    if arguments.save_strategy == "no":
        return found
    one = sums.saved + sums.optimizer + TOKENIZER_FILES
    steps, epochs = sums.schedule.steps, sums.schedule.epochs
    every = arguments.save_steps * steps if arguments.save_steps < 1 else arguments.save_steps
    saves = max(1, int(epochs) if arguments.save_strategy == "epoch" else int(steps / max(1.0, every)))
    # The best one is kept beside the newest.
    kept = max(arguments.save_total_limit or saves, 2 if arguments.load_best_model_at_end else 1)
    return {**found, "checkpoints": one * min(saves, kept), "being written": one}

"""Some steps of a run, tried in a process of their own, whose peak of memory is theirs alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import transformers

from ptft_hf import building, checkpoints, models, preparing, recipes, records
from ptft_hf.errors import ModelError
from ptft_hf.planning.batches import Batch
from ptft_hf.planning.sums import Sums

LONGEST, TYPICAL = 2, 6
"""Steps with each batch, of the latter at most: the first finds no optimizer state or no code for its shapes, what
follows is timed."""
ENOUGH = 3.0
"""Seconds of timed steps with the typical batch, of which there are at least two. Other work on a machine can add
half to a short step; the median of more such steps tells less of it."""


def order(model: str, asked: preparing.Plan, adapter: Any, seed: int, sums: Sums, arguments: Any) -> dict[str, Any]:
    """What a probe is to do, JSON values."""
    plan = sums.schedule
    micro = min(2, plan.micro)
    given = {
        **asked.given,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": micro,
        "dataloader_drop_last": False,
        "max_steps": (LONGEST + TYPICAL) * (2 if sums.frozen_layers else 1),
    }
    for name in ("eval_steps", "save_steps", "metric_for_best_model", "greater_is_better"):
        given.pop(name, None)
    kept = adapter if recipes.saved_adapter_kind(adapter) is not None else asked.adapter.model_dump(mode="json")
    return {
        "model": model,
        "task": asked.task.model_dump(mode="json"),
        "adapter": str(kept) if isinstance(kept, Path) else kept,
        "settings": {name: value for name, value in given.items() if value is not None},
        "seed": seed,
        "micro": micro,
        "longest": list(plan.longest.rows),
        "typical": list(_of_like_count(plan.typical, plan.longest).rows),
    }


def _of_like_count(batch: Batch, other: Batch) -> Batch:
    """A batch with as many rows as another; an epoch's last one may have fewer."""
    rows = (batch.rows * len(other.rows))[: len(other.rows)]
    return batch._replace(rows=rows)


def run(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Carry an order out.

    Returns:
        ``peak_memory_mb`` of the process; ``longest_seconds`` and ``typical_seconds`` of a batch; what the very
        first step took in addition (``first_seconds``), and the first one of another shape (``shape_seconds``);
        ``filling_seconds`` and ``filled_tokens`` of frozen layers that were computed once; ``shapes`` of batches that
        it saw.

    Raises:
        ModelError: The process failed; the end of what it said is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "ptft_hf.planning"],
            input=json.dumps({**wanted, "answer": str(answer), "folder": folder}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if not answer.is_file():
            tail = done.stdout.decode(errors="replace").strip()[-1000:]
            how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
            hint = "; it may have run out of memory, which is an answer, too" if done.returncode == -9 else ""
            raise ModelError(f"probe: its process {how}{hint}: {tail}")
        return checkpoints.read_json(answer)


class StepClock(transformers.TrainerCallback):
    """Seconds of each optimizer step, with the reading of its batch: from the end of the one before. It ends the
    training when there is :data:`ENOUGH`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = self.last or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        timed = self.seconds[LONGEST + 1 :]
        control.should_training_stop |= len(timed) > 1 and sum(timed) >= ENOUGH


def probe(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Take the steps, in this process; see :func:`run`."""
    from ptft_hf.trainer import Trainer

    adapter = wanted["adapter"]
    plan = preparing.make_plan(
        wanted["model"],
        recipes.task_from_dict(wanted["task"]),
        recipes.adapter_from_dict(adapter) if isinstance(adapter, Mapping) else adapter,
        wanted["settings"],
    )
    folder, micro = Path(wanted["folder"]), wanted["micro"]
    ready = preparing.prepare(plan, None, wanted["seed"])
    arguments = preparing.training_arguments(plan, ready, folder, wanted["seed"])
    building.choose_attention(plan, ready, arguments)
    collator = building.training_collator(ready, arguments)
    rows = [*wanted["longest"]] * micro * LONGEST + [*wanted["typical"]] * micro * TYPICAL
    ready.encoded["train"] = ready.encoded["train"].select(rows)
    arguments.per_device_train_batch_size = len(wanted["longest"])
    trainer = building.build_trainer(Trainer, plan, ready, arguments, folder)
    trainer.data_collator = collator
    clock = StepClock()
    trainer.add_callback(clock)
    with models.quiet():
        trainer.train()
    filled = trainer.layers_computed_once
    new_longest, longest_again, new_typical, *more = clock.seconds[: LONGEST + TYPICAL]
    typical_again = median(more)
    return {
        "peak_memory_mb": records.peak_memory_mb(),
        "longest_seconds": longest_again / micro,
        "typical_seconds": typical_again / micro,
        "first_seconds": max(0.0, new_longest - longest_again),
        "shape_seconds": max(0.0, new_typical - typical_again),
        "filling_seconds": trainer.clock.before if filled else 0.0,
        "filled_tokens": sum(ready.encoded["train"]["length"]) if filled else 0,
        "shapes": 2,
    }

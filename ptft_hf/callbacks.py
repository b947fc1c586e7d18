"""What happens beside training: a progress bar, the log of metrics, a clock, and layers that thaw one by one."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import transformers

from ptft_hf import checkpoints, report
from ptft_hf.models import checkpointing


class Progress(transformers.TrainerCallback):
    """One bar over all steps, with the last loss and validation metric."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = report.bar(state.max_steps, "Training", "step", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is None:
            return
        for name in ("loss", f"eval_{self.metric}"):
            if name in (logs or {}):
                self.shown[name.removeprefix("eval_")] = f"{logs[name]:.4f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class SelectiveCheckpointing(transformers.TrainerCallback):
    """Translates ``selective`` once the Trainer has enabled gradient checkpointing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        checkpointing.select(model)


class MetricsLog(transformers.TrainerCallback):
    """``metrics.jsonl``: one object a logged step. A resumed run first cuts the file back to its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = [json.dumps(_loggable(entry)) + "\n" for entry in state.log_history]
            checkpoints.write_text(self.path, "".join(lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_loggable({"step": state.global_step, **logs})) + "\n")


def _loggable(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: a value that is not a number becomes null."""
    entry = {key: value for key, value in entry.items() if key != "epoch"} | {"epoch": entry.get("epoch")}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


class Clock(transformers.TrainerCallback):
    """Seconds from the first step's begin to the last step's end, without what happened aside, and with what was
    computed ``before`` in the steps' stead."""

    def __init__(self) -> None:
        self.before = 0.0
        self.first = self.last = self.aside = self.aside_at_last = 0.0
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.steps and not self.first:
            self.first, self.aside = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last, self.aside_at_last = time.perf_counter(), self.aside
        self.steps += 1

    def seconds(self) -> float:
        return self.before + self.last - self.first - self.aside_at_last


class GradualUnfreezing(transformers.TrainerCallback):
    """The head alone in the first epoch, then layer after layer from the top, all of them in the last epoch
    (Howard & Ruder 2018)."""

    def __init__(self, depth: dict[str, int], trained: set[str], epochs: int) -> None:
        self.depth, self.trained, self.epochs = depth, trained, epochs

    def lowest_depth(self, epoch: int) -> int:
        """Depth from which on weights are trained in this epoch (counted from 0)."""
        top = max(self.depth.values())
        return top - math.ceil(top * min(1.0, epoch / (self.epochs - 1)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # A run resumed in the middle of an epoch begins with that epoch; a full one ends on a whole number.
        lowest = self.lowest_depth(int((state.epoch or 0) + 1e-6))
        for name, parameter in model.named_parameters():
            if name in self.trained:
                parameter.requires_grad_(self.depth[name] >= lowest)

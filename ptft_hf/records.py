"""``settings.json``, which a resumed run is held to, and ``run.json``, which says all of a finished one."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptft_hf import checkpoints, data, report
from ptft_hf.errors import CheckpointError, OutputError
from ptft_hf.preparing import Plan, Ready

SETTINGS = "settings.json"
PLACES = ("model.reference", "model.source", "task.name", "task.description", "task.data", "adapter.name",
          "adapter.description")  # fmt: skip
"""Where things are. What they are, the fingerprints of weights and data tell: both may have moved."""


def identity(plan: Plan, ready: Ready, arguments: Any) -> dict[str, Any]:
    """What a resumed run must have in common with the run that was stopped."""
    changing = {"output_dir", "logging_dir", "run_name", "local_rank"}
    resolved = {k: v for k, v in json.loads(arguments.to_json_string()).items() if k not in changing}
    return {
        "model": ready.facts,
        "task": plan.task.model_dump(mode="json"),
        "adapter": plan.adapter.model_dump(mode="json"),
        "training": resolved,
        "seed": arguments.seed,
        "processes": arguments.world_size,
        "data": {
            name: data.fingerprint(getattr(ready.splits, name)) for name in ("train", "validation", "test")
        },
    }


def find_start(folder: Path, now: Mapping[str, Any], is_main: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        OutputError: The stopped run had other settings, data or weights, or it is not known which.
    """
    if not (folder / SETTINGS).is_file():
        if checkpoints.steps(folder / "checkpoints"):
            raise OutputError(
                f"{folder}: holds checkpoints but no {SETTINGS}, so it is not known which run they are of; "
                "replace it (--overwrite), or choose another folder"
            )
        report.say(f"{folder} has no run to resume: starting from the beginning")
        return None
    before = checkpoints.read_json(folder / SETTINGS)
    changes = [
        f"{path}: {old!r} when the run began, {new!r} now"
        for path, old, new in differences(before, json.loads(json.dumps(now)))
        if not f"{path}.".startswith(tuple(f"{place}." for place in PLACES))
    ]
    if changes:
        raise OutputError(
            *(f"{folder} cannot be resumed with other settings: {change}" for change in changes[:20])
        )
    start, skipped = checkpoints.newest_intact(
        folder / "checkpoints", with_best=now["training"].get("load_best_model_at_end", False)
    )
    if is_main:
        for line in skipped:
            report.say(line, style="yellow")
        report.say(
            f"resuming from {start.name}"
            if start
            else f"{folder} has no intact checkpoint: starting from the beginning"
        )
    return start


def differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            d
            for key in sorted(before.keys() | now.keys())
            for d in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [(path, before, now)]


def begin(folder: Path, written: Mapping[str, Any], start: Path | None, replace: bool) -> None:
    """Make the output folder, clear it of the run that is to be replaced, and of checkpoints after ``start``.

    Raises:
        OutputError: It is not known which files belong to the run that is to be replaced.
    """
    if replace and folder.exists():
        clear(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints.discard_unfinished(folder / "checkpoints")
    checkpoints.discard_unfinished(folder)
    checkpoints.discard_newer(folder / "checkpoints", start)
    checkpoints.write_text(folder / SETTINGS, json.dumps(written, indent=1))


def clear(folder: Path) -> None:
    """Delete a run, and nothing else that is in its folder.

    ``run.json`` goes first, so that what is left is never taken for a finished run; ``settings.json`` last, so
    that it is known for a run's folder until it is empty.

    Raises:
        OutputError: Its manifest is damaged, so its files are not known; nothing has been deleted.
    """
    try:
        names = [checkpoints.MANIFEST, *checkpoints.manifest(folder)]
    except FileNotFoundError:
        names = []
    except CheckpointError as error:
        raise OutputError(
            f"{error}, and with it which files are the run's; delete {folder} yourself"
        ) from error
    (folder / "run.json").unlink(missing_ok=True)
    if (folder / "checkpoints").exists():
        checkpoints.remove(folder / "checkpoints")
    for name in ("metrics.jsonl", *reversed(names), SETTINGS):
        (folder / name).unlink(missing_ok=True)


# ---- the end ----


def make_record(
    plan: Plan,
    ready: Ready,
    trainer: Any,
    folder: Path,
    metrics: Mapping[str, Any],
    details: Mapping[str, Any],
    peak: float,
    parameters: tuple[int, int],
) -> dict[str, Any]:
    """The content of ``run.json``."""
    trainable, total = parameters
    state = trainer.state
    written = checkpoints.read_json(folder / SETTINGS)
    text_columns = [c for c in ready.task.text_columns if c in ready.splits.train.column_names]
    return {
        "ptft_hf": importlib.metadata.version("ptft-hf"),
        "output_dir": str(folder),
        "model": written["model"],
        "task": written["task"],
        "adapter": written["adapter"],
        "seed": written["seed"],
        "settings": written["training"],
        "labels": list(getattr(ready.task, "labels", [])),
        "task_state": ready.task.state(),
        "data": {
            "columns": text_columns,
            **{
                name: {"rows": len(getattr(ready.splits, name)), "fingerprint": written["data"][name]}
                for name in ("train", "validation", "test")
            },
        },
        "parameters": {"trainable": trainable, "total": total},
        "training": {
            **training_figures(trainer),
            "best_step": state.best_global_step or state.global_step,
            "steps": state.global_step,
            "peak_memory_mb": peak,
            "layers_computed_once": trainer.layers_computed_once,
        },
        "metrics": dict(metrics),
        "report": dict(details),
        "notes": ready.notes,
        "versions": versions(),
        "hardware": hardware(written["processes"]),
    }


def versions() -> dict[str, str]:
    """Of the libraries that a run's figures depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def hardware(processes: int) -> dict[str, Any]:
    """Of this process, one of so many."""
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def training_figures(trainer: Any) -> dict[str, float]:
    """Seconds from the first batch to the end of the last step, evaluation and saving left out; of a resumed
    run, of the part after the resume."""
    seconds = trainer.clock.seconds()
    rows = trainer.clock.steps * trainer.get_total_train_batch_size(trainer.args)
    rows = min(rows, round(len(trainer.train_dataset) * trainer.args.num_train_epochs)) if rows else 0
    return {"seconds": seconds, "rows_per_second": rows / seconds if seconds else 0.0}


def peak_memory_mb() -> float:
    """Most memory this process has held so far: on the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

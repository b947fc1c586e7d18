"""One cell, in the process that runs it: tries of the learning rate, the choice on validation, one look at test."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from ptft_hf import adapters, checkpoints, inference, models, training
from ptft_hf.comparing.grids import CLIMB, Cell
from ptft_hf.errors import CheckpointError, ModelError
from ptft_hf.forward import BATCH_SIZE
from ptft_hf.inference import TrainedModel
from ptft_hf.preparing import Ready, make_plan, prepare, training_arguments
from ptft_hf.settings import LOWER_IS_BETTER

SPEED_ROWS = 256
"""Rows of validation on which the speed of inference is taken, after a batch to warm up."""
MEASURED = ("cost", "tries.*.seconds", "hardware")
"""Where a cell holds what differs between two runs of the same cell; all else is the same to the last digit."""


def rates_around(default: float, count: int) -> list[float]:
    """The first ``count`` of the method's own rate times 1, 3, 1/3, 9, 1/9, ...

    Every method gets as many tries, each about its own default, since good rates of full fine-tuning and of
    adapters are orders of magnitude apart. Half a decade is the usual step of such searches: finer ones cost more
    than they find. The default comes first and wins ties; upwards goes before downwards, because defaults are
    chosen to be safe.
    """
    powers = [0] + [sign * step for step in range(1, count) for sign in (1, -1)]
    return [_rounded(default * 3.0**power) for power in powers[:count]]


def climb(default: float, tried: Sequence[tuple[float, float | None]]) -> float:
    """The rate to try next: a hill climb from the method's own rate, in factors of three.

    Three times the best one while that is the highest tried, a third while it is the lowest, and between two that are
    worse the geometric mean with the better of them. So three tries reach up to nine times the default, where
    :func:`rates_around` ends at three: on 151 intents that was the best of its three in 52 of 54 cells, and six of
    nine methods gained 12 to 38 points beyond it, at 9 to 100 times their defaults (``benchmarks/REPORT.md``).

    Args:
        default: The method's own.
        tried: Rates and their scores, higher is better; None where training diverged. Of equal scores the highest
            rate counts, since what has not begun to learn needs a higher one.
    """
    if not tried:
        return _rounded(default)
    scores = {rate: -inf if score is None else score for rate, score in tried}
    rates = sorted(scores)
    best = max(rates, key=lambda rate: (scores[rate], rate))
    if best == rates[-1] and scores[best] > -inf:
        return _rounded(best * 3)
    if best in (rates[0], rates[-1]):
        return _rounded(rates[0] / 3)
    place = rates.index(best)
    beside = max(rates[place - 1], rates[place + 1], key=scores.__getitem__)
    return _rounded((best * beside) ** 0.5)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def run_cell(cell: Cell, folder: Path, *, keep_weights: bool = False) -> dict[str, Any]:
    """Train with every learning rate, choose one on validation, read the test set once, with that one.

    A rate with which training diverges is a try that failed; the cell has failed if all have. Each seed makes its
    own choice, so that the seeds are independent repetitions of the whole procedure, tuning included.

    Args:
        cell: What to run.
        folder: For the runs; emptied first, in case an earlier attempt was stopped. Removed at the end.
        keep_weights: Keep the chosen run.

    Returns:
        The cell's content, JSON values: what was run (``cell``), every try, the chosen run's ``run.json`` (recipes,
        resolved settings, fingerprints, versions, hardware), figures and per-example outcomes of the test set
        (``test``), and what it cost (``cost``).

    Raises:
        PtftError: It cannot be run, or every try failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tries: list[dict[str, Any]] = []
    ready: Ready | None = None
    given = learning_rates(cell)
    for planned in given:
        scores = [(one["learning_rate"], one.get("score")) for one in tries]
        rate = climb(given[0], scores) if cell.search == CLIMB else planned
        place = folder / f"learning_rate-{rate:g}"
        try:
            found, record = run_try(cell, rate, place)
        except ModelError as error:
            tries.append({"learning_rate": rate, "error": str(error)})
            continue
        ready = ready or found
        metric, lower = metric_of(record, ready.task.best_metric)
        score = record["metrics"]["validation"][metric] * (-1.0 if lower else 1.0)
        tries.append({"learning_rate": rate, "record": record, "folder": place, "score": score})
    done = [one for one in tries if "record" in one]
    if ready is None or not done:
        raise ModelError(*_why(tries))
    chosen = max(done, key=lambda one: one["score"])
    started = time.perf_counter()
    trained = inference.load(chosen["folder"], trust_remote_code=True)  # as its recipe has it
    seconds = time.perf_counter() - started
    result = {
        "status": "finished",
        "cell": cell.to_dict(),
        "metric": {"name": metric, "higher_is_better": not lower},
        "tries": [_summary(one) for one in tries],
        "learning_rate": chosen["learning_rate"],
        "test": on_test(trained, ready),
        "cost": costs(trained, ready, done, chosen, seconds),
        **_kept(chosen["record"]),
    }
    for one in tries:
        if not (keep_weights and one is chosen):
            shutil.rmtree(folder / f"learning_rate-{one['learning_rate']:g}", ignore_errors=True)
    if not keep_weights:
        shutil.rmtree(folder)
    return result


def _why(tries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong with which rates; what is said of many once."""
    rates: dict[str, list[str]] = {}
    for one in tries:
        rates.setdefault(one["error"], []).append(f"{one['learning_rate']:g}")
    return [f"learning rate{'s' * (len(of) > 1)} {', '.join(of)}: {error}" for error, of in rates.items()]


def learning_rates(cell: Cell) -> list[float]:
    """The rates that the cell tries: those given, or some around the recipes' own or the method's default. A climb
    starts at the first and makes as many tries."""
    if not isinstance(cell.rates, int):
        return [float(rate) for rate in cell.rates]
    plan = make_plan(cell.model, cell.task, cell.adapter, cell.training)
    method = adapters.build(plan.adapter, plan.config)
    return rates_around(float(plan.given.get("learning_rate", method.learning_rate)), cell.rates)


def run_try(cell: Cell, rate: float, folder: Path) -> tuple[Ready, dict[str, Any]]:
    """One training run, scored on validation alone; what it was prepared from, and its ``run.json``."""
    plan = make_plan(cell.model, cell.task, cell.adapter, {**cell.training, "learning_rate": rate})
    rows = {"train": cell.size, "validation": cell.validation_size, "test": cell.test_size}
    ready = prepare(plan, None, cell.seed, {name: count for name, count in rows.items() if count is not None})
    arguments = training_arguments(plan, ready, folder, cell.seed)
    trained = training.run(
        plan, ready, arguments, folder, resume=False, overwrite=False, evaluated=["validation"]
    )
    record = trained.run
    ready = ready._replace(model=None)  # the weights go, the data stay
    del trained
    gc.collect()
    return ready, record


def metric_of(record: Mapping[str, Any], default: str) -> tuple[str, bool]:
    """The metric by which runs are chosen and compared, and whether lower is better: the one by which the best
    checkpoint was kept, or the task family's own where that is none of the final figures."""
    name = str(record["settings"].get("metric_for_best_model") or default).removeprefix("eval_")
    name = name if name in record["metrics"]["validation"] else default
    return name, name in LOWER_IS_BETTER


def on_test(trained: TrainedModel, ready: Ready) -> dict[str, Any]:
    """Metrics, figures by class, and a score for each test example: a string of 0 and 1 where those are all."""
    task, encoded = trained.task, ready.encoded["test"]
    outputs = task.outputs(trained.model, encoded, trained.tokenizer, BATCH_SIZE, progress=True)
    targets = task.targets(encoded)
    outcomes = task.outcomes(outputs, targets)
    report = task.report(outputs, targets)
    return {
        "metrics": task.metrics(outputs, targets),
        "report": {name: value for name, value in report.items() if name != "confusion"},
        "outcomes": "".join(str(int(x)) for x in outcomes) if set(outcomes) <= {0.0, 1.0} else outcomes,
    }


# ---- what it cost ----


def costs(
    trained: TrainedModel,
    ready: Ready,
    done: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Any],
    load_seconds: float,
) -> dict[str, Any]:
    """Parameters, seconds, speed, memory, disk.

    Peak memory is that of the first try that succeeded, taken when its training ended: it does not depend on the
    learning rate, and a process's high-water mark never goes down again.
    """
    run = chosen["record"]
    figures, lengths = run["training"], ready.encoded["train"]["length"][:]
    merged: float | str | None = None
    if models.adapter_kind(trained.model) is not None:
        try:
            merged = inference_speed(trained.merge(), ready)
        except CheckpointError as error:
            merged = str(error)
    return {
        "trainable_parameters": run["parameters"]["trainable"],
        "total_parameters": run["parameters"]["total"],
        "seconds": figures["seconds"],
        "seconds_of_all_tries": sum(one["record"]["training"]["seconds"] for one in done),
        "examples_per_second": figures["rows_per_second"],
        "tokens_per_second": figures["rows_per_second"] * float(np.mean(lengths)),
        "peak_memory_mb": done[0]["record"]["training"]["peak_memory_mb"],
        "bytes_on_disk": figures["bytes_on_disk"],
        "load_seconds": load_seconds,
        "inference_examples_per_second": {
            "attached": inference_speed(trained, ready),
            "merged": merged,
        },
    }


def inference_speed(trained: TrainedModel, ready: Ready) -> float:
    """Examples a second through the model alone, padded in batches of like length."""
    task, encoded = trained.task, ready.encoded["validation"]
    encoded = encoded.select(range(min(SPEED_ROWS, len(encoded))))
    task.outputs(trained.model, encoded.select(range(min(8, len(encoded)))), trained.tokenizer, BATCH_SIZE)
    started = time.perf_counter()
    task.outputs(trained.model, encoded, trained.tokenizer, BATCH_SIZE)
    return len(encoded) / (time.perf_counter() - started)


def _summary(one: Mapping[str, Any]) -> dict[str, Any]:
    if "record" not in one:
        return dict(one)
    record = one["record"]
    return {
        "learning_rate": one["learning_rate"],
        "validation": record["metrics"]["validation"],
        "best_step": record["training"]["best_step"],
        "steps": record["training"]["steps"],
        "seconds": record["training"]["seconds"],
    }


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``run.json`` what describes the run; not where it lay, nor what stands elsewhere in the cell."""
    model = {name: value for name, value in record["model"].items() if name not in ("reference", "source")}
    names = ("settings", "labels", "task_state", "data", "parameters", "notes", "versions", "hardware")
    return {"ptft_hf": record["ptft_hf"], "model": model, **{name: record[name] for name in names}}


def write_cell(path: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's file at once or not at all; it names files below the working folder from there, as others will
    find them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**result, "cell": _from_here(result["cell"])}, indent=1, ensure_ascii=False)
    checkpoints.write_text(path, text + "\n")


def _from_here(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_here(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_here(inner) for inner in value]
    return value.removeprefix(f"{Path.cwd()}/") if isinstance(value, str) else value

"""Forecasts of memory and time against runs: constants are fitted on ten of them, and judged on the others.

    PTFT_TEST_DATA=... python -m benchmarks.planning.run [--work DIR] [--only WORD ...] [--report]

Each run is a ``ptft train`` of a few steps in a process of its own, and so is its forecast before. What is finished
is skipped. Writes ``results.json`` and ``REPORT.md`` beside this file; ``--report`` writes the latter alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.planning.cases import CASES, Case, model_of, settings_of, task_of

HERE = Path(__file__).parent
ZERO = (0.0, 0.0, 0.0)
UNITS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
Result = Mapping[str, Any]


# ---- one case ----


def forecast(case: Case, data: Path, work: Path) -> dict[str, Any]:
    """What ``ptft plan`` counts, in a form from which forecasts with any constants follow: every term is linear in
    them. Run in a process of its own."""
    import torch

    from ptft_hf import planning, preparing
    from ptft_hf.cli.options import keep_freed_memory
    from ptft_hf.planning import machine, memory, probing, timing

    keep_freed_memory()
    model, task, settings = model_of(case, work), task_of(case, data, work), settings_of(case)
    asked = preparing.make_plan(model, task, case.adapter, settings)
    started = time.perf_counter()
    _, arguments, sums = planning.count(asked, None, 42)
    seconds = time.perf_counter() - started
    baseline, reads = machine.resident(), planning.reading(asked)
    speed = machine.speed(torch.bfloat16 if sums.half else torch.float32, arguments.device)
    plain = _in_all(memory.stages(sums, baseline, memory.Calibration(*ZERO), reads))
    found: dict[str, Any] = {
        "baseline": baseline,
        "terms": memory.stages(sums, baseline, memory.Calibration(*ZERO), reads)["training"],
        "stages": plain,
        "stages_by_constant": [
            {name: size - plain[name] for name, size in _in_all(
                memory.stages(sums, baseline, memory.Calibration(*unit), reads)
            ).items()}
            for unit in UNITS
        ],
        "seconds_by_rate": [
            timing.training(sums, timing.of_counts(sums, speed, timing.Rates(*unit))) for unit in UNITS
        ],
        "gflops": speed.flops / 1e9,
        "seconds_to_count": seconds,
        "longest": list(sums.schedule.first.shape),
        "frozen_layers": sums.frozen_layers,
    }  # fmt: skip
    if case.probed:
        answer = probing.run(probing.order(model, asked, case.adapter, 42, sums, arguments))
        found["probe"] = {**answer, "forecast_seconds": timing.probed(sums, answer)}
    return found


def _in_all(stages: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(terms.values()) for name, terms in stages.items()}


def measure(case: Case, data: Path, work: Path) -> dict[str, Any]:
    """The run itself: what its ``run.json`` says of it."""
    folder = work / "run"
    command = ["--model", model_of(case, work), "--task", task_of(case, data, work), "--adapter", case.adapter]
    for name, value in settings_of(case).items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    command += ["--output", str(folder), "--overwrite"]
    log = work / "train.log"
    with log.open("wb") as out:
        done = subprocess.run([sys.executable, "-m", "ptft_hf", "train", *command], stdout=out, stderr=out)
    if done.returncode:
        raise RuntimeError(log.read_text("utf-8", errors="replace")[-3000:])
    run = json.loads((folder / "run.json").read_text("utf-8"))
    shutil.rmtree(folder)
    names = ("peak_memory_mb", "peak_memory_mb_with_proof", "seconds", "steps", "bytes_on_disk")
    return {
        **{name: run["training"][name] for name in names},
        "parameters": run["parameters"],
        "forecast_of_the_run": run["forecast"],
    }


def run_case(case: Case, data: Path, work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.planning.run", "--work", str(work), "--forecast", case.name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return {
        "case": case._asdict() | {"name": case.name},
        "forecast": json.loads(done.stdout.splitlines()[-1]),
        "measured": measure(case, data, work),
    }


# ---- all of them ----


def peak(result: Result, constants: Sequence[float], proof: bool = False) -> float:
    """MB, forecast with these constants."""
    found = result["forecast"]
    sizes = {
        name: size + sum(c * unit[name] for c, unit in zip(constants, found["stages_by_constant"], strict=True))
        for name, size in found["stages"].items()
    }
    return float(max(size for name, size in sizes.items() if proof or name != "proof")) / 1e6


def error(said: float, was: float) -> float:
    return (said - was) / was


def fit(results: Sequence[Result]) -> list[float]:
    """Constants of memory by least squares of relative errors; none below zero."""
    import numpy as np
    from scipy.optimize import least_squares

    scale = np.array([1e8, 0.1, 1e5])

    def errors(x: Any) -> list[float]:
        return [error(peak(r, list(x * scale)), r["measured"]["peak_memory_mb"]) for r in results]

    return [float(v) for v in least_squares(errors, np.ones(3), bounds=(0, np.inf), diff_step=1e-2).x * scale]


def fit_rates(results: Sequence[Result]) -> list[float]:
    """Rates of time likewise."""
    import numpy as np
    from scipy.optimize import nnls

    rows = np.array([r["forecast"]["seconds_by_rate"] for r in results])
    was = np.array([r["measured"]["seconds"] for r in results])
    return [float(v) for v in nnls(rows / was[:, None], np.ones(len(was)))[0]]


def report(results: Sequence[Result]) -> str:
    from ptft_hf.planning import memory, timing

    constants, rates = list(memory.CPU), list(timing.CPU)
    fitted = [r for r in results if r["case"]["fits"]]
    judged = [r for r in results if not r["case"]["fits"]]
    lines = [
        "# Forecasts of memory and time against runs",
        "",
        "`PTFT_TEST_DATA=... python -m benchmarks.planning.run`: each line is a `ptft train` of a few steps in a "
        "process of its own, forecast by `ptft plan` in another before. The peak is the process's "
        "(`peak_memory_mb`); *above baseline* is the error of what stands above libraries, data and tokenizer. Lines "
        "with * are those that the constants were fitted to; the others judge them.",
        "",
    ]
    if fitted:
        by_fit = ", ".join(f"{v:.4g}" for v in fit(fitted))
        lines.append(
            f"Constants of memory (libraries, allocator, kernels): {', '.join(f'{v:.4g}' for v in constants)}; "
            f"a fit to the {len(fitted)} runs gives {by_fit}. Rates of time (products, moving, operation): "
            f"{', '.join(f'{v:.4g}' for v in rates)}; a fit gives "
            f"{', '.join(f'{v:.4g}' for v in fit_rates(fitted))}."
        )
    figures = {name: _errors(some, constants) for name, some in (("judged", judged), ("fitted", fitted)) if some}
    for name, found in figures.items():
        lines += ["", f"**{name}, {len(found['peak'])} runs:** " + "; ".join(
            f"{what} median {statistics.median(values):.1%}, worst {max(values):.1%} ({len(values)} runs)"
            for what, values in found.items() if values
        ) + "."]  # fmt: skip
    lines += [
        "",
        "| run | longest batch | peak MB, forecast | measured | error | above baseline | error in the run "
        "| with proof: forecast | measured | error | seconds | forecast | after --probe |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        said, was, base = peak(r, constants), r["measured"]["peak_memory_mb"], r["forecast"]["baseline"] / 1e6
        proof, proven = peak(r, constants, True), r["measured"]["peak_memory_mb_with_proof"]
        inside = r["measured"]["forecast_of_the_run"]
        seconds = r["measured"]["seconds"]
        guessed = sum(a * b for a, b in zip(rates, r["forecast"]["seconds_by_rate"], strict=True))
        probed = r["forecast"].get("probe")
        cells = [
            f"{r['case']['name']}{' *' if r['case']['fits'] else ''}",
            " x ".join(str(n) for n in r["forecast"]["longest"] if n),
            f"{said:,.0f}",
            f"{was:,.0f}",
            f"{error(said, was):+.1%}",
            f"{(said - was) / (was - base):+.0%}",
            f"{error(inside['peak_memory_mb'], was):+.1%}" if inside else "-",
            f"{proof:,.0f}",
            f"{proven:,.0f}",
            f"{error(proof, proven):+.1%}",
            f"{seconds:.1f}",
            f"{error(guessed, seconds):+.0%}",
            f"{error(probed['forecast_seconds'], seconds):+.0%}" if probed else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _errors(results: Sequence[Result], constants: Sequence[float]) -> dict[str, list[float]]:
    """Absolute relative errors."""
    found: dict[str, list[float]] = {"peak": [], "above the baseline": [], "with the proof": [], "time by probe": []}
    for r in results:
        was = r["measured"]["peak_memory_mb"]
        off = abs(peak(r, constants) - was)
        found["peak"].append(off / was)
        found["above the baseline"].append(off / (was - r["forecast"]["baseline"] / 1e6))
        proven = r["measured"]["peak_memory_mb_with_proof"]
        found["with the proof"].append(abs(error(peak(r, constants, True), proven)))
        if probed := r["forecast"].get("probe"):
            found["time by probe"].append(abs(error(probed["forecast_seconds"], r["measured"]["seconds"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("planning-runs"), help="for models and runs")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold all of these words")
    parser.add_argument("--report", action="store_true", help="write the report of what there is, and run nothing")
    parser.add_argument("--forecast", help=argparse.SUPPRESS)  # the process of one forecast
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    data, path, work = Path(os.environ["PTFT_TEST_DATA"]), HERE / "results.json", args.work.resolve()
    if args.forecast:
        print(json.dumps(forecast(next(c for c in CASES if c.name == args.forecast), data, work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for case in sorted(CASES, key=lambda case: not case.fits):
        if args.report or case.name in results or not all(word in case.name for word in args.only):
            continue
        started = time.perf_counter()
        try:
            results[case.name] = run_case(case, data, work)
        except RuntimeError as failed:
            print(f"{case.name}: FAILED: {failed}", flush=True)
            continue
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        was = results[case.name]["measured"]["peak_memory_mb"]
        took = time.perf_counter() - started
        print(f"{case.name}: {was:,.0f} MB measured; {took:.0f} s in all", flush=True)
    known = [results[case.name] for case in CASES if case.name in results]
    if known:
        (HERE / "REPORT.md").write_text(report(known), encoding="utf-8")


if __name__ == "__main__":
    main()

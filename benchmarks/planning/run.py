"""Forecasts of memory and time against runs: constants are fitted on eleven of them, and judged on the others.

    PTFT_TEST_DATA=... python -m benchmarks.planning.run [--work DIR] [--only WORD ...] [--report]

Each run is a ``ptft train`` of a few steps in a process of its own; some have a ``ptft plan --probe`` before. What is
finished is skipped. Writes ``results.json`` and ``REPORT.md`` beside this file; ``--report`` writes the latter alone.
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
from ptft_hf.planning import memory

HERE = Path(__file__).parent
Result = Mapping[str, Any]


# ---- one case ----


def run_case(case: Case, data: Path, work: Path) -> dict[str, Any]:
    """``ptft plan --probe`` of probed cases, and ``ptft train`` of all: what its ``run.json`` says."""
    folder = work / "run"
    flags = ["--model", model_of(case, work), "--task", task_of(case, data, work), "--adapter", case.adapter]
    for name, value in settings_of(case).items():
        flags += ["--set", f"{name}={json.dumps(value)}"]
    plan = json.loads(ptft("plan", *flags, "--probe", "--json").splitlines()[-1]) if case.probed else None
    ptft("train", *flags, "--output", str(folder), "--overwrite")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    shutil.rmtree(folder)
    names = ("peak_memory_mb", "peak_memory_mb_with_proof", "seconds", "steps", "bytes_on_disk")
    return {
        "case": described(case),
        "plan": plan,
        "forecast": run["forecast"],
        "constants": list(memory.CPU),
        "measured": {name: run["training"][name] for name in names},
        "parameters": run["parameters"],
        "hardware": run["hardware"],
        "versions": run["versions"],
    }


def described(case: Case) -> dict[str, Any]:
    return case._asdict() | {"name": case.name}


def ptft(*command: str) -> str:
    """What a process of its own prints.

    Raises:
        RuntimeError: It failed; the end of what it said is told.
    """
    done = subprocess.run([sys.executable, "-m", "ptft_hf", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout)[-3000:])
    return done.stdout


def recount(case: Case, result: Result, data: Path, work: Path) -> dict[str, Any]:
    """The result with what the code forecasts now, on the baseline that the run's process had."""
    from ptft_hf import planning, preparing
    from ptft_hf.planning.forecasts import forecast

    asked = preparing.make_plan(
        model_of(case, work), task_of(case, data, work), case.adapter, settings_of(case)
    )
    _, arguments, sums = planning.count(asked, None, 42)
    now = forecast(sums, arguments, round(baseline(result) * 1e6), reads=planning.reading(asked))
    kept = {name: result["forecast"][name] for name in ("seconds", "limit_mb", "fits", "notes")}
    return {**result, "forecast": {**now.to_dict(), **kept}, "constants": list(memory.CPU)}


# ---- all of them ----


def peak(result: Result, constants: Sequence[float], proof: bool = False) -> float:
    """MB of a run's forecast, were its constants these: its terms are linear in them."""
    stages = {name: dict(terms) for name, terms in result["forecast"]["stages_mb"].items()}
    names = (memory.LIBRARIES, memory.ALLOCATOR, memory.KERNELS)
    ratios = [now / then for now, then in zip(constants, result["constants"], strict=True)]
    for terms in stages.values():
        terms |= {name: terms.get(name, 0.0) * ratio for name, ratio in zip(names, ratios, strict=True)}
    # What the training stage has of them is part of what is kept after it.
    then = sum(result["forecast"]["stages_mb"]["training"].values())
    more = sum(stages["training"].values()) - then
    for terms in stages.values():
        if memory.KEPT in terms:
            terms[memory.KEPT] += more
    return max(sum(terms.values()) for name, terms in stages.items() if proof or name != "proof")


def error(said: float, was: float) -> float:
    return (said - was) / was


def fit(results: Sequence[Result]) -> list[float]:
    """Constants of memory by least squares of relative errors, none below zero; kernels' code was measured alone."""
    import numpy as np
    from scipy.optimize import least_squares

    scale = np.array([1e8, 0.1])

    def errors(x: Any) -> list[float]:
        constants = [*(x * scale), memory.CPU.kernels]
        return [error(peak(r, constants), r["measured"]["peak_memory_mb"]) for r in results]

    found = least_squares(errors, np.ones(2), bounds=(0, np.inf), diff_step=1e-2).x * scale
    return [*map(float, found), memory.CPU.kernels]


def report(results: Sequence[Result]) -> str:
    constants = list(memory.CPU)
    fitted = [r for r in results if r["case"]["fits"]]
    judged = [r for r in results if not r["case"]["fits"]]
    lines = [
        "# Forecasts of memory and time against runs",
        "",
        "`PTFT_TEST_DATA=... python -m benchmarks.planning.run`: each line is a `ptft train` of a few steps in a "
        "process of its own, and its forecast. The peak is the process's (`peak_memory_mb`); *above baseline* is the "
        "error of what stands above libraries, data and tokenizer. *plan* is the same forecast on the baseline of "
        "`ptft plan`, another process, in which no weights were loaded. Lines with * are those that the constants "
        "were fitted to; the others judge them.",
        "",
        "Each forecast is the one that its run made. All runs are of one day, alone on the machine and on two "
        "threads; the constants are older: kernels' code was measured alone (`python -m benchmarks.planning.kernels`"
        ", 0.5 to 0.7 MB; 0.7 was taken when runs had been seen with 0.6, too), the others were fitted to earlier "
        "runs of the lines with *, on one thread. Of the judged lines, too, most had been run before on older "
        "versions, and terms were added in view of them: the best checkpoint that is read, and the proof's logits.",
        "",
    ]
    if fitted:
        lines.append(
            f"Constants (libraries, allocator, kernels): {', '.join(f'{v:.4g}' for v in constants)}; a fit to the "
            f"{len(fitted)} runs gives {', '.join(f'{v:.4g}' for v in fit(fitted))}."
        )
    figures = {name: _errors(some, constants) for name, some in (("judged", judged), ("fitted", fitted)) if some}
    for name, found in figures.items():
        lines += ["", f"**{name}, {len(found['peak'])} runs:** " + "; ".join(
            f"{what} median {statistics.median(values):.1%}, worst {max(values):.1%} ({len(values)} runs)"
            for what, values in found.items() if values
        ) + "."]  # fmt: skip
    lines += [
        "",
        "| run | longest batch | peak MB, forecast | measured | error | above baseline | plan "
        "| with proof: forecast | measured | error | seconds | forecast | after --probe |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        said, was, base = peak(r, constants), r["measured"]["peak_memory_mb"], baseline(r)
        proof, proven = peak(r, constants, True), r["measured"]["peak_memory_mb_with_proof"]
        seconds, plan = r["measured"]["seconds"], r["plan"]
        other = plan["stages_mb"]["loading"][memory.BASELINE] - base if plan else 0.0
        cells = [
            f"{r['case']['name']}{' *' if r['case']['fits'] else ''}",
            " x ".join(map(str, r["forecast"]["longest_batch"])),
            f"{said:,.0f}",
            f"{was:,.0f}",
            f"{error(said, was):+.1%}",
            f"{(said - was) / (was - base):+.0%}",
            f"{error(said + other, was):+.1%}" if plan else "",
            f"{proof:,.0f}",
            f"{proven:,.0f}",
            f"{error(proof, proven):+.1%}",
            f"{seconds:.1f}",
            f"{error(r['forecast']['seconds'], seconds):+.0%}",
            f"{error(plan['seconds'], seconds):+.0%}" if plan else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def baseline(result: Result) -> float:
    """MB of libraries, data and tokenizer."""
    return float(result["forecast"]["stages_mb"]["training"][memory.BASELINE])


def _errors(results: Sequence[Result], constants: Sequence[float]) -> dict[str, list[float]]:
    """Absolute relative errors."""
    found: dict[str, list[float]] = {"peak": [], "above the baseline": [], "with the proof": [], "time by probe": []}
    for r in results:
        was, proven = r["measured"]["peak_memory_mb"], r["measured"]["peak_memory_mb_with_proof"]
        off = abs(peak(r, constants) - was)
        found["peak"].append(off / was)
        found["above the baseline"].append(off / (was - baseline(r)))
        found["with the proof"].append(abs(error(peak(r, constants, True), proven)))
        if r["plan"]:
            found["time by probe"].append(abs(error(r["plan"]["seconds"], r["measured"]["seconds"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("planning-runs"), help="for models and runs")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold all of these words")
    parser.add_argument("--recount", action="store_true", help="forecast the finished runs anew, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what there is, and run nothing")
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    data, path, work = Path(os.environ["PTFT_TEST_DATA"]), HERE / "results.json", args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for case in sorted(CASES, key=lambda case: case.cost):
        wanted = all(word in case.name for word in args.only)
        if args.recount and case.name in results and wanted:
            results[case.name] = recount(case, results[case.name], data, work)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(case.name, flush=True)
        if args.recount or args.report or case.name in results or not wanted:
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
    known = [{**results[case.name], "case": described(case)} for case in CASES if case.name in results]
    if known:
        (HERE / "REPORT.md").write_text(report(known), encoding="utf-8")


if __name__ == "__main__":
    main()

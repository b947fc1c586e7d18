"""Forecasts of memory and time against runs: constants are fitted on eleven of them, and judged on the others.

    PTFT_TEST_DATA=... python -m benchmarks.planning.run [--work DIR] [--only WORD ...] [--again] [--report]

Each run is a ``ptft train`` of a few steps in a process of its own; some have a ``ptft plan --probe`` before. What is
finished is skipped. Writes ``bfloat16.json`` or, on a processor without its instructions, ``float32.json``, and
``REPORT.md`` of both beside this file; ``--report`` writes the latter alone, ``--recount`` what is forecast now.
``--again`` times the probed cases once more.
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
from ptft_hf.planning.machine import KEPT_KERNELS
from ptft_hf.planning.memory import Calibration
from ptft_hf.settings import bf16_is_faster

HERE = Path(__file__).parent
Result = Mapping[str, Any]
PRECISIONS = ("bfloat16", "float32")


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


def recount(case: Case, result: Result, half: bool, data: Path, work: Path) -> dict[str, Any]:
    """The result with what the code forecasts now, on the baseline that the run's process had; and what its constants
    are multiplied with."""
    from ptft_hf import planning, preparing
    from ptft_hf.planning.forecasts import forecast

    settings = {"bf16": half, **settings_of(case)}
    asked = preparing.make_plan(model_of(case, work), task_of(case, data, work), case.adapter, settings)
    _, arguments, sums = planning.count(asked, None, 42)
    of = memory.calibration_of("cpu", sums.half)
    now = forecast(sums, arguments, round(baseline(result) * 1e6), calibration=of, reads=planning.reading(asked))
    kept = {name: result["forecast"][name] for name in ("seconds", "limit_mb", "fits", "notes")}
    units = {"holes": sums.holes, "products": min(KEPT_KERNELS, sums.products)}
    return {**result, "forecast": {**now.to_dict(), **kept}, "half": sums.half, "units": units}


# ---- all of them ----


def peak(result: Result, constants: Calibration, proof: bool = False) -> float:
    """MB of a run's forecast, were its constants these."""
    stages = {name: dict(terms) for name, terms in result["forecast"]["stages_mb"].items()}
    found = {name: size / 1e6 for name, size in constants.terms(**result["units"]).items()}
    for name, terms in stages.items():
        terms |= found if name == "training" else {kind: found[kind] for kind in found if kind in terms}
    # What the training stage has of them is part of what is kept after it.
    then = sum(result["forecast"]["stages_mb"]["training"].values())
    more = sum(stages["training"].values()) - then
    for terms in stages.values():
        if memory.KEPT in terms:
            terms[memory.KEPT] += more
    return max(sum(terms.values()) for name, terms in stages.items() if proof or name != "proof")


def calibration(result: Result) -> Calibration:
    return memory.calibration_of("cpu", result["half"])


def error(said: float, was: float) -> float:
    return (said - was) / was


def fit(results: Sequence[Result], kernels: float) -> Calibration:
    """Constants of memory by least squares of relative errors, none below zero; kernels' code was measured alone."""
    import numpy as np
    from scipy.optimize import least_squares

    def constants(x: Any) -> Calibration:
        return Calibration(1e8 * float(x[0]), float(x[1]), kernels)

    def errors(x: Any) -> list[float]:
        return [error(peak(r, constants(x)), r["measured"]["peak_memory_mb"]) for r in results]

    return constants(least_squares(errors, np.full(2, 0.3), bounds=(0, np.inf), diff_step=1e-2).x)


def report(results: Mapping[str, Sequence[Result]]) -> str:
    """All of both precisions, by their names."""
    lines = [
        "# Forecasts of memory and time against runs",
        "",
        "`PTFT_TEST_DATA=... python -m benchmarks.planning.run`: each line is a `ptft train` of a few steps in a "
        "process of its own, and its forecast. The peak is the process's (`peak_memory_mb`); *above baseline* is the "
        "error of what stands above libraries, data and tokenizer. *plan* is the same forecast on the baseline of "
        "`ptft plan`, another process, in which no weights were loaded. Lines with * are those that the constants "
        "were fitted to; the others judge them.",
        "",
        "Forecasts of memory are those of today's code on the baseline that a run had (`--recount`). Kernels' code "
        "was measured alone (`python -m benchmarks.planning.kernels`, 0.5 to 0.7 MB; 0.5 is taken in view of the "
        "demo's runs). Of the judged lines, too, most had been run before on older versions, and terms "
        "were added in view of them: the best checkpoint that is read, the proof's logits, and holes in memory that "
        "a step has freed; how much of these is lost with activation checkpointing was set by the one run in float32 "
        "that has it.",
    ]
    for precision, some in results.items():
        lines += ["", f"## {precision}", "", *_section(some)]
    return "\n".join(lines) + "\n"


def _section(results: Sequence[Result]) -> list[str]:
    known = memory.calibration_of("cpu", any(r["half"] for r in results))
    fitted = [r for r in results if r["case"]["fits"]]
    judged = [r for r in results if not r["case"]["fits"]]
    threads = " or ".join(str(n) for n in sorted({r["hardware"]["threads"] for r in results}))
    lines = [f"Threads: {threads}."]
    if times := {1 + len(r["again"]) for r in results if "again" in r}:
        lines[0] += f" Of {max(times)} forecasts of time by probe (`--again`) the median error is told; "
        lines[0] += "seconds are the first's."
    if not all(r.get("alone", True) for r in results):
        lines[0] += " Of runs that were made beside other work no times are told."
    if fitted:
        lines += ["", f"Constants: {_named(known)}; a fit to the {len(fitted)} runs gives "
                      f"{_named(fit(fitted, known.kernels))}."]  # fmt: skip
    for name, some in (("judged", judged), ("fitted", fitted)):
        lines += ["", f"**{name}, {len(some)} runs:** " + "; ".join(
            f"{what} median {statistics.median(values):.1%}, worst {max(values):.1%} ({len(values)} runs)"
            for what, values in _errors(some).items() if values
        ) + "."] if some else []  # fmt: skip
    lines += [
        "",
        "| run | longest batch | peak MB, forecast | measured | error | above baseline | plan "
        "| with proof: forecast | measured | error | seconds | forecast | after --probe |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return [*lines, *map(_line, results)]


def _named(constants: Calibration) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in constants._asdict().items())


def _line(r: Result) -> str:
    of, base, plan = calibration(r), baseline(r), r["plan"]
    said, was = peak(r, of), r["measured"]["peak_memory_mb"]
    proof, proven = peak(r, of, True), r["measured"]["peak_memory_mb_with_proof"]
    seconds = r["measured"]["seconds"] if r.get("alone", True) else None
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
        f"{seconds:.1f}" if seconds else "",
        f"{error(r['forecast']['seconds'], seconds):+.0%}" if seconds else "",
        f"{by_probe(r):+.0%}" if seconds and plan else "",
    ]
    return f"| {' | '.join(cells)} |"


def baseline(result: Result) -> float:
    """MB of libraries, data and tokenizer."""
    return float(result["forecast"]["stages_mb"]["training"][memory.BASELINE])


def _errors(results: Sequence[Result]) -> dict[str, list[float]]:
    """Absolute relative errors."""
    found: dict[str, list[float]] = {"peak": [], "above the baseline": [], "with the proof": [], "time by probe": []}
    for r in results:
        was, proven = r["measured"]["peak_memory_mb"], r["measured"]["peak_memory_mb_with_proof"]
        of = calibration(r)
        off = abs(peak(r, of) - was)
        found["peak"].append(off / was)
        found["above the baseline"].append(off / (was - baseline(r)))
        found["with the proof"].append(abs(error(peak(r, of, True), proven)))
        if r["plan"] and r.get("alone", True):
            found["time by probe"].append(abs(by_probe(r)))
    return found


def by_probe(r: Result) -> float:
    """The error of the time after ``--probe``; of a case that was timed several times, the median."""
    once = {"forecast": r["plan"]["seconds"], "measured": r["measured"]["seconds"]}
    return statistics.median(error(one["forecast"], one["measured"]) for one in [once, *r.get("again", [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("planning-runs"), help="for models and runs")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold all of these words")
    parser.add_argument("--again", action="store_true", help="time the finished probed cases once more")
    parser.add_argument("--recount", action="store_true", help="forecast the finished runs anew, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what there is, and run nothing")
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    data, work = Path(os.environ["PTFT_TEST_DATA"]), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    files = {name: HERE / f"{name}.json" for name in PRECISIONS}
    results: dict[str, dict[str, Any]] = {
        name: json.loads(path.read_text("utf-8")) if path.exists() else {} for name, path in files.items()
    }
    mine = PRECISIONS[0] if bf16_is_faster() else PRECISIONS[1]
    for case in sorted(CASES, key=lambda case: case.cost):
        wanted = all(word in case.name for word in args.only)
        for precision, some in results.items() if args.recount and wanted else ():
            if case.name in some:
                some[case.name] = recount(case, some[case.name], precision == PRECISIONS[0], data, work)
                files[precision].write_text(json.dumps(some, indent=1) + "\n", encoding="utf-8")
                print(case.name, flush=True)
        again = args.again and case.probed and case.name in results[mine]
        if args.recount or args.report or not wanted or (case.name in results[mine] and not again):
            continue
        started = time.perf_counter()
        try:
            found = run_case(case, data, work)
        except RuntimeError as failed:
            print(f"{case.name}: FAILED: {failed}", flush=True)
            continue
        if again:
            once = {"forecast": found["plan"]["seconds"], "measured": found["measured"]["seconds"]}
            results[mine][case.name].setdefault("again", []).append(once)
        else:
            results[mine][case.name] = recount(case, found, mine == PRECISIONS[0], data, work)
        files[mine].write_text(json.dumps(results[mine], indent=1) + "\n", encoding="utf-8")
        was = found["measured"]["peak_memory_mb"]
        print(f"{case.name}: {was:,.0f} MB measured; {time.perf_counter() - started:.0f} s in all", flush=True)
    known = {
        precision: [{**some[case.name], "case": described(case)} for case in CASES if case.name in some]
        for precision, some in results.items()
    }
    (HERE / "REPORT.md").write_text(report({name: some for name, some in known.items() if some}), encoding="utf-8")


if __name__ == "__main__":
    main()

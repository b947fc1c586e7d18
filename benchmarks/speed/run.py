"""Interleaved runs of the contestants (A B C A B C ...), their medians, and how ours compares with each.

    PTFT_TEST_DATA=... python benchmarks/speed/run.py [--repeats 3] [--adapterhub-python PATH]

Each run is a process of its own; nothing else should use the machine. Writes results.json beside this file.
Absolute times belong to one machine; the ratios are what can be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import common

HERE = Path(__file__).parent
TARGETS = {"loop": 1.2, "padded_trainer": 7.0, "adapterhub": 2.5}
"""How many times the rows per second of each we aim at."""
MEMORY_TARGET = 1.1
"""How many times the loop's peak memory we allow ourselves."""


def run_once(python: str, method: str, flags: list[str]) -> dict[str, Any]:
    """One contestant in a fresh process; the JSON line it printed."""
    command = [python, str(HERE / f"{method}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summarize(runs: list[dict[str, Any]], methods: list[str]) -> dict[str, Any]:
    """Medians by method, and ours over each: rows per second (higher is better), peak memory (lower is)."""
    fields = ("seconds", "rows_per_second", "peak_memory_mb")
    medians = {m: {f: median(run[f] for run in runs if run["method"] == m) for f in fields} for m in methods}
    if "ours" not in medians:
        return {"medians": medians, "ratios": {}}
    ours = medians["ours"]
    ratios = {
        method: {f: round(ours[f] / other[f], 3) for f in ("rows_per_second", "peak_memory_mb")}
        for method, other in medians.items()
        if method != "ours"
    }
    return {"medians": medians, "ratios": ratios}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| method | seconds | rows/s | peak MB | ours, rows/s | aim | ours, memory | aim |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, m in summary["medians"].items():
        cells = [f"{m['seconds']:.1f}", f"{m['rows_per_second']:.1f}", f"{m['peak_memory_mb']:.0f}"]
        if method in summary["ratios"]:
            ratio = summary["ratios"][method]
            aim = f"<= {MEMORY_TARGET}x" if method == "loop" else ""
            cells += [f"{ratio['rows_per_second']:.2f}x", f">= {TARGETS[method]}x"]
            cells += [f"{ratio['peak_memory_mb']:.2f}x", aim]
        else:
            cells += [""] * 4
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["loop", "ours", "padded_trainer"],
        choices=["loop", "ours", "padded_trainer"],
    )
    parser.add_argument(
        "--adapterhub-python", help="python of an environment that has `adapters`; adds adapterhub"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()

    methods = [*args.methods, *(["adapterhub"] if args.adapterhub_python else [])]
    flags = ["--rows", str(args.rows), "--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
    flags += ["--model", str(common.model_folder(args).resolve())]
    flags += ["--lr", str(args.lr)] if args.lr is not None else []
    flags += [flag for flag in ("--full", "--evaluate") if getattr(args, flag[2:])]
    runs = []
    for repeat in range(args.repeats):
        for method in methods:
            python = args.adapterhub_python if method == "adapterhub" else sys.executable
            runs.append(run_once(python, method, [*flags, "--seed", str(args.seed + repeat)]))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    summary = summarize(runs, methods)
    print(table(summary))
    settings = {
        "rows": args.rows,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
    }
    result = {"machine": machine(), "settings": settings, **summary, "runs": runs}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Is what is fast as good? Test accuracy over seeds, four epochs: LoRA and full fine-tuning, ours and the loop's.

    PTFT_TEST_DATA=... python benchmarks/speed/quality.py [--seeds 0 1 2]

One short epoch is noise, so this is no part of run.py. Each run is a process of its own; runs that are in
quality.json already are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from run import HERE, run_once

CONTESTANTS: dict[str, tuple[str, ...]] = {
    "ours, LoRA (no dropout in the frozen trunk)": ("ours",),
    "ours, LoRA, adapter.trunk_dropout=true": ("ours", "--trunk-dropout"),
    "ours, full": ("ours", "--full"),
    "loop, full": ("loop", "--full"),
    "loop, LoRA": ("loop",),
}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| method | seeds | test accuracy, each | mean ± standard deviation |", "|---|---|---|---:|"]
    for name, runs in results.items():
        values = [100 * run["test_accuracy"] for run in runs.values()]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {', '.join(runs)} | {each} | {statistics.mean(values):.1f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    path: Path = HERE / "quality.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for seed in args.seeds:
        for name, (method, *flags) in CONTESTANTS.items():
            if str(seed) in results.setdefault(name, {}):
                continue
            settings = [
                "--rows",
                str(args.rows),
                "--epochs",
                str(args.epochs),
                "--seed",
                str(seed),
                "--evaluate",
            ]
            run = run_once(sys.executable, method, [*settings, *flags])
            results[name][str(seed)] = {k: run[k] for k in ("rows", "epochs", "test_accuracy")}
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(name, seed, run["test_accuracy"], file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

"""A Pfeiffer adapter on MiniLM: ours against AdapterHub's library, in the environment of its own.

    PTFT_TEST_DATA=... python benchmarks/speed/pfeiffer.py --adapterhub-python PATH [--repeats 3]

Twice, interleaved: each with its own defaults (AdapterHub's: fp32, random batches, dynamic padding); and both in fp32
with dropout everywhere, over the very same batches. One epoch of the first 2,000 rows of sentence polarity, batch 32.
Nothing else should use the machine. Writes pfeiffer.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import common
from run import machine, run_once
from transformers import AutoTokenizer

from ptft_hf.sampling import EpochSampler

HERE = Path(__file__).parent
AIMS = {"defaults": 2.0, "same batches, fp32": 1.0}
"""How many times AdapterHub's rows per second we aim at."""


def write_order(args: argparse.Namespace, seed: int, path: Path) -> None:
    """The rows as ours takes them: ``adapterhub.py`` then pads the same rows together."""
    texts = [row["text"] for row in common.read_rows("train", args.rows)]
    tokenizer = AutoTokenizer.from_pretrained(common.model_folder(args))
    ids = tokenizer(texts, truncation=True, max_length=common.MAX_LENGTH)["input_ids"]
    order = EpochSampler(len(ids), args.batch_size, seed, lengths=[len(row) for row in ids])
    path.write_text(json.dumps(list(order)), encoding="utf-8")


def table(summary: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | AdapterHub, rows/s | ours, rows/s | ratio | aim | AdapterHub, peak MB | ours, peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in summary.items():
        hub, ours = found["adapterhub"], found["ours"]
        lines.append(
            f"| {name} | {hub['rows_per_second']:.1f} | {ours['rows_per_second']:.1f} | {found['ratio']:.2f} | "
            f">= {AIMS[name]} | {hub['peak_memory_mb']:.0f} | {ours['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapterhub-python", required=True, help="of an environment that has `adapters`")
    parser.add_argument("--output", type=Path, default=HERE / "pfeiffer.json")
    args = parser.parse_args()
    flags = ["--pfeiffer", "--lr", "1e-4", "--rows", str(args.rows), "--batch-size", str(args.batch_size)]
    flags += ["--model", str(common.model_folder(args).resolve())]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order.json"
        sides: dict[str, tuple[list[str], list[str]]] = {
            "defaults": ([], []),
            "same batches, fp32": (["--order", str(order)], ["--fp32", "--trunk-dropout"]),
        }
        for seed in range(args.seed, args.seed + args.repeats):
            write_order(args, seed, order)
            for name, (of_hub, of_ours) in sides.items():
                for python, method, own in (
                    (args.adapterhub_python, "adapterhub", of_hub),
                    (sys.executable, "ours", of_ours),
                ):
                    found = run_once(python, method, [*flags, "--seed", str(seed), *own])
                    runs.append({"side": name, **found})
                    print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    summary: dict[str, dict[str, Any]] = {}
    for name in AIMS:
        medians = {
            method: {
                field: median(run[field] for run in runs if (run["side"], run["method"]) == (name, method))
                for field in ("seconds", "rows_per_second", "peak_memory_mb")
            }
            for method in ("adapterhub", "ours")
        }
        ratio = medians["ours"]["rows_per_second"] / medians["adapterhub"]["rows_per_second"]
        summary[name] = {**medians, "ratio": round(ratio, 3)}
    print(table(summary))
    settings = {name: getattr(args, name) for name in ("rows", "batch_size", "repeats")}
    result = {"machine": machine(), "settings": settings, "summary": summary, "runs": runs}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

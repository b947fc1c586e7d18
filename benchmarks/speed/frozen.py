"""Training the head alone, or the two top layers, with the frozen layers computed once and in every epoch.

    PTFT_TEST_DATA=... python benchmarks/speed/frozen.py [--repeats 3]

Interleaved runs of five epochs, each a process of its own; medians and ratios. Nothing else should use the machine.
Dropout is off on both sides, everywhere. The clock counts what is computed before the first step, and no evaluation.
Writes frozen.json beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import common
from ours import write_task
from run import machine

HERE = Path(__file__).parent
TARGETS = {"partial/head_only": 4.0, "partial/top_2_layers": 1.4}
"""How many times faster we aim to be with the activations kept."""


def without_dropout(model: Path, folder: Path) -> Path:
    """The same checkpoint, whose configuration has no dropout."""
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {name: 0.0 for name in config if "dropout" in name and config[name]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def one(args: argparse.Namespace) -> None:
    """A run; prints its JSON line."""
    from ptft_hf import train

    settings = {"num_train_epochs": args.epochs, "per_device_train_batch_size": args.batch_size}
    if args.without:
        settings["adapter.frozen_cache_gb"] = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = train(
            model=str(without_dropout(common.model_folder(args), Path(folder) / "model")),
            task=str(write_task(Path(folder), args.rows)),
            adapter=args.adapter,
            output_dir=str(Path(folder) / "output"),
            seed=args.seed,
            settings=settings,
        )
        lines = (Path(folder) / "output" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    training = result.run["training"]
    line = {
        "adapter": args.adapter,
        "kept": not args.without,
        "layers_computed_once": training["layers_computed_once"],
        "seconds": round(training["seconds"], 3),
        "peak_memory_mb": round(training["peak_memory_mb"], 1),
        "losses": losses,
        "test_accuracy": result.run["metrics"]["test"]["accuracy"],
    }
    print(json.dumps(line), flush=True)


def summarize(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each adapter the medians, their ratio, and how far the losses of a pair of runs are apart."""
    result = {}
    for adapter in TARGETS:
        with_, without = (
            [run for run in runs if run["adapter"] == adapter and run["kept"] == kept]
            for kept in (True, False)
        )
        seconds = [median(run["seconds"] for run in side) for side in (with_, without)]
        pairs = [zip(a["losses"], b["losses"], strict=True) for a, b in zip(with_, without, strict=True)]
        result[adapter] = {
            "seconds_with": seconds[0],
            "seconds_without": seconds[1],
            "times_faster": round(seconds[1] / seconds[0], 2),
            "largest_loss_difference": max(abs(a - b) for pair in pairs for a, b in pair),
            "accuracy_with": median(run["test_accuracy"] for run in with_),
            "accuracy_without": median(run["test_accuracy"] for run in without),
        }
    return result


def table(summary: dict[str, dict[str, float]]) -> str:
    lines = [
        "| method | with, s | without, s | times faster | aim | losses differ by | accuracy with, without |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for adapter, found in summary.items():
        lines.append(
            f"| {adapter} | {found['seconds_with']:.1f} | {found['seconds_without']:.1f} | "
            f"{found['times_faster']:.2f}x | >= {TARGETS[adapter]}x | {found['largest_loss_difference']:.1e} | "
            f"{found['accuracy_with']:.3f}, {found['accuracy_without']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(epochs=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "frozen.json")
    parser.add_argument("--adapter", help="a single run of this method")
    parser.add_argument("--without", action="store_true", help="a single run without the activations kept")
    args = parser.parse_args()
    if args.adapter:
        one(args)
        return
    flags = ["--rows", args.rows, "--epochs", args.epochs, "--batch-size", args.batch_size]
    flags += ["--model", common.model_folder(args).resolve()]
    runs = []
    for repeat in range(args.repeats):
        for adapter in TARGETS:
            for side in ([], ["--without"]):
                command = [sys.executable, __file__, "--adapter", adapter, "--seed", args.seed + repeat, *flags]
                done = subprocess.run([*map(str, command), *side], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{command} failed:\n{done.stderr[-4000:]}")
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
                print({**runs[-1], "losses": runs[-1]["losses"][-1]}, file=sys.stderr, flush=True)
    summary = summarize(runs)
    print(table(summary))
    settings = {name: getattr(args, name) for name in ("rows", "epochs", "batch_size", "repeats")}
    result = {"machine": machine(), "settings": settings, "summary": summary, "runs": runs}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

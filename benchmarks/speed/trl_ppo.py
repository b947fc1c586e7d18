"""TRL's PPO with LoRA, for an environment of its own (``pip install trl==1.12.0 torch==2.13.0``).

    python benchmarks/speed/trl_ppo.py --model FOLDER --prompts FILE --updates 3 --critic lora --dtype float32

Prints one JSON line: seconds of each update and the process's peak memory. ``FILE`` holds lists of token ids.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """When each update has been logged."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--critic", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    bf16 = args.dtype == "bfloat16"
    frozen = torch.bfloat16 if bf16 else torch.float32  # adapters on it stay in float32
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=frozen)
    scorers = []
    for dtype in (frozen, torch.float32 if args.critic == "full" else frozen):
        torch.manual_seed(0)
        options = {"num_labels": 1, "dtype": dtype, "pad_token_id": tokenizer.pad_token_id}
        scorers.append(AutoModelForSequenceClassification.from_pretrained(args.model, **options))
    reward, critic = scorers
    if args.critic == "lora":
        critic = get_peft_model(critic, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora))
    rows = [{"input_ids": ids} for ids in json.loads(args.prompts.read_text("utf-8"))]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1,
            num_mini_batches=1, num_ppo_epochs=1, total_episodes=args.updates * args.batch_size,
            response_length=args.response_length, temperature=1.0, learning_rate=1e-4, kl_coef=0.05, seed=0,
            num_sample_generations=0, use_cpu=True, bf16=bf16, report_to="none", save_strategy="no", logging_steps=1,
            local_rollout_forward_batch_size=args.batch_size,
        )  # fmt: skip
        trainer = PPOTrainer(
            config,
            tokenizer,
            policy,
            None,
            reward,
            datasets.Dataset.from_list(rows),
            critic,
            eval_dataset=datasets.Dataset.from_list(rows[:1]),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
            callbacks=[clock],
        )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][: args.updates]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"seconds": seconds, "peak_memory_mb": memory}), flush=True)


if __name__ == "__main__":
    main()

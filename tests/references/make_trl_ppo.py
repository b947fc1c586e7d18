"""Writes ``trl_ppo.safetensors``: what TRL's PPO trainer computed on the way of two updates of a tiny Llama.

For an environment of its own, since TRL 1.12.0 is the last release that has PPO::

    python3.11 -m venv trl && trl/bin/pip install trl==1.12.0 torch==2.13.0
    PYTHONPATH=. trl/bin/python -m tests.references.make_trl_ppo

The trainer's loop is one function, so its local variables are read, line by line, while it runs. Tensors are named
``u<update>.<name>`` and ``u<update>.m<minibatch>.<name>``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.tiny import make_checkpoint, make_tokenizer

FILE = Path(__file__).parent / "trl_ppo.safetensors"
ONCE = ("scores", "contain_eos_token", "logprobs", "ref_logprobs", "values", "kl", "non_score_reward", "rewards",
        "advantages", "returns", "padding_mask", "padding_mask_p1", "sequence_lengths")  # fmt: skip
EACH = ("micro_batch_inds", "new_logprobs", "vpred", "vf_loss", "vf_clipfrac", "pg_loss", "pg_clipfrac", "approxkl",
        "entropy")  # fmt: skip
SETTINGS: dict[str, Any] = dict(
    learning_rate=5e-3, per_device_train_batch_size=4, gradient_accumulation_steps=4, num_mini_batches=2,
    num_ppo_epochs=2, total_episodes=32, response_length=6, temperature=1.3, missing_eos_penalty=0.7,
    stop_token="eos", kl_coef=0.15, kl_estimator="k3", cliprange=0.05, cliprange_value=0.03, vf_coef=0.3, gamma=0.9,
    lam=0.8, whiten_rewards=True, seed=5, num_sample_generations=0, use_cpu=True, bf16=False, report_to="none",
    save_strategy="no", logging_steps=1,
)  # fmt: skip


def read_locals(found: dict[str, torch.Tensor]) -> Any:
    """A trace function that keeps the tensors of ``PPOTrainer.train`` when they are complete."""
    last: Any = None
    number = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal last, number
        values = frame.f_locals
        if values.get("approxkl", last) is not last:  # the last that a minibatch computes
            last, update = values["approxkl"], f"u{values['update']}"
            if f"{update}.returns" not in found:
                keep(found, update, ONCE, values)
                number = 0
            where = f"{update}.m{number}"
            keep(found, where, (*EACH, *(["logits"] if where == "u1.m1" else [])), values)
            number += 1
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        return line if frame.f_code is PPOTrainer.train.__code__ else None

    return call


def keep(found: dict[str, torch.Tensor], where: str, names: tuple[str, ...], values: dict[str, Any]) -> None:
    for name in names:
        value = torch.as_tensor(values[name]).detach().clone().contiguous()
        found[f"{where}.{name}"] = value.to(torch.uint8) if value.dtype == torch.bool else value


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = make_checkpoint("llama", Path(folder) / "base", pad_token_id=0, initializer_range=0.3)
        tokenizer = make_tokenizer("bert")  # the same words, with a padding token
        tokenizer.padding_side = "left"
        models = []
        for number, auto in enumerate([AutoModelForCausalLM] * 2 + [AutoModelForSequenceClassification] * 2):
            torch.manual_seed(number)
            options = {"num_labels": 1} if number > 1 else {}
            models.append(auto.from_pretrained(base, **options))
        for model in models[:2]:
            with torch.no_grad():
                model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) * 0.3)
                model.lm_head.weight[2] *= 4  # end marks where they happen to be likely
        texts = [
            "the film",
            "a good story was",
            "this plot",
            "the actor is very",
            "a scene",
            "so much",
            "the a",
            "is",
        ]
        rows = [{"input_ids": tokenizer(text)["input_ids"][:-1]} for text in texts * 2]
        trainer = PPOTrainer(
            PPOConfig(output_dir=folder, **SETTINGS),
            tokenizer,
            models[0],
            models[1],
            models[2],
            datasets.Dataset.from_list(rows),
            models[3],
            eval_dataset=datasets.Dataset.from_list(rows[:1]),
        )
        found: dict[str, torch.Tensor] = {}
        sys.settrace(read_locals(found))
        trainer.train()
        sys.settrace(None)
    save_file(found, FILE)
    for name, value in found.items():
        print(name, tuple(value.shape))


if __name__ == "__main__":
    main()

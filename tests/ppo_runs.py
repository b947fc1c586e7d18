"""What the tests of PPO share: tiny causal language models, prompts, and a reward whose best is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers

from ptft_hf import models
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf import ppo
from ptft_hf.rlhf.preparing import make_plan, prepare
from tests.tiny import SIZES, SPECIAL, make_tokenizer

LORA = "lora/r8_attention"
QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 6,
    "temperature": 1.0,
    "total_episodes": 40,
    "learning_rate": 1e-2,
    "bf16": False,
    "num_sample_generations": 0,
    "save_steps": 0,
}
"""Five updates of 8 answers, each of 4 optimizer steps."""
LEARN: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "num_mini_batches": 1,
    "response_length": 4,
    "value_model": "policy_trunk",
    "learning_rate": 5e-3,
    "num_ppo_epochs": 4,
    "lr_scheduler_type": "constant",
    "kl_coef": 0.0,
    "adapter": "lora/r16_all_linear",
}
"""A policy that has hardly a good word learns to say little else, in 60 updates."""
TEXTS = (
    "the film",
    "a good story was",
    "this plot",
    "the actor is very",
    "a scene",
    "so much",
    "the a",
    "is",
)


def make_language_model(name: str, folder: Path, **overrides: Any) -> Path:
    """A random causal LM. Its weights are large enough that a policy can make any token likely."""
    ids = {f"{key}_token_id": SPECIAL[key] for key in ("pad", "bos", "eos")}
    positions = "n_positions" if name == "gpt2" else "max_position_embeddings"
    tokenizer = make_tokenizer("bert")
    options = {**SIZES[name], **ids, positions: 72, "initializer_range": 0.5, **overrides}
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **options)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def make_classifier(folder: Path) -> Path:
    """A random classifier with two labels, ``LABEL_0`` and ``LABEL_1``."""
    tokenizer = make_tokenizer("bert")
    config = transformers.AutoConfig.for_model("bert", vocab_size=len(tokenizer), **SIZES["bert"])
    model: Any = transformers.AutoModelForSequenceClassification
    model.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_folder(base: Path, folder: Path, seed: int = 3) -> Path:
    """A reward model that is a LoRA with a head, as PEFT saves it."""
    torch.manual_seed(seed)
    with models.quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        config = peft.LoraConfig(
            "SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"]
        )
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(folder)
    return folder


def sft_adapter(base: Path, folder: Path) -> Path:
    """A LoRA of a causal LM, as plain PEFT saves it."""
    torch.manual_seed(4)
    with models.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig("CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(folder)
    return folder


def change_weights(folder: Path) -> None:
    """Others in the same file."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    save_file({name: -3 * value for name, value in load_file(path).items()}, path, {"format": "pt"})


def prompts(count: int = 16) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [{"prompt": f"{TEXTS[i % 8]} {name} {i}", "reference": "a lovely film"} for i in range(rows)]
            )
            for name, rows in (("train", count), ("validation", 4), ("test", 4))
        }
    )


def share_of_good(prompts: list[str], answers: list[str]) -> list[float]:
    """The share of the word ``good`` among an answer's; 1 at best."""
    return [answer.split().count("good") / max(1, len(answer.split())) for answer in answers]


def length(prompts: list[str], answers: list[str]) -> list[float]:
    return [len(answer.split()) / 6 for answer in answers]


def characters(prompts: list[str], answers: list[str]) -> list[float]:
    """Of an answer's text: other ones for other answers, so that there is something to learn from the first on."""
    return [len(answer) / 20 for answer in answers]


def by_prompt(prompts: list[str], answers: list[str]) -> list[float]:
    """Of the prompt's text, too: a critic can learn that."""
    return [len(p) / 10 + len(a) / 20 for p, a in zip(prompts, answers, strict=True)]


def recipe(**fields: Any) -> PromptsRecipe:
    return PromptsRecipe(name="test", family="prompts", **fields)


def task_file(folder: Path, count: int = 8) -> Path:
    """The recipe of prompts in files, for the command line."""
    rows = "".join(json.dumps({"prompt": f"{TEXTS[i % 8]} film {i}"}) + "\n" for i in range(count))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    for name in files.values():
        (folder / name).write_text(rows, encoding="utf-8")
    path = folder / "prompts.yaml"
    given = {"family": "prompts", "leakage": "warn", "data": {"path": "json", "data_files": files}}
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def run_ppo(policy: Path, folder: Path, reward: Any = share_of_good, **given: Any) -> dict[str, Any]:
    """A run on :func:`prompts`; what is no argument of ``train_ppo`` is a setting."""
    names = ("adapter", "judge", "data", "seed", "resume", "overwrite", "task")
    arguments = {name: given.pop(name) for name in names if name in given}
    arguments = {"task": recipe(), "data": prompts(), "seed": 1, **arguments}
    return ppo.train_ppo(
        policy=policy, reward=reward, output_dir=folder, settings={**QUICK, **given}, **arguments
    )


def make_run(
    policy: Path, folder: Path, reward: Any = share_of_good, adapter: Any = LORA, judge: Any = None, **settings: Any
) -> ppo.Run:
    """A run before its first update."""
    plan = make_plan(policy, reward, recipe(), adapter, judge, 1, {**QUICK, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    return ppo.Run(plan, prepare(plan, prompts()), folder)


def frozen(run: ppo.Run) -> dict[str, torch.Tensor]:
    """Everything on the base but what policy and critic train."""
    own = {id(p) for part in run.trained.values() for p in part.values()}
    state = {n: p.detach().clone() for n, p in run.roles.policy.model.named_parameters() if id(p) not in own}
    heads = [role.head for role in run.roles.scorers.values() if role.head is not None]
    return state | {f"head {number}": head.weight.detach().clone() for number, head in enumerate(heads)}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [{name: value for name, value in line.items() if "time/" not in name} for line in lines]

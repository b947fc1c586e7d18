"""Tiny random checkpoints that write, and a small task that they can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets

from tests.conftest import FILLERS, WORDS
from tests.tiny import SIZES, SPECIAL, make_tokenizer

WRITERS = ("t5", "bart", "pegasus", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "opt")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}"
    "{{ eos_token + '\n' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
WITH_ENCODER = ("t5", "bart", "pegasus")


def make_writer(name: str, folder: Path, *, chat: bool = False, **overrides: Any) -> Path:
    """Save a random language model of an architecture, as pretraining would leave it; initial weights that are large
    enough for it to write texts that differ."""
    import torch
    import transformers

    tokenizer = make_tokenizer(name)
    if chat:
        tokenizer.chat_template = CHAT
    ids = {f"{key}_token_id": SPECIAL[key] for key in ("pad", "bos", "eos")}
    if name in ("gpt2", "llama"):
        del ids["pad_token_id"]
    sizes = {"init_std": 0.3} if name in ("bart", "pegasus", "opt") else {"initializer_range": 0.3}
    sizes |= {} if name == "t5" else {"n_positions" if name == "gpt2" else "max_position_embeddings": 72}
    if name in WITH_ENCODER:
        start = SPECIAL["eos" if name == "bart" else "pad"]
        ids |= {"decoder_start_token_id": start, "forced_eos_token_id": None}
    dropout = {} if name in ("llama", "mistral", "qwen2", "qwen3", "gemma") else {"dropout": 0.0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if name == "gpt2" else dropout
    dropout = {"dropout_rate": 0.0} if name == "t5" else dropout
    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=len(tokenizer),
        **{**SIZES["bart" if name == "pegasus" else name], **sizes, **dropout, **ids, **overrides},
    )
    auto: Any = transformers.AutoModelForSeq2SeqLM if name in WITH_ENCODER else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(7)
        auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(count: int, seed: int = 0, longest: int = 12, references: bool = False) -> list[dict[str, Any]]:
    """Texts of unequal length with one telling word, and a summary that names it; ``references`` gives two."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [draw.choice(FILLERS.split()) for _ in range(draw.randint(3, longest))]
        telling = draw.choice(WORDS["pos"] + WORDS["neg"])
        words.insert(draw.randrange(len(words)), telling)
        summary: Any = f"the {telling} film"
        rows.append(
            {
                "document": f"{' '.join(words)} {i} .",
                "summary": [summary, f"so {telling}"] if references else summary,
            }
        )
    return rows


def splits(count: int, longest: int = 12, references: bool = False) -> datasets.DatasetDict:
    sizes = {"train": count, "validation": 8, "test": 8}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(reviews(n, seed, longest, references))
            for seed, (name, n) in enumerate(sizes.items())
        }
    )

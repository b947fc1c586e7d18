"""What the tests of preferences share: pairs of answers that one word tells apart, and a family that reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets

from ptft_hf.data import Splits
from ptft_hf.recipes import PreferenceRecipe
from ptft_hf.tasks.preference import Preference
from tests.conftest import FILLERS, WORDS
from tests.tiny import make_tokenizer

SPACED = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' , ' + m['content'] + eos_token + ' .' }}{% endfor %}"
"""A chat template that ends each turn with a mark and writes something behind it, as many do."""


def pairs(count: int, seed: int = 0, *, messages: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Rows whose chosen answers hold a good word and whose rejected ones a bad one, in texts of unequal length."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> list[str]:
        return [draw.choice(FILLERS.split()) for _ in range(draw.randint(least, most))]

    found = []
    for number in range(count):
        prompt = f"{' '.join(text(1, 8))} {seed} {number} ,"
        answers = []
        for kind in ("pos", "neg"):
            words = text(1, 6)
            words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[kind]))
            answers.append(" " + " ".join(words))
        row: dict[str, Any] = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        if messages:
            row = {
                name: [{"role": "user" if name == "prompt" else "assistant", "content": value.strip()}]
                for name, value in row.items()
            }
        found.append({**row, **more})
    return found


def splits(count: int, **options: Any) -> datasets.DatasetDict:
    sizes = {"train": count, "validation": 12, "test": 8}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(pairs(n, i, **options)) for i, (name, n) in enumerate(sizes.items())}
    )


def recipe(**fields: Any) -> PreferenceRecipe:
    return PreferenceRecipe(name="test", family="preference", **fields)


def looked(rows: list[dict[str, Any]], *, held: list[dict[str, Any]] | None = None) -> Preference:
    """The family after it has looked at these rows."""
    task = Preference(recipe())
    train, other = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(held or rows)
    task.notes = task.look_at(Splits(train, other, other, []))  # type: ignore[attr-defined]
    return task


def family(
    architecture: str, rows: list[dict[str, Any]], *, chat: str | None = None, **changes: Any
) -> tuple[Preference, Any]:
    """The family as it reads for an architecture, and its tokenizer; ``changes`` are attributes of the tokenizer."""
    import transformers

    tokenizer = make_tokenizer(architecture)
    tokenizer.chat_template = chat
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    task = looked(rows)
    config = transformers.AutoConfig.for_model(architecture)
    task.notes = task.look_at_checkpoint(config, tokenizer)  # type: ignore[attr-defined]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return task, tokenizer


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def make_decoder(folder: Path, name: str = "llama", *, chat: str | None = None, **overrides: Any) -> Path:
    """A causal LM for PPO's tests whose tokenizer pads with its end token, which it writes behind no text."""
    from tokenizers import processors

    from tests.ppo_runs import make_language_model

    make_language_model(name, folder, **overrides)
    tokenizer = make_tokenizer(name)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, chat
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder

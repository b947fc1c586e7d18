"""Rows as TRL's trainers have them: prompts that are answered, and pairs of answers."""

from __future__ import annotations

from typing import Any

from ptft_hf import data, tasks
from ptft_hf.errors import DataError
from ptft_hf.recipes.models import TaskRecipe
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.tasks import conversations, pairs, turns
from ptft_hf.tasks.prompts import Prompts


def load_splits(recipe: TaskRecipe, source: Any, seed: int) -> data.Splits:
    """The data, and what is to be said of it.

    Raises:
        DataError: It cannot be had, or is not what the recipe's family learns from.
    """
    if isinstance(recipe, PromptsRecipe):
        return Prompts(recipe).load_splits(source, seed)
    family = tasks.build(recipe)
    splits = tasks.load_splits(family, source, recipe, seed)
    return splits._replace(notes=[*splits.notes, *family.look_at(splits)])


def prompts_of(recipe: PromptsRecipe, table: Any, tokenizer: Any, longest: int) -> tuple[Any, list[str]]:
    """``prompt``: texts or messages, the same that PPO answers, and what is to be said of those that are left out.

    Raises:
        DataError: None is left, conversations meet a tokenizer without a chat template, or some would be cut.
    """
    import datasets

    prompts, notes = Prompts(recipe).encode(table, tokenizer, longest)
    given = [prompt.source for prompt in prompts]
    if not isinstance(table[0]["prompt"], str) and any(isinstance(prompt, str) for prompt in given):
        raise DataError(
            f"{recipe.name}: prompt_tokens: {recipe.prompt_tokens} would cut conversations, which TRL takes whole; "
            "leave it out, or raise it"
        )
    given = [prompt if isinstance(prompt, str) else turns.plain(tokenizer, prompt) for prompt in given]
    return datasets.Dataset.from_list([{"prompt": prompt} for prompt in given]), notes


def pairs_of(table: Any, tokenizer: Any, algorithm: str) -> tuple[Any, list[str]]:
    """``prompt``, ``chosen`` and ``rejected``: messages where the tokenizer has a chat template, else texts; and what
    is to be said of ties and margins, of which TRL's trainers know nothing, and of answers without one prompt.

    Raises:
        DataError: No pair is left.
    """
    import datasets

    made: list[dict[str, Any]] = []
    without = {
        f"are ties, which {algorithm} cannot use, and are left out": 0,
        f"answer two prompts, which {algorithm} cannot compare, and are left out": 0,
        "have no prompt, which the chat template needs, and are left out": 0,
    }
    ties, different, empty = without
    for row in table:
        first, second = pairs.conversations_of(row)
        if pairs.is_tie(row):
            without[ties] += 1
        elif first[:-1] != second[:-1]:
            without[different] += 1
        elif not tokenizer.chat_template:
            prompt, chosen = conversations.parts_of(first)
            made.append({"prompt": prompt, "chosen": chosen, "rejected": conversations.parts_of(second)[1]})
        elif first[:-1]:
            made.append({"prompt": first[:-1], "chosen": first[-1:], "rejected": second[-1:]})
        else:
            without[empty] += 1
    margins = sum(pairs.margin_of(row) > 0 for row in table)
    counts = {**without, f"have a margin, which {algorithm} does not use": margins}
    notes = [f"{count:,} of {len(table):,} pairs {what}" for what, count in counts.items() if count]
    if not made:
        raise DataError("no pair is left", *notes)
    return datasets.Dataset.from_list(made), notes

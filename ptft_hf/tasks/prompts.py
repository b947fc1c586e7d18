"""Prompts: texts or conversations to be answered, and reference answers where the data has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ptft_hf import data
from ptft_hf.errors import DataError
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.tasks.prompting import beginning


class Prompt(NamedTuple):
    """One prompt."""

    ids: list[int]
    text: str
    """As the model reads it, and as it is handed to rewards; of a conversation, the chat template's text."""
    reference: str
    """Somebody's answer, for people who read the samples; empty if there is none."""
    source: Any
    """As the data has it, a text or messages: reward models may read prompts in a form of their own."""
    row: int
    """Its place in the split."""


class Prompts:
    """The family ``prompts``. It is no :class:`ptft_hf.tasks.Task`: there is nothing to be right or wrong about.

    A prompt is a text or a conversation (a list of messages), in the column ``prompt`` or ``messages``.
    """

    def __init__(self, recipe: PromptsRecipe) -> None:
        self.recipe = recipe

    def load_splits(self, source: Any, seed: int) -> data.Splits:
        """The prompts of all splits, under ``prompt``, with ``reference`` where there is one.

        Raises:
            DataError: As :func:`ptft_hf.data.load_splits`.
        """
        columns = dict(self.recipe.columns)
        conversations = columns.pop("messages", None)
        if conversations is not None:
            columns["prompt"] = conversations
        try:
            splits = _load(source, columns, seed)
        except DataError as error:
            if "prompt" in columns:
                raise
            try:
                splits = _load(source, {**columns, "prompt": "messages"}, seed)
            except DataError:
                raise error from None
        if not isinstance(splits.train[0]["prompt"], str):  # of conversations no leakage is looked for
            return splits
        return data.check_leakage(splits, ("prompt",), None, self.recipe.leakage)

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[list[Prompt], list[str]]:
        """The prompts of at most ``max_length`` tokens, and what is to be said aloud of the others.

        A prompt that is cut asks for something else, so longer ones are left out.

        Raises:
            DataError: None is left, or conversations meet a tokenizer without a chat template.
        """
        prompts = [self._prompt(row, tokenizer, place) for place, row in enumerate(rows)]
        kept = [prompt for prompt in prompts if 0 < len(prompt.ids) <= max_length]
        if not kept:
            raise DataError(
                f"{self.recipe.name}: none of {len(prompts):,} prompts has at most {max_length} tokens "
                "(model.max_length)"
            )
        if len(kept) == len(prompts):
            return kept, []
        left = len(prompts) - len(kept)
        return kept, [
            f"{left:,} of {len(prompts):,} prompts are longer than {max_length} tokens and are left out"
        ]

    def _prompt(self, row: Mapping[str, Any], tokenizer: Any, place: int) -> Prompt:
        given = row["prompt"]
        if isinstance(given, str):
            ids, text = beginning(tokenizer, given), given
        else:
            if not tokenizer.chat_template:
                raise DataError(
                    f"{self.recipe.name}: the prompts are conversations, and the policy's tokenizer has no chat "
                    "template; give prompts as text, or another policy"
                )
            text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has the marks
        if self.recipe.prompt_tokens is not None and len(ids) > self.recipe.prompt_tokens:
            ids = ids[: self.recipe.prompt_tokens]
            given = text = tokenizer.decode(ids, skip_special_tokens=True)
        return Prompt(ids, text, row.get("reference") or "", given, place)


def _load(source: Any, columns: Mapping[str, str], seed: int) -> data.Splits:
    options: dict[str, Any] = {"required": ("prompt",), "optional": ("reference",), "label_column": None}
    return data.load_splits(source, columns=columns, seed=seed, **options)

"""Prompts: texts or conversations to be answered, and reference answers where the data has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ptft_hf import data
from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.tasks import turns
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
            DataError: As :func:`ptft_hf.data.load_splits`; or prompts that are neither texts nor conversations, or
                conversations that are answered already.
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
        if problems := [fault for name in ("train", "validation", "test") for fault in _faults(name, splits)]:
            raise DataError(*problems)
        if not isinstance(splits.train[0]["prompt"], str):  # of conversations no leakage is looked for
            return splits
        return data.check_leakage(splits, ("prompt",), None, self.recipe.leakage)

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[list[Prompt], list[str]]:
        """The prompts of at most ``max_length`` tokens, and what is to be said aloud of the others.

        A prompt that is cut asks for something else, so longer ones are left out.

        Raises:
            DataError: None is left, or conversations meet a tokenizer without a chat template.
            ModelError: The chat template refuses a conversation.
        """
        prompts = [self._prompt(row, tokenizer, place) for place, row in enumerate(rows)]
        kept = [prompt for prompt in prompts if 0 < len(prompt.ids) <= max_length]
        if not kept:
            raise DataError(
                f"{self.recipe.name}: none of {len(prompts):,} prompts has 1 to {max_length} tokens "
                "(model.max_length)"
            )
        counts = {
            f"longer than {max_length} tokens": sum(len(prompt.ids) > max_length for prompt in prompts),
            "empty": sum(not prompt.ids for prompt in prompts),
        }
        total = len(prompts)
        return kept, [f"{n:,} of {total:,} prompts are {what} and are left out" for what, n in counts.items() if n]

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
            try:
                text = turns.prompt_text(tokenizer, given) if given else ""
            except ModelError as error:
                raise ModelError(*(f"row {place + 1}: {problem}" for problem in error.problems)) from error
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has the marks
        if self.recipe.prompt_tokens is not None and len(ids) > self.recipe.prompt_tokens:
            ids = ids[: self.recipe.prompt_tokens]
            given = text = tokenizer.decode(ids, skip_special_tokens=True)
        return Prompt(ids, text, reference_of(row.get("reference")), given, place)


def _load(source: Any, columns: Mapping[str, str], seed: int) -> data.Splits:
    options: dict[str, Any] = {"required": ("prompt",), "optional": ("reference",), "label_column": None}
    return data.load_splits(source, columns=columns, seed=seed, **options)


SHOWN = 3


def _faults(split: str, splits: data.Splits) -> list[str]:
    """What is wrong with a split's rows; of each column the first few."""
    rows, found = getattr(splits, split), list[str]()
    for name, fault in (("prompt", _fault), ("reference", _reference_fault)):
        values = rows[name][:] if name in rows.column_names else []
        faults = [f"{split}: row {n}: {name} {what}" for n, value in enumerate(values, 1) if (what := fault(value))]
        found += [*faults[:SHOWN], *([f"{split}: {len(faults):,} such rows in all"] if len(faults) > SHOWN else [])]
    return found


def _fault(prompt: Any) -> str | None:
    if isinstance(prompt, str) or prompt == []:  # what is empty is left out
        return None
    if fault := turns.fault(prompt):
        return fault
    if prompt[-1]["role"] == "assistant":
        return "ends with the assistant's turn, so that nothing is to be answered: leave the answers out"
    return None


def _reference_fault(reference: Any) -> str | None:
    if isinstance(reference, list) and all(isinstance(one, str) for one in reference):
        return None
    return None if reference is None or isinstance(reference, str) else turns.fault(reference)


def reference_of(value: Any) -> str:
    """A reference answer as a text: of messages the last one's, of several texts all."""
    if value is None or isinstance(value, str):
        return value or ""
    return "\n\n".join(value) if all(isinstance(one, str) for one in value) else value[-1]["content"] or ""

"""Conversations, prompts with completions, and texts as token ids, with a mark at each token that is trained.

Of a conversation the assistant's turns are trained, each with the token that ends it. A template that marks them
(``{% generation %}``) is asked for them. Of any other, an assistant's turn is what the text up to its end has more
than the text before it with the generation prompt: what the model will write in use, where it is given the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptft_hf.errors import ModelError
from ptft_hf.tasks.prompting import beginning, marks_of, render, without_marks


class Marked(NamedTuple):
    """Token ids ``[T]``, and whether each is trained ``[T]``."""

    ids: list[int]
    trained: list[bool]


def of_text(tokenizer: Any, text: str) -> Marked:
    """All of a text, and the end token."""
    ids = [*beginning(tokenizer, text), tokenizer.eos_token_id]
    return Marked(ids, [True] * len(ids))


def of_pair(tokenizer: Any, prompt: str, completion: str) -> Marked:
    """A completion behind its prompt, as they stand, and the end token; a prompt has the ids that it has alone."""
    before = beginning(tokenizer, prompt)
    both = beginning(tokenizer, prompt + completion)
    if both[: len(before)] != before:
        both = [*before, *tokenizer(completion, add_special_tokens=False)["input_ids"]]
    ids = [*both, tokenizer.eos_token_id]
    return Marked(ids, [place >= len(before) for place in range(len(ids))])


def of_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], begin: int = 0) -> Marked:
    """A conversation in the tokenizer's chat template; the assistant's turns are trained.

    Args:
        tokenizer: A fast one, with a chat template.
        messages: ``{"role", "content", ...}`` each; marks that stand in a content are read as text.
        begin: Turns before this one are not trained.

    Raises:
        ModelError: The template cannot be used, does not tell the assistant's turns, or ends them with no token of
            its own.
    """
    turns = plain(tokenizer, messages)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        return _by_template(tokenizer, turns, begin)
    text = render(tokenizer, turns)
    spans = []
    for number, turn in enumerate(turns):
        if number < begin or turn["role"] != "assistant":
            continue
        before, after = render(tokenizer, turns[:number], True), render(tokenizer, turns[: number + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise ModelError(
                f"the chat template writes the assistant's turn {number + 1} otherwise than behind its own "
                "generation prompt, or anew when others follow, so what the model is to write cannot be told; mark "
                "it in the template with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), len(after)))
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, marks = list(read["input_ids"]), marks_of(tokenizer)
    trained = [False] * len(ids)
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(read["offset_mapping"]) if a < end and b > start]
        last = next((i for i in inside if ids[i] in marks), None)
        if last is None:
            raise ModelError(
                f"the chat template writes no mark behind the assistant's turn ({text[start:end][-20:]!r}): the "
                "model would not learn to stop; add the end token to the template"
            )
        for i in inside:
            trained[i] = i <= last
    return Marked(ids, trained)


def _by_template(tokenizer: Any, turns: list[dict[str, Any]], begin: int) -> Marked:
    """By the template's own marks; a turn's end token belongs to it, wherever the template has it."""
    read = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids, trained = list(read["input_ids"]), [bool(one) for one in read["assistant_masks"]]
    marks, skipped = marks_of(tokenizer), 0
    if begin:
        text = render(tokenizer, turns[:begin], True)
        skipped = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    for i in range(1, len(ids)):
        trained[i] |= trained[i - 1] and ids[i] in marks and ids[i - 1] not in marks
    return Marked(ids, [one and i >= skipped for i, one in enumerate(trained)])


def fault(messages: Any) -> str | None:
    """What is wrong with a conversation, if anything is."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"{str(messages)[:60]!r} are no messages: expected a list of objects with 'role' and 'content'"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"message {number} has no 'role': {str(message)[:60]!r}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"message {number} has no text as its 'content': {str(message)[:60]!r}"
    return None


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation that the assistant is to go on with."""
    text = prompt_text(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The same as the template's text; its marks are in it.

    Raises:
        ModelError: The template refuses it.
    """
    return render(tokenizer, plain(tokenizer, messages), True)


def plain(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they are read, whoever renders them: marks in their contents are text."""
    return [_turn(tokenizer, message) for message in messages]


def _turn(tokenizer: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    """Without the empty fields that a table gives all messages if one has them."""
    turn = {name: value for name, value in message.items() if value is not None}
    if isinstance(turn.get("content"), str):
        turn["content"] = without_marks(tokenizer, turn["content"])
    return turn

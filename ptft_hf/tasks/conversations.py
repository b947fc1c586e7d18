"""What a reward model reads: a prompt and an answer to it, as token ids whose end is always the answer's.

A conversation is a list of messages (``{"role", "content"}``), the last of which is the answer. Decoders with a chat
template read it as that; encoders read prompt and answer as a pair of texts; others the answer behind the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptft_hf.errors import DataError, ModelError
from ptft_hf.tasks.inputs import check_text
from ptft_hf.tasks.prompting import end_of_turn, is_encoder, render, without_marks

Turns = list[dict[str, str]]


class Reading(NamedTuple):
    """How a checkpoint reads conversations, as far as it is not in its tokenizer.

    Attributes:
        kind: ``chat``, ``pair`` or ``text``.
        end: Of a decoder, the last token that it reads, at which its score stands; None of encoders.
        is_written: Whether template or tokenizer write it themselves.
        is_read: Whether it is read: not where there is no other token to pad with, since transformers takes the
            score at the last token that is no padding.
    """

    kind: str
    end: int | None = None
    is_written: bool = True
    is_read: bool = True


def reading_of(
    config: Any, tokenizer: Any, *, has_prompts: bool, has_messages: bool
) -> tuple[Reading, list[str]]:
    """How a checkpoint reads conversations, and what is to be said of it. A decoder's tokenizer is made to pad with
    another token than the one that ends what is read.

    Args:
        config: The checkpoint's.
        tokenizer: Its tokenizer; it cuts on the left from now on.
        has_prompts: Whether the data has prompts.
        has_messages: Whether it has them, or answers, as messages.

    Raises:
        ModelError: Messages meet a decoder without a chat template, or one whose template cannot be used.
    """
    tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "left"  # else it is not saved
    if is_encoder(config) or config.is_encoder_decoder:
        return Reading("pair" if has_prompts else "text"), []
    if tokenizer.chat_template:
        kind, mark = "chat", end_of_turn(tokenizer)
    elif has_messages:
        raise ModelError(
            f"the data has messages, and this {config.model_type}'s tokenizer has no chat template; give prompts and "
            "answers as texts, or choose an instruction-tuned checkpoint or an encoder"
        )
    else:
        last = tokenizer("a")["input_ids"][-1]
        kind, mark = "text", last if last in tokenizer.all_special_ids else None
    end = tokenizer.eos_token_id if mark is None else mark
    reading = Reading(kind, end, mark is not None)
    if end is None or tokenizer.pad_token_id not in (None, end):
        return reading, []
    name = tokenizer.convert_ids_to_tokens(end)
    others = [token for token in (tokenizer.unk_token, *tokenizer.all_special_tokens) if token not in (None, name)]
    if not others:
        return reading._replace(is_read=False), [
            f"the tokenizer has no mark to pad with but {name!r}, so that answers are read without it"
        ]
    tokenizer.pad_token = others[0]
    return reading, [f"padding is {others[0]!r}, and not {name!r}: there the score stands"]


# ---- conversations ----


def conversation(prompt: Any, answer: Any) -> Turns:
    """Messages, the last of which is the answer.

    Args:
        prompt: A text, messages, or nothing.
        answer: A text, or messages: the last one is the answer, and those before it belong to the prompt, which they
            may repeat.
    """
    before = _turns(prompt, "user")
    own = _turns(answer, "assistant") or [{"role": "assistant", "content": ""}]
    return own if len(own) > len(before) and own[: len(before)] == before else [*before, *own]


def _turns(value: Any, role: str) -> Turns:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return [{"role": turn["role"], "content": turn["content"]} for turn in value or ()]


def fault(value: Any) -> str | None:
    """What is wrong with a prompt or an answer, if it is neither a text nor a list of messages."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return f"is neither a text nor a list of messages but {str(value)[:60]!r}"
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(k), str) for k in ("role", "content")):
            return f"has a message without 'role' and 'content', as texts: {str(turn)[:60]}"
    return None


def checked(name: str, value: Any) -> Any:
    """A prompt or an answer that a user gave.

    Raises:
        DataError: It is neither a text nor a list of messages.
    """
    if problem := fault(value):
        raise DataError(f"{name!r} {problem}")
    for turn in _turns(value, "user"):
        check_text(name, turn["content"])
    return value


def parts_of(turns: Turns) -> tuple[str, str]:
    """Prompt and answer as texts; of several messages before the answer each begins with its role."""
    before, answer = turns[:-1], turns[-1]["content"]
    if len(before) < 2:
        return "".join(turn["content"] for turn in before), answer
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before), answer


# ---- token ids ----


def encode(
    reading: Reading, tokenizer: Any, conversations: Sequence[Turns], limit: int
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """What the model reads of each conversation (``input_ids`` and what else its tokenizer gives but masks), at most
    ``limit`` tokens; and whether it was cut. It is cut on the left: the prompt's begin is lost first.

    Raises:
        DataError: The chat template refuses a conversation.
    """
    if reading.kind == "chat":
        rows, cut = _chats(reading, tokenizer, conversations, limit)
    else:
        texts = [parts_of(turns) for turns in conversations]
        if reading.kind == "text":
            rows, cut = _texts(tokenizer, [("".join(text),) for text in texts], limit - (not reading.is_written))
            rows = rows if reading.is_written else [_ended(row, reading.end) for row in rows]
        else:
            rows, cut = _texts(tokenizer, texts, limit)
    if reading.is_read:
        return rows, cut
    return [_without_end(row, reading.end) for row in rows], cut


def _chats(
    reading: Reading, tokenizer: Any, conversations: Sequence[Turns], limit: int
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    texts = [_rendered(tokenizer, turns) for turns in conversations]
    rendered = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [_up_to_end(ids, reading) for ids in rendered]
    cut = [len(ids) > limit for ids in rows]
    begin = tokenizer.bos_token_id
    kept = [int(ids[0] == begin) for ids in rows]
    rows = [
        [*ids[:first], *ids[len(ids) - limit + first :]] if is_cut else ids
        for ids, is_cut, first in zip(rows, cut, kept, strict=True)
    ]
    return [{"input_ids": ids} for ids in rows], cut


def _up_to_end(ids: list[int], reading: Reading) -> list[int]:
    """Without what a template writes behind the mark, which a policy's answer does not have; with the mark."""
    if reading.end is None:
        return ids
    written = reading.is_written and reading.end in ids
    return ids[: len(ids) - ids[::-1].index(reading.end)] if written else [*ids, reading.end]


def _rendered(tokenizer: Any, turns: Turns) -> str:
    plain = [{**turn, "content": without_marks(tokenizer, turn["content"])} for turn in turns]
    return render(tokenizer, plain, error=DataError)


def _texts(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], limit: int
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """Texts, or pairs of texts, with the tokenizer's own marks."""
    found = tokenizer(*map(list, zip(*texts, strict=True)), return_attention_mask=False, verbose=False)
    rows = [{name: found[name][i] for name in found} for i in range(len(texts))]
    excess = [len(row["input_ids"]) - limit for row in rows]
    for i, text in enumerate(texts):
        if excess[i] > 0:
            rows[i] = dict(_cut(tokenizer, text, excess[i], limit))
    return rows, [tokens > 0 for tokens in excess]


def _cut(tokenizer: Any, text: tuple[str, ...], excess: int, limit: int) -> Any:
    options = {"max_length": limit, "return_attention_mask": False, "verbose": False}
    if len(text) == 1:
        return tokenizer(*text, truncation=True, **options)
    prompt, answer = text
    if len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) > excess:
        return tokenizer(prompt, answer, truncation="only_first", **options)
    return tokenizer("", answer, truncation="only_second", **options)  # nothing of the prompt is left


def _ended(row: Mapping[str, list[int]], end: int | None) -> dict[str, list[int]]:
    """With the end token, unless there is none."""
    if end is None:
        return dict(row)
    longer = {name: [*values, *(values[-1:] or [0])] for name, values in row.items()}
    return {**longer, "input_ids": [*row["input_ids"], end]}


def _without_end(row: Mapping[str, list[int]], end: int | None) -> dict[str, list[int]]:
    """Without end tokens at its end; something is left of any row."""
    ids = row["input_ids"]
    count = len(ids)
    while count > 1 and ids[count - 1] == end:
        count -= 1
    return {name: values[:count] for name, values in row.items()}


# ---- the model card ----

CHAT = """turns = {turns!r}
text = tokenizer.apply_chat_template(turns, tokenize=False)
{ended}
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")"""
PAIR = """texts = ({prompt!r}, {answer!r})
inputs = tokenizer(*texts, truncation="only_first", max_length={limit}, return_tensors="pt")"""
TEXT = """inputs = tokenizer({text}, truncation=True, max_length={limit}, return_tensors="pt")"""


def usage(reading: Reading, prompt: str, answer: str, limit: int) -> str:
    """Lines that make a model's ``inputs`` of a prompt and an answer by upstream's libraries alone."""
    if reading.kind == "pair":
        return PAIR.format(prompt=prompt, answer=answer, limit=limit)
    end = f"tokenizer.convert_ids_to_tokens({reading.end})"
    if reading.kind == "text":
        appended = reading.end is not None and not reading.is_written and reading.is_read
        return TEXT.format(text=f"{prompt + answer!r}{f' + {end}' if appended else ''}", limit=limit)
    if not reading.is_written:
        ended = f"text += {end}" if reading.is_read else ""
    elif reading.is_read:
        ended = f"end = {end}\ntext = text[: text.rindex(end) + len(end)]  # at its end the score stands"
    else:
        ended = f"text = text[: text.rindex({end})]  # at its end the score stands"
    return CHAT.format(turns=conversation(prompt, answer), ended=ended)

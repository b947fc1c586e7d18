"""Words, tokens and windows: which token stands for which word, whatever the tokenizer.

A row is always tokenized as running text, given words joined by single spaces, and its tokens are brought back
to words by their character offsets. So byte-level tokenizers see the spaces that they were trained with (what
``is_split_into_words`` gives them only under ``add_prefix_space``), and a text of a user is treated like the
words of a data set.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptft_hf.errors import ModelError, RecipeError

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: each is a word
FINE = rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|[^\w\s]"
"""Words of texts that are annotated by characters: runs of letters and digits, and single other signs."""
LIKE_TOKENS = (
    rf"https?://\S+|[{_IDEOGRAPH}]|[@#]?[^\W{_IDEOGRAPH}]+(?:[-.,:/&_+][^\W{_IDEOGRAPH}]+)*|"
    rf"['’][^\W{_IDEOGRAPH}]+|[^\w\s]"  # noqa: RUF001
)
"""Words of running text as annotated data sets have them: ``U.S``, ``well-known``, ``@name``, ``'s``."""


class Words(NamedTuple):
    """A text and where its words stand: (first character, one past the last), in order, without overlap."""

    text: str
    spans: list[tuple[int, int]]


class Window(NamedTuple):
    """What the model reads at once.

    Attributes:
        inputs: ``input_ids`` and whatever else the model takes, a list of ``T`` integers each.
        words: [T] The word that a token *begins* and that is this window's to answer for, or -1.
        inside: [T] The word that a token belongs to, be it this window's or not, or -1.
    """

    inputs: dict[str, list[int]]
    words: list[int]
    inside: list[int]


def joined(tokens: Sequence[str]) -> Words:
    """Given words, joined by single spaces."""
    spans, start = [], 0
    for token in tokens:
        spans.append((start, start + len(token)))
        start += len(token) + 1
    return Words(" ".join(tokens), spans)


def split(text: str, pattern: str) -> Words:
    """The words of a text by a regular expression."""
    return Words(text, [match.span() for match in re.finditer(pattern, text)])


def overlap(tokenizer: Any, max_length: int, stride: int | None) -> int:
    """Tokens that neighbouring windows share: ``stride``, or a quarter of a window.

    Raises:
        ModelError: The tokenizer gives no character offsets.
        RecipeError: Windows of this length cannot overlap by so much.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} does not say from which characters a token comes, which named entities "
            "need; choose a checkpoint with a tokenizer.json"
        )
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 2:
        raise RecipeError(f"model.max_length: {max_length} tokens leave no room for words beside the marks")
    if stride is not None and stride >= room:
        raise RecipeError(
            f"stride: {stride} is not less than the {room} tokens of a window (model.max_length less the marks)"
        )
    return room // 4 if stride is None else stride


def windows(rows: Sequence[Words], tokenizer: Any, max_length: int, stride: int) -> list[list[Window]]:
    """The windows of each row, one where it fits into ``max_length`` tokens.

    Every word is answered for by exactly one window: the one in which its first token has the most context
    (as in Devlin et al. 2019, for SQuAD); a window without a word of its own is left out. A word that the
    tokenizer makes nothing of (a control character, an empty one) is read as unknown, so that none is lost.
    """
    found = _tokenized([(row.text, row.spans) for row in rows], tokenizer, max_length, stride)
    mute = {i: silent for i, row in enumerate(rows) if (silent := _without_token(row, found[i]))}
    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    unknown = tokenizer.unk_token if tokenizer.unk_token not in (None, *marks) else "?"
    again = [_with_unknown(rows[i], silent, unknown) for i, silent in mute.items()]
    for i, parts in zip(mute, _tokenized(again, tokenizer, max_length, stride), strict=True):
        found[i] = parts
    return found


def _without_token(row: Words, parts: Sequence[Window]) -> set[int]:
    return set(range(len(row.spans))) - {word for part in parts for word in part.words}


def _with_unknown(row: Words, silent: set[int], unknown: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with some words replaced, and where all words stand in it."""
    text, spans, end = "", [], 0
    for i, (start, stop) in enumerate(row.spans):
        text += row.text[end:start]
        word = unknown if i in silent else row.text[start:stop]
        spans.append((len(text), len(text) + len(word)))
        text, end = text + word, stop
    return text + row.text[end:], spans


def _tokenized(
    rows: Sequence[tuple[str, list[tuple[int, int]]]], tokenizer: Any, max_length: int, stride: int
) -> list[list[Window]]:
    if not rows:
        return []
    tokenizer.truncation_side = "right"
    encoded = tokenizer(
        [text for text, _ in rows],
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    names = [name for name in tokenizer.model_input_names if name in encoded]
    step = max_length - tokenizer.num_special_tokens_to_add() - stride
    parts: list[list[int]] = [[] for _ in rows]
    for part, row in enumerate(encoded["overflow_to_sample_mapping"]):
        parts[row].append(part)
    result = []
    for (text, spans), numbers in zip(rows, parts, strict=True):
        belongs = [
            _words_of(text, spans, encoded["offset_mapping"][n], encoded["special_tokens_mask"][n])
            for n in numbers
        ]
        owned = _owned(belongs, [encoded["special_tokens_mask"][n] for n in numbers], step)
        result.append(
            [
                Window({name: list(encoded[name][n]) for name in names}, own, inside)
                for k, (n, own, inside) in enumerate(zip(numbers, owned, belongs, strict=True))
                if k == 0 or any(word >= 0 for word in own)
            ]
        )
    return result


def _words_of(
    text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], marks: Sequence[int]
) -> list[int]:
    """The word of each token: the one with the token's first character that is no space; or -1."""
    starts = [start for start, _ in spans]
    words = []
    for (start, end), mark in zip(offsets, marks, strict=True):
        first = next((i for i in range(start, end) if not text[i].isspace()), -1)
        word = bisect_right(starts, first) - 1
        words.append(-1 if mark or first < 0 or word < 0 or first >= spans[word][1] else word)
    return words


def _owned(belongs: Sequence[Sequence[int]], marks: Sequence[Sequence[int]], step: int) -> list[list[int]]:
    """For each window the words that begin at its tokens and are its own."""
    begins: dict[int, int] = {}  # word: number of its first token in the row
    places: dict[int, list[tuple[int, int, int]]] = {}  # that token: (context, window, position)
    for k, (words, special) in enumerate(zip(belongs, marks, strict=True)):
        text = [i for i, mark in enumerate(special) if not mark]
        for j, position in enumerate(text):
            token = k * step + j
            if words[position] >= 0:
                begins[words[position]] = min(begins.get(words[position], token), token)
            left = j if k else len(text)
            right = len(text) - 1 - j if k < len(belongs) - 1 else len(text)
            places.setdefault(token, []).append((min(left, right), -k, position))
    owned = [[-1] * len(words) for words in belongs]
    for word, token in begins.items():
        _, k, position = max(places[token])
        owned[-k][position] = word
    return owned

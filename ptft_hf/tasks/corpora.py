"""Running text for pre-training: documents, their tokens, and inputs of one or two texts with a tokenizer's marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ptft_hf import report
from ptft_hf.errors import DataError

MANY_ROWS = 20_000
"""Tokenizing fewer takes seconds, and a bar for it is noise."""
BATCH = 1000


class Tokens(NamedTuple):
    """Token ids ``[T]`` of a text, and the number of the word that each belongs to, -1 for special tokens."""

    ids: np.ndarray
    words: np.ndarray

    def part(self, start: int, end: int) -> Tokens:
        return Tokens(self.ids[start:end], self.words[start:end])


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Texts one after another; no word of one is a word of another."""
    words, shift = [], 0
    for part in parts:
        words.append(np.where(part.words < 0, -1, part.words + shift))
        shift += int(part.words.max(initial=-1)) + 1
    return Tokens(np.concatenate([part.ids for part in parts]), np.concatenate(words))


def pieces(text: Tokens, size: int) -> Iterator[Tokens]:
    """A text in pieces of up to ``size`` tokens, cut between words where a word is no longer than that."""
    start = 0
    while start < len(text.ids):
        end = min(start + size, len(text.ids))
        begins = [i for i in range(start + 1, end + 1) if i == len(text.ids) or _begins(text.words, i)]
        end = begins[-1] if begins else end
        yield text.part(start, end)
        start = end


def _begins(words: np.ndarray, at: int) -> bool:
    return bool(words[at] < 0 or words[at] != words[at - 1])


def documents(rows: Any, begins: str | None, otherwise: str) -> list[list[int]]:
    """Row numbers of each document, in their order.

    Args:
        rows: A ``datasets.Dataset`` with ``text`` and, maybe, ``document``: rows that name the same document are
            of one, wherever they stand.
        begins: Where there is no such column, a regular expression that the first text of a document matches.
        otherwise: Without either, ``each`` row is a document, or all are ``one``.
    """
    if "document" in rows.column_names and any(names := list(rows["document"][:])):
        found: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            found.setdefault(name, []).append(row)
        return list(found.values())
    if begins is not None:
        starts, split = re.compile(begins), list[list[int]]()
        for row, text in enumerate(rows["text"][:]):
            if not split or starts.match(text):
                split.append([])
            split[-1].append(row)
        return split
    return [[row] for row in range(len(rows))] if otherwise == "each" else [list(range(len(rows)))]


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """The tokens of each text, without the marks around it. What a tokenizer in Python calls a word is not known:
    there, each token is one."""
    special, found = np.array(sorted(tokenizer.all_special_ids)), list[Tokens]()
    with report.bar(len(texts), "Tokenizing", "text", stays=False, show=len(texts) > MANY_ROWS) as bar:
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            # verbose: upstream warns of texts that are longer than the model's inputs.
            read = tokenizer(some, add_special_tokens=False, verbose=False)
            for i, given in enumerate(read["input_ids"]):
                ids = np.array(given, dtype=np.int32)
                own = [-1 if word is None else word for word in read.word_ids(i)] if tokenizer.is_fast else None
                words = np.arange(len(ids)) if own is None else np.array(own)
                found.append(Tokens(ids, np.where(np.isin(ids, special), -1, words).astype(np.int32)))
            bar.update(len(some))
    return found


class Frame(NamedTuple):
    """The marks that a tokenizer puts around one text, or around two and between them; with the types of marks and
    texts where the model tells texts apart by them."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: list[int] | None
    """Of ``before``, the first text, ``between``, the second text, and ``after``."""

    @property
    def marks(self) -> int:
        """How many tokens of an input are no text."""
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, first: Tokens, second: Tokens | None = None) -> dict[str, Any]:
        """One encoded row: ``input_ids``, ``words`` (-1 for marks), ``length`` and maybe ``token_type_ids``."""
        second = second or Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))
        both = joined([first, second])
        size = len(first.ids)
        parts = [
            Tokens(np.array(self.before), np.full(len(self.before), -1)),
            both.part(0, size),
            Tokens(np.array(self.between), np.full(len(self.between), -1)),
            both.part(size, len(both.ids)),
            Tokens(np.array(self.after), np.full(len(self.after), -1)),
        ]
        row: dict[str, Any] = {
            name: np.concatenate([getattr(part, field) for part in parts]).astype(np.int32)
            for name, field in (("input_ids", "ids"), ("words", "words"))
        }
        if self.types is not None:
            row["token_type_ids"] = np.repeat(self.types, [len(part.ids) for part in parts])
        return {**row, "length": len(row["input_ids"])}


def frame(tokenizer: Any, pair: bool) -> Frame:
    """The marks of a tokenizer, read off an example.

    Raises:
        DataError: It puts none between two texts.
    """
    text = ("a", "a") if pair else ("a",)
    read = tokenizer(*text)
    ids = read["input_ids"]
    types = read["token_type_ids"] if "token_type_ids" in tokenizer.model_input_names else None
    own = read.sequence_ids(0) if tokenizer.is_fast else None
    if own is None:  # a tokenizer in Python: what it marks as special
        mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        own = [None if special else 0 for special in mask]
    places = [i for i, sequence in enumerate(own) if sequence is not None]
    first = [i for i in places if own[i] == 0]
    second = [i for i in places if own[i] == 1]
    between = ids[first[-1] + 1 : second[0]] if second else []
    if pair and not between:
        raise DataError("next_sentence: the tokenizer puts no mark between two texts, so no pair could be told")
    after = ids[places[-1] + 1 :]
    kinds = None
    if types is not None:
        last = types[-1]
        middle = types[first[-1] + 1] if between else types[first[0]]
        kinds = [types[0], types[first[0]], middle, types[second[0]] if second else last, last]
    return Frame(ids[: first[0]], between, after, kinds)


def dataset(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """Encoded rows as a data set, built in parts so that a large corpus never stands in Python's lists.

    Args:
        rows: Values by column: ``length``, ``row``, ``next`` and ``limit`` are whole numbers, ``given`` is text, all
            others lists of whole numbers.
        columns: Their names, in case there is no row.
    """
    import datasets

    number, text = datasets.Value("int64"), datasets.Value("string")
    kinds = {"length": number, "row": number, "next": number, "limit": number, "given": text}
    features = datasets.Features(
        {name: kinds.get(name, datasets.List(datasets.Value("int32"))) for name in columns}
    )
    parts = [
        datasets.Dataset.from_dict({name: [row[name] for row in some] for name in columns}, features=features)
        for some in _batches(rows)
    ]
    empty = {name: list[Any]() for name in columns}
    return datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_dict(empty, features=features)


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

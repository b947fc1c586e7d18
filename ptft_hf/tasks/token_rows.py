"""Windows as rows of a data set, as batches, and back: what the model reads, and which words it answers for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ptft_hf import report
from ptft_hf.tasks import alignment
from ptft_hf.tasks.alignment import Window, Words
from ptft_hf.tasks.annotated import Annotated
from ptft_hf.tasks.marks import IGNORED, Segment, pieces

MANY_ROWS = 20_000
"""Tokenizing fewer takes seconds, and a bar for it is noise."""
BATCH = 1000


class Reading(NamedTuple):
    """A row as a person knows it: its text, where its words are, and the numbers of their true tags."""

    words: Words
    tags: list[int] | None


class Targets(NamedTuple):
    """The rows by number; and for each encoded row, which is a window, its row's number and the word that each
    of its tokens answers for, or -1."""

    rows: dict[int, Reading]
    windows: list[tuple[int, list[int]]]


def encode(
    rows: Any,
    read: Callable[[Mapping[str, Any]], Annotated],
    tokenizer: Any,
    max_length: int,
    *,
    stride: int | None,
    tags: Sequence[str],
    all_subwords: bool,
) -> tuple[Any, int]:
    """The windows of all rows; text, words and tags of a row stand beside its first window.

    Args:
        rows: A ``datasets.Dataset``.
        read: Gives the words and tags of one row.
        tokenizer: One with character offsets.
        max_length: Tokens of a window, with the marks.
        stride: Tokens that neighbouring windows share; None is a quarter.
        tags: The model's labels; ``O`` first, then ``B-`` and ``I-`` of each type.
        all_subwords: Label every sub-word of a word, not the first alone.

    Returns:
        The windows, with their ``length`` in tokens; and how many rows have more than one.
    """
    stride = alignment.overlap(tokenizer, max_length, stride)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    index = {tag: i for i, tag in enumerate(tags)}
    columns: dict[str, list[Any]] = {}
    several = 0
    with report.bar(len(rows), "Tokenizing", "row", stays=False, show=len(rows) > MANY_ROWS) as bar:
        for start in range(0, len(rows), BATCH):
            some = [read(row) for row in rows.select(range(start, min(start + BATCH, len(rows))))]
            found = alignment.windows([row.words for row in some], tokenizer, max_length, stride)
            for number, (row, parts) in enumerate(zip(some, found, strict=True), start):
                several += len(parts) > 1
                numbers = None if row.tags is None else [index[tag] for tag in row.tags]
                for k, part in enumerate(parts):
                    part = part if part.words else _filled(part, filler)
                    values = _columns(row.words if k == 0 else None, part, numbers, all_subwords)
                    for name, value in {"row": number, **values}.items():
                        columns.setdefault(name, []).append(value)
            bar.update(len(some))
    return _dataset(columns), several


def _filled(part: Window, filler: int) -> Window:
    """One token in place of none: an empty text, and a tokenizer without marks."""
    inputs = {n: [filler if n == "input_ids" else int(n == "attention_mask")] for n in part.inputs}
    return Window(inputs, [-1], [-1])


def _columns(
    words: Words | None, part: Window, tags: Sequence[int] | None, all_subwords: bool
) -> dict[str, Any]:
    """A window's values; ``words`` of its row if it is the first one, else None."""
    values: dict[str, Any] = {
        **part.inputs,
        "length": len(part.words),
        "words": part.words,
        "text": None if words is None else words.text,
        "starts": None if words is None else [start for start, _ in words.spans],
        "ends": None if words is None else [end for _, end in words.spans],
    }
    if tags is not None:
        values["labels"] = labels_of(part, tags, all_subwords)
        values["tags"] = None if words is None else tags
    return values


def labels_of(part: Window, tags: Sequence[int], all_subwords: bool) -> list[int]:
    """``[T]``: the tag of a word at its first token; at the others -100, or, if they are trained, its I- tag."""
    own = {word for word in part.words if word >= 0} if all_subwords else set()
    labels = []
    for begins, inside in zip(part.words, part.inside, strict=True):
        if begins >= 0:
            labels.append(tags[begins])
        elif inside in own:
            labels.append(tags[inside] + tags[inside] % 2)  # B- tags have odd numbers, each before its I-
        else:
            labels.append(IGNORED)
    return labels


def collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pads each batch to its own longest window; labels ``[B, T]`` with -100."""
    names = list(tokenizer.model_input_names)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: row[name] for name in names if name in row} for row in rows]
        batch = dict(tokenizer.pad(inputs, return_tensors="pt"))
        if "labels" in rows[0]:
            labels = torch.full_like(batch["input_ids"], IGNORED)
            for line, row in zip(labels, rows, strict=True):
                values = torch.tensor(row["labels"])
                if tokenizer.padding_side == "left":
                    line[len(line) - len(values) :] = values
                else:
                    line[: len(values)] = values
            batch["labels"] = labels
        return batch

    return collate


def segments(row: Mapping[str, Any], tokenizer: Any, tags: Sequence[str]) -> list[Segment]:
    """A window's words, each with the tag that it is trained on below it."""
    found: list[Segment] = []
    special = set(tokenizer.all_special_ids)
    open_word = False  # whether a further token may belong to a word of this window
    for i, piece in enumerate(pieces(tokenizer, row["input_ids"], [("input", str(n)) for n in range(row["length"])])):
        label = row["labels"][i]
        if row["words"][i] >= 0:
            found.append(Segment(piece.text, "trained", tags[label]))
            open_word = True
        elif row["input_ids"][i] in special:
            found.append(Segment(piece.text, "special"))
            open_word = False
        elif open_word and not piece.text[:1].isspace():
            found[-1] = found[-1]._replace(text=found[-1].text + piece.text)
        else:
            found.append(Segment(piece.text))
            open_word = False
    return found


def targets(encoded: Any) -> Targets:
    """Rows and windows of encoded rows."""
    tags = encoded["tags"][:] if "tags" in encoded.column_names else [None] * len(encoded)
    rows, windows = {}, []
    columns = (encoded[name][:] for name in ("row", "words", "text", "starts", "ends"))
    for number, words, text, starts, ends, true in zip(*columns, tags, strict=True):
        windows.append((number, words))
        if text is not None:
            rows[number] = Reading(Words(text, list(zip(starts, ends, strict=True))), true)
    return Targets(rows, windows)


def _dataset(columns: Mapping[str, list[Any]]) -> Any:
    import datasets

    whole = datasets.Value("int64")
    kinds = {"length": whole, "row": whole, "text": datasets.Value("string")}
    features = datasets.Features({name: kinds.get(name, datasets.List(whole)) for name in columns})
    return datasets.Dataset.from_dict(dict(columns), features=features)

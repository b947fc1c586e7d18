"""Rows of texts: what ``predict`` takes, checked; tokenized in batches, and padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from ptft_hf.data.sources import quiet
from ptft_hf.errors import DataError

MANY_ROWS = 20_000
"""Tokenizing fewer takes seconds, and a bar for it is noise."""


def text_row(value: Any, columns: Sequence[str]) -> dict[str, Any]:
    """A string, which is the first column's, or a mapping with a string for each of the columns.

    Raises:
        DataError: It is neither, or no text.
    """
    row = {columns[0]: value} if isinstance(value, str) else value
    if not isinstance(row, Mapping):
        raise DataError(f"{value!r} is neither a text nor an object with the key {columns[0]!r}")
    if wrong := [name for name in columns if not isinstance(row.get(name), str)]:
        raise DataError(
            f"{', '.join(map(repr, wrong))} must be given, as text; this model was trained on {list(columns)}, "
            f"and the input has {sorted(map(str, row))}"
        )
    for name in columns:
        check_text(name, row[name])
    return {name: row[name] for name in columns}


def check_text(name: str, text: str) -> None:
    """Refuse what a tokenizer would.

    Raises:
        DataError: Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{name!r} has half of a surrogate pair, which is no text")


def tokenized(rows: Any, encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Any:
    """The columns that ``encode`` makes of batches of rows, and no others; in memory."""
    with nullcontext() if len(rows) > MANY_ROWS else quiet():
        return rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            keep_in_memory=True,
            desc="Tokenizing",
        )


def padded(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the model reads of some rows, as tensors, each padded to their longest."""
    names = list(tokenizer.model_input_names)
    given = [{name: row[name] for name in names if name in row} for row in rows]
    return dict(tokenizer.pad(given, return_tensors="pt"))

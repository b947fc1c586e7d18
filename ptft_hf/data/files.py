"""Local csv, tsv, json, jsonl and CoNLL files as plain rows, with errors that name the file and the line.

``datasets`` reads these too, but reports a broken byte or line without its place, turns the csv text "None"
or "NA" into a missing value, and guesses a csv column's type afresh for every split and every 10,000 rows.
A file is read into memory at once; corpora too large for that belong in parquet, which stays on disk.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ptft_hf.data.conll import conll_rows
from ptft_hf.errors import DataError

Row = dict[str, Any]

KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
}

_SHOWN = 5  # faults shown per file; the others are counted
_FIELD_LIMIT = 2**31 - 1  # csv's own limit of 131,072 characters would refuse long documents


def read_rows(path: Path, kind: str | None = None) -> list[Row]:
    """All rows of one file.

    Args:
        path: The file, UTF-8 with or without a byte order mark.
        kind: ``"csv"``, ``"tsv"``, ``"json"`` (JSON lines, or one array of objects) or ``"conll"``; by the
            file's ending if None. A file that ends in ``.tsv`` is tab-separated even where ``kind`` says csv.

    Returns:
        One dict per row. Values of csv and tsv files are all strings.

    Raises:
        DataError: The file is missing, not UTF-8, empty, or has broken lines (the first five are shown).
    """
    kind = "tsv" if path.suffix.lower() == ".tsv" else kind or KINDS[path.suffix.lower()]
    text = _decode(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    problems: list[str] = []
    if kind == "conll":
        rows = list(conll_rows(text, path, problems))
    elif kind == "json":
        rows = list(_json_rows(text, path, problems))
    else:
        rows = list(_csv_rows(text, path, kind, problems))
    if problems:
        more = len(problems) - _SHOWN
        raise DataError(*problems[:_SHOWN], *([f"{path}: and {more} more broken lines"] if more > 0 else []))
    return rows


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = (
            "UTF-16"
            if data[:2] in (b"\xff\xfe", b"\xfe\xff")
            else "its own encoding, often cp1252 or latin-1"
        )
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
            f"convert the file from {hint}, for example with iconv"
        ) from error


def _json_rows(text: str, path: Path, problems: list[str]) -> Iterator[Row]:
    if text.lstrip().startswith("["):
        yield from _json_array(text, path, problems)
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a string
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            near = line[max(error.pos - 30, 0) : error.pos + 30]
            problems.append(f"{where}: broken JSON: {error.msg} at column {error.pos + 1}, near {near!r}")
            continue
        except (ValueError, RecursionError) as error:  # an integer of 4,300 digits; brackets nested too deep
            problems.append(f"{where}: broken JSON: {error}")
            continue
        yield from _checked(value, line, where, problems)


def _json_array(text: str, path: Path, problems: list[str]) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 30, 0) : error.pos + 30]
        problems.append(
            f"{path}, line {error.lineno}: broken JSON: {error.msg} at column {error.colno}, near {near!r}"
        )
        return
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: broken JSON: {error}")
        return
    for number, value in enumerate(values, 1):
        yield from _checked(value, text, f"{path}, item {number}", problems)


def _checked(value: Any, source: str, where: str, problems: list[str]) -> Iterator[Row]:
    if not isinstance(value, dict):
        problems.append(
            f'{where}: {short(value)} is not an object; write one object a line, such as {{"text": ...}}'
        )
    elif "\\ud" in source.lower() and (
        lone := re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
    ):
        problems.append(
            f"{where}: {lone.group()!r} is half of a character (a lone surrogate): repair the text"
        )
    else:
        yield value


def _csv_rows(text: str, path: Path, kind: str, problems: list[str]) -> Iterator[Row]:
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter="\t" if kind == "tsv" else ",", strict=True
        )
        header = next(reader)
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            problems.append(f"{path}, line 1: columns with the same name: {', '.join(map(repr, repeated))}")
            return
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                yield dict(zip(header, fields, strict=True))
            elif fields:  # a blank line has none
                problems.append(
                    f"{path}, line {start}: {len(fields)} fields where the header has {len(header)}; "
                    f"put fields with a {'tab' if kind == 'tsv' else 'comma'} or line break in double quotes"
                )
            start = reader.line_num + 1
    except csv.Error as error:
        problems.append(
            f"{path}, near line {reader.line_num}: broken {kind}: {error}; a field that begins with a double "
            'quote must end with one, and one inside it is written twice ("")'
        )
    finally:
        csv.field_size_limit(limit)


def typed(columns: list[list[str | None]]) -> list[list[Any]]:
    """The strings of one csv column, one list per split, as what they spell in *all* splits.

    Integers (``-1``, ``7``; not ``007``, which is a code), else floats, else booleans (``true``/``false`` in
    any case), else the strings as they are. Empty strings are missing values (None).
    """
    columns = [[value if value is None or value.strip() else None for value in column] for column in columns]
    values = {value for column in columns for value in column if value is not None}
    for pattern, convert in _SPELLINGS:
        if values and all(re.fullmatch(pattern, value.strip(), re.IGNORECASE) for value in values):
            return [
                [None if value is None else convert(value.strip()) for value in column] for column in columns
            ]
    return [list(column) for column in columns]


def _boolean(value: str) -> bool:
    return value.casefold() == "true"


_SPELLINGS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"0|-?[1-9][0-9]{0,17}", int),
    (r"nan|[+-]?((0|[1-9][0-9]{0,17})(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", float),
    (r"true|false", _boolean),
)


def short(value: Any, width: int = 60) -> str:
    """A value as Python writes it, cut to ``width`` characters, for messages."""
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 1] + "…"

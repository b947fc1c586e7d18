"""CoNLL files: a word a line, its columns behind it, sentences apart by blank lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COMMENT = re.compile(r"#\s*(begin|end|id|text|sent_id|newdoc|newpar)\b")


def conll_rows(text: str, path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """A row a sentence: ``tokens`` (the first column), ``tags`` (the last), ``column_2`` and so on between.

    Columns are separated by tabs if any line of the file has one (so a word may hold a space), else by spaces.
    ``-DOCSTART-`` lines and the comments of CoNLL-U and CoNLL-2012 are passed over.

    Args:
        text: The file's content.
        path: For messages.
        problems: Is given a line of each fault.
    """
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(): a word may hold U+2028
    separator = "\t" if "\t" in text else " +"
    width = 0
    sentence: list[list[str]] = []
    for number, line in enumerate([*lines, ""], 1):
        if _COMMENT.match(line) and not re.search(r"\s(O|[BIESLUM]-\S+)$", line):
            continue
        if not line.strip():
            if sentence:
                yield _row(sentence)
            sentence = []
            continue
        fields = re.split(separator, line.rstrip(" ") if separator != "\t" else line)
        if fields[0] == "-DOCSTART-":
            continue
        width = width or len(fields)
        if len(fields) != width or width < 2:
            expected = f"{width} columns as above" if width > 1 else "at least a word and its tag"
            kind = "tabs" if separator == "\t" else "spaces"
            problems.append(
                f"{path}, line {number}: {len(fields)} columns between {kind}, not {expected}: {line[:60]!r}"
            )
            width = max(width, 2)
        else:
            sentence.append(fields)


def _row(sentence: list[list[str]]) -> dict[str, Any]:
    columns = list(map(list, zip(*sentence, strict=True)))
    names = ["tokens", *(f"column_{i}" for i in range(2, len(columns))), "tags"]
    return dict(zip(names, columns, strict=True))

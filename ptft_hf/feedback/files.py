"""Pairs in from files of preferences, to be reviewed, and preferences out, to be trained on."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf import report
from ptft_hf.errors import DataError, OutputError
from ptft_hf.feedback.store import Judgement, Store

COLUMNS = ("prompt", "chosen", "rejected")
SHOWN = 5
SQLITE = b"SQLite format 3"
"""With which its files begin."""


class Imported(NamedTuple):
    """What became of a file's rows."""

    pairs: int
    """New ones."""
    same: int
    """Rows whose two answers are the same text."""
    known: int
    """Rows that were there already, or twice in the file."""


class Exported(NamedTuple):
    """What became of the pairs that were judged."""

    rows: int
    """Written, ties among them."""
    ties: int
    both_bad: int
    conflicts: int
    """Pairs without a majority, which are left out."""


def import_pairs(file: str | Path, database: str | Path) -> Imported:
    """Take pairs from a file of preferences. Which answer was chosen is kept as the answers' source, so that the
    statistics say how often the review agrees; annotators do not see it.

    Args:
        file: JSON lines, csv or tsv, with the columns ``prompt`` (texts, or messages), ``chosen`` and ``rejected``
            (texts).
        database: Made if it is not there; pairs that it has already stay as they are.

    Raises:
        DataError: The file cannot be read, or rows lack a column; every kind of fault is named.
        OutputError: The database cannot be written.
    """
    from ptft_hf.data import files

    path = Path(file)
    if path.suffix.lower() not in files.KINDS or files.KINDS[path.suffix.lower()] == "conll":
        raise DataError(f"{path}: the ending should be .jsonl, .json, .csv or .tsv, of a file of that kind")
    found = files.read_rows(path)
    faults = [fault for number, row in enumerate(found, 1) for fault in _faults(row, f"{path}, row {number}")]
    if faults:
        more = [f"and {len(faults) - SHOWN} more faults"] if len(faults) > SHOWN else []
        raise DataError(*faults[:SHOWN], *more)
    rows = [(row["prompt"], row["chosen"], row["rejected"]) for row in found]
    different = [row for row in rows if row[1].strip() != row[2].strip()]
    with Store(database, create=True) as store:
        pairs = store.add_pairs(different)
    return Imported(pairs, len(rows) - len(different), len(different) - pairs)


def _faults(row: dict[str, Any], where: str) -> Iterator[str]:
    for name in COLUMNS:
        value = row.get(name)
        if name not in row:
            yield f"{where}: has no {name!r}; its columns are {', '.join(map(repr, row))}"
        elif name == "prompt" and isinstance(value, list) and value:
            from ptft_hf.tasks import conversations

            if problem := conversations.fault(value):
                yield f"{where}: prompt {problem}"
        elif not isinstance(value, str) or not value.strip():
            shown = "an empty text" if value == "" else f"{type(value).__name__} {str(value)[:40]!r}"
            needed = "a text or a list of messages" if name == "prompt" else "a text (of a message, its content)"
            yield f"{where}: {name} is {shown}; {needed} is needed"


def export_preferences(database: str | Path | Store, file: str | Path, *, ties: bool = False) -> Exported:
    """Write what was preferred as JSON lines with ``prompt``, ``chosen`` and ``rejected``. Prompts are as the data
    has them, so that a reward model that learns from the file reads what PPO will give it: texts, or, if one of them
    is a conversation, messages.

    Of a pair with several judgements more than half must prefer the same answer, or neither; other pairs are left out
    as conflicts.

    Args:
        database: The file, or the opened store.
        file: Replaced as a whole, or not at all.
        ties: Write pairs of which most annotators prefer neither answer, too, with ``"tie": true`` (``false`` for all
            others); ``chosen`` is then one or the other. Pairs of which all who prefer neither say
            that both are bad are left out nevertheless: there is nothing to choose there.

    Raises:
        DataError: There is no such database.
        OutputError: The file cannot be written, or is a database, which would be lost.
    """
    if _is_database(Path(file)):
        raise OutputError(f"{file}: is a database, of judgements maybe; choose another file for the preferences")
    if not isinstance(database, Store):
        with Store(database) as store:
            return export_preferences(store, file, ties=ties)
    by_pair: dict[int, list[Judgement]] = defaultdict(list)
    for one in database.judgements():
        by_pair[one.pair].append(one)
    rows, kinds = list[dict[str, Any]](), Counter[str]()
    for _, judged in sorted(by_pair.items()):
        kind = majority(judged)
        kinds[kind] += 1
        if kind in ("first", "second") or (kind == "tie" and ties):
            better, worse = judged[0].answers[:: -1 if kind == "second" else 1]
            row = {"prompt": judged[0].prompt, "chosen": better.text, "rejected": worse.text}
            rows.append(row | ({"tie": kind == "tie"} if ties else {}))
    if not all(isinstance(row["prompt"], str) for row in rows):  # a column has one type
        for row in rows:
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    if unknown := len(database.without_given()):
        report.say(
            f"- {database.path}: an earlier ptft_hf has stored {unknown:,} prompts as the model reads them; if they "
            "are conversations, first give the `ptft feedback generate` that made it again: it notes their messages",
            style="yellow",
        )
    from ptft_hf.checkpoints import write_text

    try:
        write_text(Path(file), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from error
    return Exported(len(rows), kinds["tie"], kinds["both_bad"], kinds["conflict"])


def _is_database(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(SQLITE)) == SQLITE
    except OSError:
        return False  # of what cannot be read, writing will tell


def majority(judged: Sequence[Judgement]) -> str:
    """What more than half of a pair's judgements say: ``first``, ``second``, ``tie`` or ``both_bad`` (neither, and
    none calls it a tie); else ``conflict``."""
    votes = Counter(one.preferred for one in judged)
    most, count = votes.most_common(1)[0]
    if 2 * count <= len(judged):
        return "conflict"
    if most is not None:
        return ("first", "second")[most]
    return "tie" if any(one.verdict == "tie" for one in judged) else "both_bad"

"""The database of a collection: prompts, answers, pairs of them, and what was shown to whom and what they said.

One SQLite file in WAL mode with ``synchronous=FULL``: what a transaction has committed is there after a kill of the
process and after a power cut.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf.errors import DataError, OutputError

APPLICATION = 0x70746662
"""SQLite's ``application_id``, by which a file says whose it is; ``ptfb``."""
VERSION = 2
"""Of version 1, ``prompts`` have no ``given``: of conversations, only what the model read was kept."""
BUSY_SECONDS = 30.0
"""How long another process may hold the file before we give up."""

IMPORTED = ("chosen", "rejected")
"""Sources of answers that come from a file of preferences."""
VERDICTS = ("left", "right", "tie", "both_bad", "skip")

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE prompts (
  id INTEGER PRIMARY KEY,
  given TEXT,                                   -- as the data has it, a text or messages, in JSON; NULL: not known
  text TEXT NOT NULL UNIQUE                     -- as the model reads it, or, of an imported conversation, its JSON
);
CREATE TABLE answers (
  id INTEGER PRIMARY KEY,
  prompt INTEGER NOT NULL REFERENCES prompts,
  source TEXT NOT NULL,                         -- the model that wrote it, or the column that it was imported from
  number INTEGER NOT NULL,                      -- of the answers that this source gave to this prompt, from 0
  text TEXT NOT NULL,
  score REAL,                                   -- of a reward model
  UNIQUE (prompt, source, number)
);
CREATE TABLE pairs (
  id INTEGER PRIMARY KEY,
  first INTEGER NOT NULL REFERENCES answers,
  second INTEGER NOT NULL REFERENCES answers,
  place REAL NOT NULL,                          -- in random order
  draw REAL NOT NULL,                           -- below --overlap: several annotators judge it
  UNIQUE (first, second)
);
CREATE TABLE assignments (                      -- one for each time that a pair is shown
  id TEXT PRIMARY KEY,
  pair INTEGER NOT NULL REFERENCES pairs,
  annotator TEXT NOT NULL,
  left_answer INTEGER NOT NULL REFERENCES answers,
  shown_at REAL NOT NULL,                       -- seconds since 1970
  verdict TEXT CHECK (verdict IN ('left', 'right', 'tie', 'both_bad', 'skip')),
  judged_at REAL,
  withdrawn_at REAL                             -- undone, or passed on to somebody else
);
CREATE INDEX by_place ON pairs (place);
CREATE INDEX of_pair ON assignments (pair);
CREATE UNIQUE INDEX once_each ON assignments (pair, annotator) WHERE withdrawn_at IS NULL;
CREATE UNIQUE INDEX one_at_a_time ON assignments (annotator) WHERE verdict IS NULL AND withdrawn_at IS NULL;
"""


class Answer(NamedTuple):
    """An answer to be stored."""

    source: str
    """The model that wrote it, or the column that it was imported from."""
    number: int
    """Of the answers that this source gave to this prompt, from 0."""
    text: str


class Judged(NamedTuple):
    """An answer of a pair that was judged."""

    source: str
    text: str
    score: float | None
    """A reward model's."""


class Judgement(NamedTuple):
    """What one annotator said of one pair; to skip it is to say nothing."""

    pair: int
    annotator: str
    verdict: str
    """``left``, ``right``, ``tie`` or ``both_bad``."""
    seconds: float
    """From when the pair was shown to the click."""
    prompt: Any
    """As the data has it: a text or messages."""
    answers: tuple[Judged, Judged]
    preferred: int | None
    """The place in ``answers`` of the better one; None: neither."""


def check_place(path: Path) -> None:
    """Refuse a place where no file can be.

    Raises:
        OutputError: It is a folder, or its folder is not there.
    """
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: {'is a folder; name a file' if path.is_dir() else 'its folder does not exist'}")


class Store:
    """The database, opened; also a context manager.

    Args:
        path: The file.
        create: Make it if it is not there.

    Raises:
        DataError: It is not there, or is no database of this kind or version.
        OutputError: It cannot be opened or made.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        if not self.path.exists() and not create:
            raise DataError(f"{path}: does not exist; `ptft feedback generate` or `ptft feedback import` makes it")
        check_place(self.path)
        self._lock = threading.RLock()
        with self._explained():
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._explained():
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA synchronous = FULL")
        with self.transaction() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if application != APPLICATION and not (empty and application == 0):
                raise DataError(f"{self.path}: a database, but not one of `ptft feedback`")
            if version > VERSION:
                raise DataError(
                    f"{self.path}: of version {version}, made by a later ptft_hf; this one reads {VERSION}"
                )
            if empty:
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION}")
            elif version < VERSION:
                db.execute("ALTER TABLE prompts ADD COLUMN given TEXT")
            if version < VERSION:
                db.execute(f"PRAGMA user_version = {VERSION}")
        with self._explained():
            self._db.execute("PRAGMA journal_mode = WAL")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OutputError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise DataError(f"{self.path}: no database of `ptft feedback`: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done inside is committed at its end, or none of it.

        Raises:
            OutputError: The file cannot be written, or another process holds it for :data:`BUSY_SECONDS`.
        """
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ---- writing ----

    def setting(self, name: str) -> str | None:
        found = self.rows("SELECT value FROM settings WHERE name = ?", (name,))
        return str(found[0][0]) if found else None

    def set_setting(self, name: str, value: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def add(self, prompts: Sequence[tuple[str, Sequence[Answer]]], sources: Sequence[Any] | None = None) -> int:
        """Store answers to prompts, in one transaction, and all pairs of those that a prompt has then, without those
        that were imported. Answers that are there already stay as they are. Of answers that are the same but for
        white space around them only the first is paired.

        Args:
            prompts: Texts as the model reads them, each with its answers.
            sources: The prompts as the data has them, texts or messages; None: they are these texts.

        Returns:
            How many pairs are new.
        """
        with self.transaction() as db:
            before = _count(db, "pairs")
            given = [text for text, _ in prompts] if sources is None else sources
            for (text, answers), source in zip(prompts, given, strict=True):
                db.execute(
                    "INSERT INTO prompts (text, given) VALUES (?, ?) "
                    "ON CONFLICT (text) DO UPDATE SET given = excluded.given",
                    (text, _json(source)),
                )
                (prompt,) = db.execute("SELECT id FROM prompts WHERE text = ?", (text,)).fetchone()
                db.executemany(
                    "INSERT OR IGNORE INTO answers (prompt, source, number, text) VALUES (?, ?, ?, ?)",
                    [(prompt, *answer) for answer in answers],
                )
                rows = db.execute(
                    "SELECT id, text FROM answers WHERE prompt = ? AND source NOT IN (?, ?) ORDER BY id DESC",
                    (prompt, *IMPORTED),
                )
                first_of = {answer.strip(): (identity, answer) for identity, answer in rows}
                for first, second in itertools.combinations(sorted(first_of.values()), 2):
                    _add_pair(db, text, first, second)
            return _count(db, "pairs") - before

    def add_pairs(self, rows: Sequence[tuple[Any, str, str]]) -> int:
        """Store pairs as they are, in one transaction; those that are there already stay as they are.

        Args:
            rows: Prompt (a text or messages), chosen and rejected answer.

        Returns:
            How many pairs are new.
        """
        with self.transaction() as db:
            before = _count(db, "pairs")
            for source, *texts in rows:
                text = source if isinstance(source, str) else _json(source)
                db.execute("INSERT OR IGNORE INTO prompts (text, given) VALUES (?, ?)", (text, _json(source)))
                (prompt,) = db.execute("SELECT id FROM prompts WHERE text = ?", (text,)).fetchone()
                ids = [_answer(db, prompt, *each) for each in zip(IMPORTED, texts, strict=True)]
                _add_pair(db, text, *zip(ids, texts, strict=True))
            return _count(db, "pairs") - before

    def set_scores(self, scores: Sequence[tuple[int, float]]) -> None:
        """Scores of answers, by their ids."""
        with self.transaction() as db:
            db.executemany("UPDATE answers SET score = ? WHERE id = ?", [(score, id_) for id_, score in scores])

    # ---- reading ----

    def answered(self) -> dict[tuple[str, str], int]:
        """How many answers there are, by prompt and source."""
        rows = self.rows(
            "SELECT p.text, a.source, count(*) FROM answers a JOIN prompts p ON p.id = a.prompt "
            "GROUP BY p.id, a.source"
        )
        return {(prompt, source): count for prompt, source, count in rows}

    def without_given(self) -> set[str]:
        """Texts of prompts that were answered by models and stored by version 1."""
        query = (
            "SELECT text FROM prompts p WHERE given IS NULL "
            "AND EXISTS (SELECT 1 FROM answers WHERE prompt = p.id AND source NOT IN (?, ?))"
        )
        return {text for (text,) in self.rows(query, IMPORTED)}

    def unscored(self) -> list[tuple[int, str, Any, str]]:
        """Of answers that are in a pair and have no score: id, prompt as text and as the data has it, and text."""
        rows = self.rows(
            "SELECT a.id, p.text, p.given, a.text FROM answers a JOIN prompts p ON p.id = a.prompt "
            "WHERE a.score IS NULL AND EXISTS (SELECT 1 FROM pairs WHERE a.id IN (first, second)) ORDER BY a.id"
        )
        return [(id_, prompt, as_given(prompt, given), text) for id_, prompt, given, text in rows]

    def forget_scores(self) -> None:
        with self.transaction() as db:
            db.execute("UPDATE answers SET score = NULL")

    def counts(self) -> dict[str, int]:
        """Numbers of prompts, answers and pairs."""
        names = ("prompts", "answers", "pairs")
        return {name: int(self.rows(f"SELECT count(*) FROM {name}")[0][0]) for name in names}

    def judgements(self) -> list[Judgement]:
        """Every judgement that stands, in the order in which they were made."""
        rows = self.rows(
            "SELECT p.id, x.annotator, x.verdict, x.judged_at - x.shown_at, x.left_answer = p.first, t.text, "
            "t.given, a.source, a.text, a.score, b.source, b.text, b.score "
            "FROM assignments x JOIN pairs p ON p.id = x.pair JOIN answers a ON a.id = p.first "
            "JOIN answers b ON b.id = p.second JOIN prompts t ON t.id = a.prompt "
            "WHERE x.verdict != 'skip' AND x.withdrawn_at IS NULL ORDER BY x.judged_at, x.rowid"
        )
        found = []
        for pair, annotator, verdict, seconds, first_is_left, prompt, given, *answers in rows:
            preferred = None if verdict in ("tie", "both_bad") else int((verdict == "left") != first_is_left)
            both = (Judged(*answers[:3]), Judged(*answers[3:]))
            found.append(Judgement(pair, annotator, verdict, seconds, as_given(prompt, given), both, preferred))
        return found

    def skipped(self) -> int:
        """How often somebody passed a pair over, and did not come back to it."""
        query = "SELECT count(*) FROM assignments WHERE verdict = 'skip' AND withdrawn_at IS NULL"
        return int(self.rows(query)[0][0])

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds."""
        with self._lock, self._explained():
            return self._db.execute(query, values).fetchall()


def as_given(text: str, given: str | None) -> Any:
    """A prompt as the data has it, of its row: a text or messages. Where that is not known, as the model read it."""
    return text if given is None else json.loads(given)


def _json(source: Any) -> str:
    return json.dumps(source, ensure_ascii=False)


def _count(db: sqlite3.Connection, table: str) -> int:
    return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _answer(db: sqlite3.Connection, prompt: int, source: str, text: str) -> int:
    """The id of an answer, which is stored if it is not there."""
    known = "SELECT id FROM answers WHERE prompt = ? AND source = ? AND text = ?"
    row = db.execute(known, (prompt, source, text)).fetchone()
    if row is None:
        number = "SELECT count(*) FROM answers WHERE prompt = ? AND source = ?"
        (count,) = db.execute(number, (prompt, source)).fetchone()
        values = (prompt, source, count, text)
        db.execute("INSERT INTO answers (prompt, source, number, text) VALUES (?, ?, ?, ?)", values)
        row = db.execute(known, (prompt, source, text)).fetchone()
    return int(row[0])


def _add_pair(
    db: sqlite3.Connection, prompt: str, first: tuple[int, str], second: tuple[int, str]
) -> None:
    """Its random numbers follow from its texts, so that they do not depend on when it was stored. So does which
    answer is the first: were it always the same model's, or the chosen one, a kappa would take what annotators agree
    on for chance."""
    digest = hashlib.sha256("\0".join((prompt, first[1], second[1])).encode()).digest()
    place, draw = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))
    first, second = (second, first) if digest[16] % 2 else (first, second)
    db.execute(
        "INSERT OR IGNORE INTO pairs (first, second, place, draw) VALUES (?, ?, ?, ?)",
        (first[0], second[0], place, draw),
    )

"""What was shown to whom, and what they said: each call is one transaction, and may be sent twice without harm.

A pair that is shown is an *assignment* with an id of its own. A judgement names that id, so that a click that is sent
again, as browsers do after a broken connection, changes nothing; to undo a judgement withdraws its assignment, and
shows the pair as a new one.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
import unicodedata
from typing import Any, NamedTuple

from ptft_hf.errors import DataError
from ptft_hf.feedback.choosing import JUDGED, Policy, done_and_needed, is_needed, next_pair
from ptft_hf.feedback.store import VERDICTS, Store, as_given

NAME_LENGTH = 60


class Showing(NamedTuple):
    """A pair on an annotator's screen."""

    assignment: str
    prompt: Any
    """As the data has it: a text or messages."""
    left: str
    right: str
    again: bool
    """The annotator has seen it before, and has undone the judgement or passed it over."""


class Progress(NamedTuple):
    """How far the work is."""

    done: int
    needed: int
    own: int
    """Judgements of this annotator."""
    skipped: int
    """Pairs that this annotator has passed over."""
    last: str | None
    """This annotator's last assignment that can be undone."""


def assign(store: Store, annotator: str, policy: Policy) -> Showing | None:
    """The pair that this annotator is to judge: the one that is on the screen already, or a new one with its sides
    drawn at random. None: there is nothing left for them."""
    now = time.time()
    with store.transaction() as db:
        row = db.execute(
            "SELECT id, pair FROM assignments WHERE annotator = ? AND verdict IS NULL AND withdrawn_at IS NULL",
            (annotator,),
        ).fetchone()
        if row is not None and not is_needed(db, row[1], policy):  # others were faster
            _withdraw(db, row[0], now)
            row = None
        if row is None:
            pair = next_pair(db, annotator, policy, now)
            if pair is None:
                return None
            answers = db.execute("SELECT first, second FROM pairs WHERE id = ?", (pair,)).fetchone()
            row = (_show(db, pair, annotator, secrets.choice(answers), now), pair)
        return _showing(db, row[0])


def judge(store: Store, assignment: str, verdict: str) -> bool:
    """Record what was said of an assignment. A second judgement of it changes nothing.

    Args:
        store: The database.
        assignment: Its id.
        verdict: One of :data:`~ptft_hf.feedback.store.VERDICTS`.

    Returns:
        Whether it was recorded now: False if the assignment was judged or withdrawn before.

    Raises:
        DataError: There is no such assignment or verdict.
    """
    if verdict not in VERDICTS:
        raise DataError(f"verdict: {verdict!r} is none of {', '.join(VERDICTS)}")
    with store.transaction() as db:
        if db.execute("SELECT 1 FROM assignments WHERE id = ?", (assignment,)).fetchone() is None:
            raise DataError(f"assignment: {assignment!r} is not known here")
        done = db.execute(
            "UPDATE assignments SET verdict = ?, judged_at = ? "
            "WHERE id = ? AND verdict IS NULL AND withdrawn_at IS NULL",
            (verdict, time.time(), assignment),
        )
        return done.rowcount == 1


def undo(store: Store, assignment: str) -> bool:
    """Take a judgement back, and show its pair to the same annotator again, with the same sides.

    Returns:
        Whether it was taken back now: False if it was before, or there is no such judgement.
    """
    now = time.time()
    with store.transaction() as db:
        row = db.execute(
            "SELECT pair, annotator, left_answer FROM assignments "
            "WHERE id = ? AND verdict IS NOT NULL AND withdrawn_at IS NULL",
            (assignment,),
        ).fetchone()
        if row is None:
            return False
        pair, annotator, left = row
        _withdraw(db, assignment, now)
        db.execute(
            "UPDATE assignments SET withdrawn_at = ? "
            "WHERE annotator = ? AND verdict IS NULL AND withdrawn_at IS NULL",
            (now, annotator),
        )
        _show(db, pair, annotator, left, now)
        return True


def ask_again(store: Store, annotator: str) -> int:
    """Let an annotator come back to all pairs that they have passed over; returns how many."""
    with store.transaction() as db:
        done = db.execute(
            "UPDATE assignments SET withdrawn_at = ? "
            "WHERE annotator = ? AND verdict = 'skip' AND withdrawn_at IS NULL",
            (time.time(), annotator),
        )
        return done.rowcount


def progress(store: Store, annotator: str, policy: Policy) -> Progress:
    """How far all are, and this annotator."""
    with store.transaction() as db:
        own, skipped = db.execute(
            f"SELECT count(*) FILTER (WHERE {JUDGED}), "
            "count(*) FILTER (WHERE x.withdrawn_at IS NULL AND x.verdict = 'skip') "
            "FROM assignments x WHERE x.annotator = ?",
            (annotator,),
        ).fetchone()
        last = db.execute(
            "SELECT id FROM assignments WHERE annotator = ? AND verdict IS NOT NULL AND withdrawn_at IS NULL "
            "ORDER BY judged_at DESC, rowid DESC LIMIT 1",
            (annotator,),
        ).fetchone()
        return Progress(*done_and_needed(db, policy), own, skipped, None if last is None else last[0])


def annotator_name(store: Store, given: str) -> str:
    """A name as it is kept: without white space around it, and as it was first written, whatever its case.

    Raises:
        DataError: It is empty, longer than :data:`NAME_LENGTH`, or has characters that cannot be seen.
    """
    name = " ".join(unicodedata.normalize("NFC", given).split())
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
        raise DataError(f"name: {name[:NAME_LENGTH]!r} should have 1 to {NAME_LENGTH} characters that can be seen")
    known = [row[0] for row in store.rows("SELECT DISTINCT annotator FROM assignments")]
    return next((other for other in known if other.casefold() == name.casefold()), name)


def _withdraw(db: sqlite3.Connection, assignment: str, now: float) -> None:
    db.execute("UPDATE assignments SET withdrawn_at = ? WHERE id = ?", (now, assignment))


def _show(db: sqlite3.Connection, pair: int, annotator: str, left: int, now: float) -> str:
    assignment = secrets.token_urlsafe(12)
    db.execute(
        "INSERT INTO assignments (id, pair, annotator, left_answer, shown_at) VALUES (?, ?, ?, ?, ?)",
        (assignment, pair, annotator, left, now),
    )
    return assignment


def _showing(db: sqlite3.Connection, assignment: str) -> Showing:
    row = db.execute(
        "SELECT x.id, t.text, t.given, l.text, r.text, EXISTS (SELECT 1 FROM assignments y WHERE y.pair = x.pair "
        "AND y.annotator = x.annotator AND y.verdict IS NOT NULL AND y.withdrawn_at IS NOT NULL) "
        "FROM assignments x JOIN pairs p ON p.id = x.pair JOIN answers l ON l.id = x.left_answer "
        "JOIN answers r ON r.id = p.first + p.second - x.left_answer JOIN prompts t ON t.id = l.prompt "
        "WHERE x.id = ?",
        (assignment,),
    ).fetchone()
    identity, prompt, given, left, right, again = row
    return Showing(identity, as_given(prompt, given), left, right, bool(again))

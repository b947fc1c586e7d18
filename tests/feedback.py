"""What the tests of human feedback share: small collections, and the text of a page."""

from __future__ import annotations

import importlib.util
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.judging import assign, judge
from ptft_hf.feedback.store import Answer, Store

ALONE = Policy(overlap=0)
"""Every pair is judged once."""
needs_server = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))),
    reason="starlette and uvicorn are not installed (extra feedback)",
)


def collection(path: Path, pairs: int) -> Path:
    """A database with so many prompts and one pair each: answer ``short i`` of ``alpha``, ``a longer one i`` of
    ``beta``."""
    with Store(path, create=True) as store:
        store.add(
            [
                (f"prompt {i}", [Answer("alpha", 0, f"short {i}"), Answer("beta", 0, f"a longer one {i}")])
                for i in range(pairs)
            ]
        )
    return path


def as_of_version_1(path: Path) -> None:
    """Make a database one that did not keep prompts as the data has them."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript("ALTER TABLE prompts DROP COLUMN given; PRAGMA user_version = 1")


def judge_all(store: Store, annotator: str, choose: object = "left", policy: Policy = ALONE) -> int:
    """Judge until nothing is left; ``choose`` is a verdict, or a source whose answer is always better. How many."""
    count = 0
    while (shown := assign(store, annotator, policy)) is not None:
        verdict = {"alpha": "left" if shown.left.startswith("short") else "right"}.get(str(choose), str(choose))
        assert judge(store, shown.assignment, verdict)
        count += 1
    return count

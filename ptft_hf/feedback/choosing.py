"""Which pair is shown next: one that still needs a judgement, at random or the one that a reward model is least sure
of."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from ptft_hf.errors import did_you_mean

RESERVED_SECONDS = 1800.0
"""A pair that is on somebody's screen is kept from others for so long; then that person is taken to have left."""

ORDERS = {"random": "p.place", "uncertain": "abs(a.score - b.score) IS NULL, abs(a.score - b.score), p.place"}


class Policy(NamedTuple):
    """What is shown first, and how many annotators judge a pair."""

    order: str = "random"
    """``random``, or ``uncertain``: by the difference of the answers' scores. Under Bradley and Terry's model (1952)
    the chance that the first is better is ``sigmoid(difference)``, so a small one is an uncertain one."""
    overlap: float = 0.1
    """Share of pairs that several annotators judge, drawn at random; what agreement is measured on."""
    annotators: int = 2
    """How many judge a pair of that share; all others are judged by one."""

    def faults(self) -> list[str]:
        """Values that mean nothing, one sentence each."""
        faults = []
        if self.order not in ORDERS:
            near = did_you_mean(self.order, ORDERS) or " (random or uncertain)"
            faults.append(f"next: there is no order {self.order!r}{near}")
        if not 0 <= self.overlap <= 1:
            faults.append(f"overlap: {self.overlap} is no share from 0 to 1")
        if self.annotators < 2:
            faults.append(f"annotators: {self.annotators} is not at least 2; for one annotator a pair give overlap 0")
        return faults


NEEDED = "iif(p.draw < :overlap, :annotators, 1)"
"""SQL: judgements that a pair needs."""
JUDGED = "x.withdrawn_at IS NULL AND x.verdict != 'skip'"


def next_pair(db: sqlite3.Connection, annotator: str, policy: Policy, now: float) -> int | None:
    """The id of a pair that this annotator has not been shown and that needs more judgements than it has and is
    about to get; None if there is none."""
    row = db.execute(
        f"""
        SELECT p.id FROM pairs p JOIN answers a ON a.id = p.first JOIN answers b ON b.id = p.second
        WHERE NOT EXISTS (
          SELECT 1 FROM assignments x WHERE x.pair = p.id AND x.annotator = :annotator AND x.withdrawn_at IS NULL
        ) AND {NEEDED} > (
          SELECT count(*) FROM assignments x WHERE x.pair = p.id AND (
            {JUDGED} OR x.withdrawn_at IS NULL AND x.verdict IS NULL AND x.shown_at > :since
          )
        )
        ORDER BY {ORDERS[policy.order]} LIMIT 1
        """,
        {**values(policy), "annotator": annotator, "since": now - RESERVED_SECONDS},
    ).fetchone()
    return None if row is None else int(row[0])


def is_needed(db: sqlite3.Connection, pair: int, policy: Policy) -> bool:
    """Whether a pair has fewer judgements than it needs."""
    query = f"SELECT {NEEDED} > (SELECT count(*) FROM assignments x WHERE x.pair = p.id AND {JUDGED}) "
    (needed,) = db.execute(f"{query} FROM pairs p WHERE p.id = :pair", {**values(policy), "pair": pair}).fetchone()
    return bool(needed)


def done_and_needed(db: sqlite3.Connection, policy: Policy) -> tuple[int, int]:
    """Judgements that were needed and are there, and all that are needed."""
    row = db.execute(
        f"""
        SELECT coalesce(sum(min({NEEDED}, coalesce(c.count, 0))), 0), coalesce(sum({NEEDED}), 0) FROM pairs p
        LEFT JOIN (SELECT x.pair, count(*) AS count FROM assignments x WHERE {JUDGED} GROUP BY x.pair) c
        ON c.pair = p.id
        """,
        values(policy),
    ).fetchone()
    return int(row[0]), int(row[1])


def values(policy: Policy) -> dict[str, float | int]:
    return {"overlap": policy.overlap, "annotators": policy.annotators}

"""``ptft feedback stats``: the statistics as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ptft_hf import report


def show(found: Mapping[str, Any]) -> None:
    """Print what :func:`ptft_hf.feedback.statistics_of` gave."""
    console, counts = report.results(), found["counts"]
    console.print(
        f"{counts['judgements']:,} judgements of {counts['judged']:,} of {counts['pairs']:,} pairs "
        f"({counts['prompts']:,} prompts, {counts['answers']:,} answers); {counts['skipped']:,} skipped",
        soft_wrap=True,
    )
    verdicts = {"left": "left", "right": "right", "tie": "tie", "both_bad": "both bad"}
    given = ", ".join(f"{name} {found['verdicts'].get(key, 0):,}" for key, name in verdicts.items())
    console.print(f"verdicts: {given}", soft_wrap=True)
    if found["annotators"]:
        table = Table("annotator")
        for name in ("judgements", "median seconds"):
            table.add_column(name, justify="right")
        for name, row in found["annotators"].items():
            table.add_row(escape(name), f"{row['judgements']:,}", f"{row['median_seconds']:.1f}")
        console.print(table)
    console.print(figures(found))


def figures(found: Mapping[str, Any]) -> Table:
    """One row a figure."""
    table = Table("figure", title_justify="left")
    for name in ("value", "95 % interval", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    agreement = found["agreement"]
    if agreement["method"]:
        add(table, f"agreement: {agreement['method']}, by pair", agreement["kappa"])
        add(table, "agreement: share of couples of judgements", agreement["raw"])
        if len(agreement["couples"]) > 1:
            for couple in agreement["couples"]:
                add(table, f"  Cohen's kappa, {couple['first']} and {couple['second']}", couple)
    add(table, "position bias: left was preferred (0.5: none)", found["left"])
    add(table, "length bias: the longer was preferred (0.5: none)", found["longer"])
    if found["reward"]["of"]:
        add(table, "the reward model's choice was preferred", found["reward"])
    for row in found["wins"]:
        add(table, f"{row['first']} was preferred to {row['second']} ({row['neither']:,} neither)", row)
    return table


def add(table: Table, name: str, figure: Mapping[str, Any]) -> None:
    """A figure that is not defined is a dash."""
    value, low, high = (None if figure[key] is None else f"{figure[key]:.3f}" for key in ("value", "low", "high"))
    table.add_row(escape(name), value or "-", "-" if low is None else f"{low} to {high}", f"{figure['of']:,}")

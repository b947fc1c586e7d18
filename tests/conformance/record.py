"""What the cells showed: ``results.jsonl``, and the table that is made of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.conformance.matrix import ARCHITECTURES, FAMILIES, METHODS, auto_class

RESULTS = Path(__file__).with_name("results.jsonl")
TABLE = Path(__file__).parents[2] / "adapters" / "CONFORMANCE.md"
MARKS = {"passed": "yes", "refused": "-", "failed": "**fails**", "": "?"}
HEAD = """\
# What works on what

Made by `python -m tests.conformance` from `tests/conformance/results.jsonl`; not by hand.

On tiny random checkpoints, each cell trains three steps by a real run and must show: a gradient in every trained
weight (key biases excepted: theirs is 0 by mathematics) and in no other, frozen weights that are equal to the last
bit, a saved model that loads with a difference of 0.0, a merge within 1e-5 (the methods that cannot be merged must
refuse), the base's own weights and logits when the adapter is taken out, and training that goes on from what was
saved. "-" is refused by name before anything is written; the reasons stand below each table. An architecture that
is not in a table has no such head upstream. Adapters that PEFT alone cannot load (prefix, bottleneck) are loaded
by `ptft_hf.load`; their cards say so.
"""


def read() -> dict[str, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return {line["cell"]: line for line in lines}


def add(found: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def render(known: dict[str, dict[str, Any]]) -> None:
    """Sort the record, each cell once, and write the table."""
    RESULTS.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)), encoding="utf-8")
    TABLE.write_text(table(known), encoding="utf-8")


def table(known: dict[str, dict[str, Any]]) -> str:
    counts = Counter(found["status"] for found in known.values())
    total = ", ".join(f"{counts[status]:,} {status}" for status in ("passed", "refused", "failed"))
    parts = [HEAD, f"{len(known):,} cells: {total}.", ""]
    for family in FAMILIES:
        names = [name for name in ARCHITECTURES if auto_class(name, family) is not None]
        parts += [f"## {family}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        reasons: defaultdict[str, set[str]] = defaultdict(set)
        for method in METHODS:
            found = [known.get(f"{name} {family} {method}", {}) for name in names]
            parts.append(f"| {method} | {' | '.join(MARKS[one.get('status', '')] for one in found)} |")
            for name, one in zip(names, found, strict=True):
                if one.get("status") == "refused":
                    reasons[one["reason"]].add(name)
        parts += ["", *(f"- {', '.join(sorted(where))}: {reason}" for reason, where in reasons.items()), ""]
    return "\n".join(parts)

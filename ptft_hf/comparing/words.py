"""Figures and verdicts in words, as they stand in both reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ptft_hf.comparing.statistics import MIN_SEEDS, Interval
from ptft_hf.comparing.verdicts import Recommendation, Verdict

MANY = 100_000
"""More test examples than that are no plan any more."""


class Unit(NamedTuple):
    """How differences of a metric are said: in points where it lies between 0 and 1, else as they are."""

    factor: float
    name: str

    def said(self, value: float, sign: bool = False) -> str:
        """A difference."""
        return f"{value * self.factor:{'+' if sign else ''}.{1 if self.factor > 1 else 4}f}"

    def with_name(self, value: float) -> str:
        """A difference with its unit, if it has one."""
        return f"{self.said(abs(value))} {self.name}".strip()


POINTS, RAW = Unit(100.0, "points"), Unit(1.0, "")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``"""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def value(mean: float, interval: Interval | None) -> str:
    """``0.734 (0.701 to 0.767)``"""
    return f"{mean:.3f}" + ("" if interval is None else f" ({interval.low:.3f} to {interval.high:.3f})")


def p(value: float | None) -> str:
    """A p-value."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdict(found: Verdict, unit: Unit, margin: float) -> str:
    """One sentence."""
    gap = unit.with_name(found.difference)
    match found.word:
        case "better" | "worse":
            small = ", which is less than the margin" if abs(found.difference) < margin else ""
            return f"{found.first} is {found.word} than {found.second}, by {gap}{small}"
        case "equivalent":
            return f"{found.first} and {found.second} are equivalent within {unit.with_name(margin)}"
        case "no verdict":
            return (
                f"no verdict on {found.first} and {found.second}: "
                f"{plural(found.seeds, 'seed')}, and at least {MIN_SEEDS} are needed"
            )
    alone = ""
    if found.alone:
        leader, other = (found.first, found.second)[:: 1 if found.difference > 0 else -1]
        alone = f" among so many pairs, though {leader} leads if it is compared with {other} alone"
    return f"{found.first} and {found.second} cannot be separated{alone}: {_missing(found, gap)}"


def _missing(found: Verdict, gap: str) -> str:
    """What would be needed, if the difference that was seen is the true one."""
    if found.difference == 0:
        return "no difference was seen, and the runs scatter too much to call them equivalent"
    parts = []
    if found.more_examples is None:
        pass  # their scatter is not the metric's
    elif found.more_examples >= MANY:
        parts.append(f"more than {MANY:,} more test examples")
    elif found.more_examples > 0:
        parts.append(f"about {_rounded(found.more_examples):,} more test examples")
    if found.more_seeds is None:
        parts.append("more seeds than anyone would run")
    elif found.more_seeds > 0:
        parts.append(f"about {plural(found.more_seeds, 'more seed')}")
    if not parts:  # what was planned for has a chance of 80%, and this was the rest
        return f"{gap} lie within the runs' scatter, though as many runs would usually show them"
    return f"{' and '.join(parts)} would be needed to show {gap}"


def _rounded(number: float) -> int:
    """To two digits, upwards: it is an estimate."""
    step = int(10 ** max(0, len(str(int(number))) - 2))
    return int(-(-number // step) * step)


def recommendation(found: Recommendation, unit: Unit, within: float) -> str:
    """One sentence: what to take, and how sure that is."""
    text = f"Within {unit.with_name(within)} of the best with the {found.constraint}: {found.method}"
    itself = found.method == found.best
    gap = unit.with_name(found.gap)
    text += ", which has the highest mean itself. " if itself else f" ({gap} below {found.best}). "
    if found.p_value is None:
        return text + f"How sure that is cannot be said: it takes {MIN_SEEDS} seeds on the rows of every other."
    if found.is_sure:
        return text + f"The runs bear it out (p {p(found.p_value)} for a larger loss)."
    return text + f"The runs do not settle it: a larger loss is not ruled out (p {p(found.p_value)})."

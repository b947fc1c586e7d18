"""The report's figures: SVG text to be set into the page, which fetches nothing."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, StrMethodFormatter

from ptft_hf.comparing.statistics import Interval

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
"""Okabe & Ito (2008), which the colour-blind can tell apart; grey in place of their yellow, which paper swallows."""
MARKERS = "osD^vP*X<>"
"""A second sign beside the colour, for grey prints, and for more methods than colours."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "path",
    "text.parse_math": False,
}


class Look(NamedTuple):
    """How a method is drawn, the same in every figure."""

    color: str
    marker: str


class Point(NamedTuple):
    """A method's quality: the interval over seeds (None under three), and every seed's own."""

    name: str
    mean: float
    interval: Interval | None
    seeds: Sequence[float]


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker for each method."""
    return {name: Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def quality(points: Sequence[Point], look: Mapping[str, Look], metric: str, where: str) -> str:
    """A line a method: mean, interval, and every seed as a small open circle."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(points)), layout="constrained")
        axis = figure.subplots()
        for row, point in enumerate(points):
            color, marker = look[point.name]
            axis.plot(point.seeds, [row] * len(point.seeds), "o", mfc="none", mec=color, ms=4, alpha=0.7)
            _error_bar(axis, point.mean, row, point.interval, horizontal=True, color=color, marker=marker)
        axis.set_yticks(range(len(points)), [_shown(point.name) for point in points])
        axis.invert_yaxis()
        axis.set_xlabel(f"test {metric}")
        return _svg(figure, f"Test {metric} of each method with its interval over seeds: {where}")


def pareto(
    points: Sequence[Point],
    costs: Mapping[str, Mapping[str, Sequence[float]]],
    look: Mapping[str, Look],
    metric: str,
    higher_is_better: bool,
    where: str,
) -> str:
    """Quality against each cost, a panel each; the line joins the methods that none beats in both.

    Args:
        points: Quality by method.
        costs: Name of the cost: method: one value a seed. Bars reach from the lowest to the highest of them.
        look: Of each method.
        metric: Its name.
        higher_is_better: Which end of the metric is the good one.
        where: The condition, for the title.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharey=True).flat
        for axis, (name, values) in zip(axes, costs.items(), strict=True):
            spots = {
                point.name: (sum(values[point.name]) / len(values[point.name]), point) for point in points
            }
            for x, point in spots.values():
                color, marker = look[point.name]
                seen = values[point.name]
                axis.errorbar(
                    x,
                    point.mean,
                    xerr=[[max(0.0, x - min(seen))], [max(0.0, max(seen) - x)]],
                    color=color,
                    elinewidth=1,
                    capsize=2,
                )
                _error_bar(axis, x, point.mean, point.interval, horizontal=False, color=color, marker=marker)
            front = _front([(x, point.mean) for x, point in spots.values()], higher_is_better)
            axis.plot(*zip(*front, strict=True), color="#666666", lw=1, ls=":", zorder=0)
            axis.set_xlabel(name)
            means = [x for x, _ in spots.values()]
            if min(means) > 0 and max(means) > 5 * min(means):
                axis.set_xscale("log")
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))
                axis.xaxis.set_minor_formatter(NullFormatter())
            else:
                axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        for axis in (figure.axes[0], figure.axes[2]):
            axis.set_ylabel(f"test {metric}")
        _legend(figure, [point.name for point in points], look)
        return _svg(figure, f"Test {metric} against {', '.join(costs)}: {where}")


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, Point]]],
    forecasts: Mapping[str, tuple[int, Interval]],
    look: Mapping[str, Look],
    metric: str,
    where: str,
) -> str:
    """Quality over training rows, a line a method; forecasts stand at the end of dashed lines, unfilled."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axis = figure.subplots()
        sizes = sorted({size for line in curves.values() for size, _ in line})
        for i, (name, line) in enumerate(curves.items()):
            color, marker = look[name]
            # Neighbours stand a little apart, or their bars would hide each other.
            shift = 1.015 ** (i - (len(curves) - 1) / 2)
            axis.plot([n * shift for n, _ in line], [p.mean for _, p in line], color=color, lw=1.4)
            for size, point in line:
                _error_bar(
                    axis,
                    size * shift,
                    point.mean,
                    point.interval,
                    horizontal=False,
                    color=color,
                    marker=marker,
                )
            if name in forecasts:
                target, expected = forecasts[name]
                last, point = line[-1]
                axis.plot(
                    [last * shift, target * shift], [point.mean, expected.mean], color=color, ls="--", lw=1
                )
                _error_bar(
                    axis, target * shift, expected.mean, expected, horizontal=False, color=color, marker=marker,
                    mfc="white",
                )  # fmt: skip
        axis.set_xscale("log")
        targets = {target for target, _ in forecasts.values()}
        ticks = sorted({*sizes, *targets})
        axis.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("training rows")
        axis.set_ylabel(f"test {metric}")
        _legend(figure, list(curves), look)
        return _svg(figure, f"Learning curves: test {metric} over training rows: {where}")


# ---- parts ----


def _error_bar(
    axis: Axes, x: float, y: float, interval: Interval | None, *, horizontal: bool, color: str, **kwargs: Any
) -> None:
    reach = None
    if interval is not None:
        reach = [[interval.mean - interval.low], [interval.high - interval.mean]]
    bars: dict[str, Any] = {"xerr" if horizontal else "yerr": reach}
    axis.errorbar(x, y, **bars, color=color, ms=6, capsize=3, ls="none", **kwargs)


def _front(spots: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """The spots that no other beats in cost and quality, by cost."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for cost, value in sorted(spots, key=lambda spot: (spot[0], -sign * spot[1])):
        if not front or sign * value > sign * front[-1][1]:
            front.append((cost, value))
    return front


def _legend(figure: Figure, names: Sequence[str], look: Mapping[str, Look]) -> None:
    axis = figure.axes[0]
    handles = [
        axis.plot([], [], color=look[name].color, marker=look[name].marker, ls="none")[0] for name in names
    ]
    figure.legend(
        handles, [_shown(name) for name in names], loc="outside lower center", ncols=3, frameon=False
    )


def _shown(name: str) -> str:
    """A name as a label: matplotlib passes over labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page. Its ids are those of this figure alone, and the
    same at every drawing."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    own = hashlib.sha256(title.encode()).hexdigest()[:8]
    text = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{own}-", text)
    head, end, body = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img"{end}{body}'

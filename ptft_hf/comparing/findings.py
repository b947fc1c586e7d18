"""What a grid's cells say, as sections of text, tables and figures; how they look is :mod:`.pages`' affair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ptft_hf.comparing import curves, figures, provenance, verdicts, words
from ptft_hf.comparing.figures import Look, Point
from ptft_hf.comparing.groups import Group, at_the_edge, groups_of, is_of, mixed_precision, same_precision
from ptft_hf.comparing.pages import Part, Picture, Section, Table
from ptft_hf.comparing.statistics import MIN_SEEDS, Interval, mean_interval
from ptft_hf.comparing.verdicts import COSTS, Method
from ptft_hf.comparing.words import POINTS, Unit

Result = Mapping[str, Any]
COST_NAMES = {
    "trainable_parameters": "trainable parameters",
    "peak_memory_mb": "peak memory, MB",
    "seconds": "training, seconds",
    "bytes_on_disk": "on disk, MB",
}
UNDECIDED = 10
"""So many pairs without a verdict are not listed, but those with the best method."""
CLASSES = 10
"""Classes in a table: those in which the methods differ most."""


def findings(
    results: Sequence[Result], margin: float, command: str, reference: str | None = None
) -> list[Section]:
    """All sections of the report.

    Args:
        results: The cells, finished and failed.
        margin: Differences below it count as none, in units of the metric.
        command: What was run.
        reference: The method that the others are compared with, if not all with all.
    """
    sections: list[Section] = []
    names = list(dict.fromkeys(result["cell"]["adapter"]["name"] for result in results))
    look = figures.looks(names)
    for group in groups_of(results):
        sections += [*_of_group(group, look, margin, reference)]
    return [*sections, *provenance.sections(results, margin, command)]


def _of_group(
    group: Group, look: Mapping[str, Look], margin: float, reference: str | None
) -> Iterator[Section]:
    methods = group.by_size[group.largest]
    rows = group.rows[group.largest]
    points = [point_of(method) for method in methods]
    tests = group.results[-1]["data"]["test"]["rows"]
    yield Section(
        group.where,
        2,
        [
            f"Test {group.metric} ({tests:,} test rows), with {rows:,} training rows unless another number is named. "
            f"{_how_many(methods, {method.name for of in group.by_size.values() for method in of})}",
            *mixed_precision(group),
            *filter(None, [recommendations(group, margin)]),
            quality_table(group),
            *at_the_edge(group),
            Picture(
                figures.quality(points, look, group.metric, group.where),
                f"Test {group.metric} with {rows:,} training rows: mean and 95% interval over seeds; "
                "open circles are the seeds.",
            ),
        ],
    )
    yield Section("Which is better", 3, verdict_parts(group, margin, reference))
    yield Section("What it costs", 3, _cost_parts(group, points, look))
    if len(group.rows) > 1:
        yield Section("More labels", 3, _curve_parts(group, look))
    if classes := class_table(group):
        yield Section("Class by class", 3, [classes])


def recommendations(group: Group, margin: float) -> list[str]:
    """What to take of the methods with the largest training set, a sentence a cost; nothing of one method alone, nor
    of seconds and memory where methods were not computed in the same precision."""
    methods = group.by_size[group.largest]
    if len(methods) == 1:
        return []
    costs = COSTS if same_precision(group) else ("trainable_parameters", "bytes_on_disk")
    found = [verdicts.recommend(methods, cost, margin) for cost in costs]
    return [words.recommendation(one, group.unit, margin) for one in found]


def point_of(method: Method) -> Point:
    """Mean and interval; none under three seeds."""
    return Point(
        method.name, float(method.quality.mean()), _interval(method.quality), method.quality.tolist()
    )


def _interval(values: Any) -> Interval | None:
    return mean_interval(values) if len(values) >= MIN_SEEDS else None


def _how_many(methods: Sequence[Method], every: set[str]) -> str:
    counts = sorted({len(method.seeds) for method in methods})
    said = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    missing = f" {len(methods)} of {len(every)} methods ran with so many." if len(methods) < len(every) else ""
    return f"{said} seed{'' if counts[-1] == 1 else 's'} a method.{missing}" + (
        "" if counts[0] >= MIN_SEEDS else f" Under {MIN_SEEDS} seeds there are no intervals and no verdicts."
    )


# ---- tables ----


def quality_table(group: Group) -> Table:
    """Methods down, training-set sizes across: mean and interval."""
    sizes = sorted(group.rows, key=group.rows.__getitem__)
    found = {
        (size, method.name): words.value(float(method.quality.mean()), _interval(method.quality))
        for size, methods in group.by_size.items()
        for method in methods
    }
    names = list(dict.fromkeys(name for _, name in found))
    return Table(
        f"Test {group.metric}: mean over seeds and 95% interval, by number of training rows",
        ["method", *(f"{group.rows[size]:,} rows" for size in sizes)],
        [[name, *(found.get((size, name), "-") for size in sizes)] for name in names],
    )


def verdict_parts(group: Group, margin: float, reference: str | None) -> list[Part]:
    """For each size a table with a sentence a pair."""
    parts: list[Part] = []
    for size in sorted(group.rows, key=group.rows.__getitem__, reverse=True):
        judged = verdicts.judge(group.by_size[size], margin, reference=reference)
        order = ("better", "worse", "equivalent", "cannot be separated", "no verdict")
        judged.sort(key=lambda verdict: order.index(verdict.word))
        if len(judged) > UNDECIDED and all(verdict.word == "no verdict" for verdict in judged):
            best = max(group.by_size[size], key=lambda method: float(method.goodness.mean())).name
            parts.append(f"None of {len(judged)} pairs can be decided; here are those with {best}, the best mean.")
            judged = [verdict for verdict in judged if best in (verdict.first, verdict.second)]
        unit = f", {group.unit.name}" if group.unit.name else ""
        rows = [
            [
                words.verdict(verdict, group.unit, margin),
                group.unit.said(verdict.difference, sign=True),
                "-" if verdict.interval is None else _reach(verdict.interval, group.unit),
                words.p(verdict.p_value),
                words.p(verdict.mcnemar) + ("" if verdict.fits else " *"),
            ]
            for verdict in judged
        ]
        if unlike := verdicts.unlike(group.by_size[size]):
            parts.append(
                f"{group.rows[size]:,} training rows: {words.listed(unlike)} had other training or test rows at the "
                "same seed, and are not compared. If the data was changed in between, delete the older files of "
                "cells, and they will be run again."
            )
        if rows:
            parts.append(
                Table(
                    f"{group.rows[size]:,} training rows: {words.plural(len(rows), 'pair')}",
                    ["verdict", f"difference{unit}", "95% interval", "p (Holm)", "p (McNemar)"],
                    rows,
                )
            )
        if any(not verdict.fits for verdict in judged):
            parts.append(_stand_in(group.metric, group.by_size[size]))
    return parts or ["There is nothing to compare: one method, or no seed that two have in common."]


def _stand_in(metric: str, methods: Sequence[Method]) -> str:
    """What the test over examples asks where the metric is not the mean over them."""
    shares = all(scores.min() >= 0 for method in methods for scores in method.outcomes)
    asked, scatter = "how many test rows are right", "right and wrong"
    if not shares:
        asked, scatter = "how near each test row is (squared error, log-likelihood)", "these"
    more = (
        f"What is equivalent, and the number of test examples needed, take the scatter of {scatter} for that of the "
        "metric."
        if all(method.of_one_unit for method in methods)
        else "The two are of different units, so that nothing is called equivalent, and the number of test examples "
        "needed is not told."
    )
    return (
        f"* McNemar's test asks {asked}, which is not {metric}, but stands in for it: a method is called better only "
        f"if it is by both. {more}"
    )


def _reach(interval: Interval, unit: Unit) -> str:
    return f"{unit.said(interval.low, sign=True)} to {unit.said(interval.high, sign=True)}"


def _cost_parts(group: Group, points: Sequence[Point], look: Mapping[str, Look]) -> list[Part]:
    methods = group.by_size[group.largest]
    costs = {
        COST_NAMES[cost]: {
            method.name: _in_megabytes(cost, method.costs[cost]).tolist() for method in methods
        }
        for cost in COSTS
    }
    higher = methods[0].higher_is_better
    return [
        _cost_table(group),
        Picture(
            figures.pareto(points, costs, look, group.metric, higher, group.where),
            "Quality against cost. The dotted line joins the methods that no other beats in both; bars are the 95% "
            "interval over seeds, and the lowest and highest cost seen.",
        ),
    ]


def _in_megabytes(cost: str, values: Any) -> Any:
    return values / 1e6 if cost == "bytes_on_disk" else values


def _cost_table(group: Group) -> Table:
    rows = []
    for method in group.by_size[group.largest]:
        mine = [
            result["cost"]
            for result in group.results
            if is_of(result, method.name, group.largest)
        ]

        def mean(name: str, costs: Sequence[Mapping[str, Any]] = mine) -> float:
            return float(np.mean([cost[name] for cost in costs]))

        speeds = [cost["inference_examples_per_second"] for cost in mine]
        merged = [speed["merged"] for speed in speeds if isinstance(speed["merged"], float)]
        rows.append(
            [
                method.name,
                f"{mean('trainable_parameters'):,.0f}",
                f"{mean('peak_memory_mb'):,.0f}",
                f"{mean('seconds'):,.1f}",
                f"{mean('examples_per_second'):,.0f}",
                f"{mean('tokens_per_second'):,.0f}",
                f"{mean('bytes_on_disk') / 1e6:,.1f}",
                f"{mean('load_seconds'):.2f}",
                f"{np.mean([speed['attached'] for speed in speeds]):,.0f}",
                f"{np.mean(merged):,.0f}" if merged else "-",
            ]
        )
    return Table(
        "Means over seeds of the chosen learning rate's run; memory is the peak of the cell's own process",
        ["method", "trainable parameters", "peak memory, MB", "training, s", "rows/s", "tokens/s", "on disk, MB",
         "loading, s", "inference, rows/s", "merged, rows/s"],
        rows,
    )  # fmt: skip


# ---- more labels ----


def _curve_parts(group: Group, look: Mapping[str, Look]) -> list[Part]:
    lines: dict[str, list[tuple[int, Point]]] = {}
    for size in sorted(group.rows, key=group.rows.__getitem__):
        for method in group.by_size[size]:
            lines.setdefault(method.name, []).append((group.rows[size], point_of(method)))
    found = {name: forecast for name in lines if (forecast := _forecast(group, name)) is not None}
    ahead = {name: (forecast.size, forecast.expected) for name, forecast in found.items()}
    parts: list[Part] = [
        Picture(
            figures.learning_curves(lines, ahead, look, group.metric, group.where),
            f"Test {group.metric} over training rows, with 95% intervals over seeds"
            + ("; dashed and unfilled: the forecast." if found else "."),
        )
    ]
    if not found:
        return [*parts, f"A forecast needs {curves.MIN_SIZES} sizes and {MIN_SEEDS} seeds at each of them."]
    rows = [
        [
            name,
            words.value(forecast.expected.mean, forecast.expected),
            f"{forecast.predicted:.3f}",
            f"{forecast.measured:.3f}",
            f"{forecast.without_law:.3f}",
            "came nearer" if forecast.held else "did not come nearer: do not rely on it",
        ]
        for name, forecast in found.items()
    ]
    first = next(iter(found.values()))
    hidden = " and ".join(f"{size:,}" for size in first.hidden)
    parts.append(
        Table(
            f"Forecast of test {group.metric} with {first.size:,} training rows (mean and 95% interval over seeds of "
            f"a power law fitted to each), and the check: {hidden} rows "
            "hidden, the largest size foretold from the rest",
            ["method", "forecast", "check: foretold", "measured", '"it stays as it is"', "the law"],
            rows,
        )
    )
    return parts


def _forecast(group: Group, name: str) -> curves.Forecast | None:
    """Of the seeds that were run at every size."""
    sizes = sorted(group.rows, key=group.rows.__getitem__)
    by_size = [{m.name: m for m in group.by_size[size]}.get(name) for size in sizes]
    if not all(by_size):
        return None
    methods = [method for method in by_size if method is not None]
    seeds = [seed for seed in methods[0].seeds if all(seed in method.seeds for method in methods)]
    quality = np.array([[m.goodness[m.seeds.index(seed)] for m in methods] for seed in seeds])
    sign = 1.0 if methods[0].higher_is_better else -1.0
    ceiling = (1.0 if group.unit is POINTS else np.inf) if sign > 0 else 0.0
    found = curves.forecast([group.rows[size] for size in sizes], quality, ceiling) if seeds else None
    if found is None or sign > 0:
        return found
    mean, low, high = found.expected
    return found._replace(
        expected=Interval(-mean, -high, -low),
        predicted=-found.predicted,
        measured=-found.measured,
        without_law=-found.without_law,
    )


def class_table(group: Group) -> Table | None:
    """F1 of each class, the method's mean over seeds; the classes in which the methods differ most."""
    figures_of: dict[str, dict[str, list[float]]] = {}
    support: dict[str, int] = {}
    for result in group.results:
        if result["cell"]["size"] == group.largest:
            for row in result["test"]["report"].get("per_class", []):
                mine = figures_of.setdefault(row["label"], {})
                mine.setdefault(result["cell"]["adapter"]["name"], []).append(row["f1"])
                support[row["label"]] = row["support"]
    methods = [method.name for method in group.by_size[group.largest]]
    means = {
        label: [float(np.mean(found[name])) for name in methods]
        for label, found in figures_of.items()
        if all(name in found for name in methods)
    }
    if not means:
        return None
    spread = {label: max(values) - min(values) for label, values in means.items()}
    chosen = sorted(means, key=lambda label: -spread[label])[:CLASSES]
    which = f", the {CLASSES} of {len(means)} classes" if len(means) > CLASSES else ""
    return Table(
        f"F1 on test, means over seeds{which} in which the methods differ most first",
        ["class", "test rows", *methods, "largest difference"],
        [
            [label, f"{support[label]:,}", *(f"{v:.3f}" for v in means[label]), f"{spread[label]:.3f}"]
            for label in chosen
        ],
    )

"""From cells to conclusions: which of two methods is better, and what to take. Pure functions over the figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ptft_hf.comparing import statistics
from ptft_hf.comparing.statistics import MIN_SEEDS, Interval

ALPHA = 0.05
MARGIN = 0.01
"""One point: differences below it are called none. Of most published ones the sign is open at this size."""

Word = Literal["better", "worse", "equivalent", "cannot be separated", "no verdict"]
COSTS = {
    "trainable_parameters": "fewest trainable parameters",
    "peak_memory_mb": "least memory",
    "seconds": "shortest training",
    "bytes_on_disk": "least disk",
}


OF_ANOTHER_UNIT = ("pearson", "spearman", "mae", "rmse", "perplexity")
"""Metrics that cannot be measured by the scatter of their examples' scores, which are squared errors or
log-likelihoods."""


class Condition(NamedTuple):
    """What two runs must share to be compared."""

    model: str
    task: str
    size: int | None


class Method(NamedTuple):
    """The runs of one method under one condition."""

    name: str
    seeds: tuple[int, ...]
    quality: npt.NDArray[np.float64]
    """[S] the metric on the test set, as it is."""
    outcomes: tuple[npt.NDArray[np.float64], ...]
    """For each seed [M] a score an example, higher is better."""
    costs: dict[str, npt.NDArray[np.float64]]
    """[S] each, by the names of :data:`COSTS`."""
    higher_is_better: bool
    rows: tuple[tuple[str, str], ...]
    """Fingerprints of each seed's training and test rows."""
    of_one_unit: bool = True
    """Whether outcomes are of the metric's unit, see :data:`OF_ANOTHER_UNIT`."""

    @property
    def goodness(self) -> npt.NDArray[np.float64]:
        """[S] the metric, turned so that higher is better."""
        return self.quality if self.higher_is_better else -self.quality

    @property
    def averages_outcomes(self) -> bool:
        """Whether the metric is the mean of the outcomes, so that a test over examples is one of the metric."""
        return bool(np.allclose(self.goodness, [scores.mean() for scores in self.outcomes], atol=1e-6))


class Evidence(NamedTuple):
    """What two methods' runs say about their difference (the first minus the second, higher is better)."""

    first: str
    second: str
    differences: npt.NDArray[np.float64]
    """[S] by seed."""
    examples: npt.NDArray[np.float64]
    """[S, M] by seed and example; [1, S * M] if each seed has test rows of its own (cut from its train)."""
    fits: bool
    """Whether the metric is the mean over the examples."""
    of_one_unit: bool = True
    """Whether the examples' scatter may stand in for the metric's."""

    @property
    def mcnemar(self) -> float:
        return statistics.mcnemar_over_runs(self.examples)

    @property
    def p_value(self) -> float:
        """Of "no difference": the larger of the seeds' and the examples' p-value.

        A method is called better only if it would be with other seeds *and* with other examples; rejecting both
        hypotheses at a level keeps that level (an intersection-union test, Berger 1982). Seeds alone do not do: they
        share the test rows, whose luck they repeat. Where the metric is not the mean over the examples, McNemar's
        test stands in for one of the metric, and counts if both point the same way.
        """
        agrees = self.fits or float(self.differences.mean()) * float(self.examples.mean()) > 0
        return max(statistics.mean_p_value(self.differences), self.mcnemar if agrees else 1.0)

    def equivalence(self, margin: float) -> float:
        """The p-value of "they differ by the margin or more", over seeds and examples."""
        return max(self.inferiority(margin, sign) for sign in (1.0, -1.0))

    def inferiority(self, margin: float, sign: float = 1.0) -> float:
        """The p-value of "the first (of sign -1.0 the second) is worse by the margin or more", over seeds and
        examples; where the metric is not the mean over these, their standard error stands in for the metric's, and
        where it cannot, since it is of another unit, nothing is ruled out."""
        if not self.of_one_unit:
            return 1.0
        mean, count = sign * float(self.differences.mean()), len(self.differences)
        errors = (
            (float(self.differences.std(ddof=1)) / count**0.5, float(count - 1)),
            (self.deviation / self.examples.shape[1] ** 0.5, float("inf")),
        )
        return max(statistics.inferiority_p_value(mean, error, margin, freedom) for error, freedom in errors)

    @property
    def deviation(self) -> float:
        """Standard deviation of the examples' differences, each averaged over the seeds."""
        return float(self.examples.mean(axis=0).std(ddof=1)) if self.examples.shape[1] > 1 else 0.0


class Verdict(NamedTuple):
    """Two methods in one word, and the figures behind it."""

    first: str
    second: str
    word: Word
    difference: float
    interval: Interval | None
    """Over seeds, not corrected for the family; None under three seeds."""
    p_value: float | None
    """Of "no difference", corrected for the family; None under three seeds."""
    mcnemar: float
    """Over examples, not corrected."""
    fits: bool
    seeds: int
    more_examples: float | None
    more_seeds: int | None
    alone: bool = False
    """Whether "no difference" would be rejected if the pair were the only one; the family's size is then the reason
    that it is not."""


def evidence(first: Method, second: Method) -> Evidence | None:
    """The differences at the seeds that both have; None if there is none, or the rows were not the same."""
    common = [seed for seed in first.seeds if seed in second.seeds]
    a, b = ([method.seeds.index(seed) for seed in common] for method in (first, second))
    rows = [first.rows[i] for i in a]
    if not common or rows != [second.rows[i] for i in b]:
        return None
    examples = [first.outcomes[i] - second.outcomes[j] for i, j in zip(a, b, strict=True)]
    same_test = len({test for _, test in rows}) == 1
    return Evidence(
        first.name,
        second.name,
        first.goodness[a] - second.goodness[b],
        np.stack(examples) if same_test else np.concatenate(examples)[None],
        first.averages_outcomes and second.averages_outcomes,
        first.of_one_unit and second.of_one_unit,
    )


def judge(
    methods: Sequence[Method], margin: float = MARGIN, alpha: float = ALPHA, reference: str | None = None
) -> list[Verdict]:
    """A verdict for each pair of methods; the pairs are one family, corrected by Holm.

    *Better* or *worse*: the corrected p-value of "no difference" is at most ``alpha``. Otherwise *equivalent*: so
    is that of "they differ by ``margin`` or more", corrected likewise. Otherwise they *cannot be separated*, and how
    many more test examples, or seeds, would be needed if the difference seen is the true one. Under three seeds
    there is *no verdict*.

    Args:
        methods: The runs under one condition.
        margin: In units of the metric.
        alpha: The chance of any wrong claim in the family.
        reference: The method that all others are compared with; None compares all with all, and with more pairs
            each needs more seeds to be told apart.
    """
    couples = list(itertools.combinations(methods, 2))
    if reference is not None:
        against = [method for method in methods if method.name == reference]
        couples = [(method, other) for other in against for method in methods if method is not other]
    pairs = [evidence(first, second) for first, second in couples]
    found = [pair for pair in pairs if pair is not None]
    judged = [pair for pair in found if len(pair.differences) >= MIN_SEEDS]
    p_values = statistics.holm([pair.p_value for pair in judged])
    equal = statistics.holm([pair.equivalence(margin) for pair in judged])
    open_pairs = sum(p > alpha for p in p_values)
    verdicts = [_without_verdict(pair) for pair in found if len(pair.differences) < MIN_SEEDS]
    for pair, p_value, p_equal in zip(judged, p_values, equal, strict=True):
        names, mean = (pair.first, pair.second), float(pair.differences.mean())
        word: Word = "cannot be separated"
        if p_value <= alpha:
            word = "better" if mean > 0 else "worse"
        elif p_equal <= alpha:
            word = "equivalent"
        examples, seeds = _needed(pair, alpha / open_pairs) if word == "cannot be separated" else (None, None)
        interval = statistics.mean_interval(pair.differences, 1 - alpha)
        found_seeds = len(pair.differences)
        alone = word == "cannot be separated" and pair.p_value <= alpha
        verdicts.append(
            Verdict(
                *names, word, mean, interval, p_value, pair.mcnemar, pair.fits, found_seeds, examples, seeds, alone
            )
        )
    return verdicts


def _needed(pair: Evidence, level: float) -> tuple[float | None, int | None]:
    """Test examples and seeds that are missing, at the level at which Holm tests this pair next; None of examples
    whose scatter is not the metric's."""
    mean = float(pair.differences.mean())
    examples = statistics.examples_needed(mean, pair.deviation, level) - pair.examples.shape[1]
    seeds = statistics.seeds_needed(mean, float(pair.differences.std(ddof=1)), level)
    needed = max(0.0, examples) if pair.of_one_unit else None
    return needed, None if seeds is None else max(0, seeds - len(pair.differences))


def _without_verdict(pair: Evidence) -> Verdict:
    mean, count = float(pair.differences.mean()), len(pair.differences)
    return Verdict(
        pair.first, pair.second, "no verdict", mean, None, None, pair.mcnemar, pair.fits, count, None, None
    )


def unlike(methods: Sequence[Method]) -> list[str]:
    """The methods of which a seed's training or test rows are not those that another method had at it."""
    rows: dict[int, set[tuple[str, str]]] = {}
    for method in methods:
        for seed, mine in zip(method.seeds, method.rows, strict=True):
            rows.setdefault(seed, set()).add(mine)
    return [method.name for method in methods if any(len(rows[seed]) > 1 for seed in method.seeds)]


# ---- what to take ----


class Recommendation(NamedTuple):
    """The cheapest method that is good enough, and whether the runs bear that out."""

    constraint: str
    method: str
    best: str
    """The method with the highest mean."""
    gap: float
    """How far the recommended one's mean lies below the best one's, in units of the metric."""
    cost: float
    p_value: float | None
    """Of "another is better by the margin or more"; None if not all can be tested, or there is no other."""

    @property
    def is_sure(self) -> bool:
        return self.p_value is not None and self.p_value <= ALPHA


def recommend(methods: Sequence[Method], cost: str, within: float = MARGIN) -> Recommendation:
    """Of the methods whose mean is within ``within`` of the best mean, the one that costs least.

    How sure: the largest p-value of one-sided tests of non-inferiority to each other method, since any of them may
    be the best in truth.

    Args:
        methods: The runs under one condition; at least one.
        cost: One of :data:`COSTS`.
        within: In units of the metric.
    """
    best = max(methods, key=lambda method: float(method.goodness.mean()))
    top = float(best.goodness.mean())
    good = [method for method in methods if float(method.goodness.mean()) >= top - within - 1e-12]
    chosen = min(good, key=lambda method: float(method.costs[cost].mean()))
    pairs = [evidence(chosen, other) for other in methods if other is not chosen]
    tested = [pair.inferiority(within) for pair in pairs if pair and len(pair.differences) >= MIN_SEEDS]
    p_value = max(tested) if tested and len(tested) == len(pairs) else None
    gap = top - float(chosen.goodness.mean())
    return Recommendation(COSTS[cost], chosen.name, best.name, gap, float(chosen.costs[cost].mean()), p_value)


# ---- cells ----


def methods_of(results: Sequence[Mapping[str, Any]]) -> dict[Condition, list[Method]]:
    """Finished cells by condition and method, in the order in which they come."""
    found: dict[Condition, dict[str, list[Mapping[str, Any]]]] = {}
    for result in results:
        if result["status"] == "finished":
            methods = found.setdefault(condition_of(result), {})
            methods.setdefault(result["cell"]["adapter"]["name"], []).append(result)
    return {
        condition: [_method(name, cells) for name, cells in methods.items()]
        for condition, methods in found.items()
    }


def condition_of(result: Mapping[str, Any]) -> Condition:
    cell = result["cell"]
    return Condition(cell["model"], cell["task"]["name"], cell["size"])


def _method(name: str, cells: Sequence[Mapping[str, Any]]) -> Method:
    metric = cells[0]["metric"]
    return Method(
        name,
        tuple(cell["cell"]["seed"] for cell in cells),
        np.array([cell["test"]["metrics"][metric["name"]] for cell in cells]),
        tuple(np.array([float(score) for score in cell["test"]["outcomes"]]) for cell in cells),
        {cost: np.array([cell["cost"][cost] for cell in cells], dtype=np.float64) for cost in COSTS},
        metric["higher_is_better"],
        tuple((cell["data"]["train"]["fingerprint"], cell["data"]["test"]["fingerprint"]) for cell in cells),
        metric["name"] not in OF_ANOTHER_UNIT,
    )

"""Intervals, tests and corrections against hand-worked sums, scipy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ptft_hf.comparing import curves, statistics, verdicts
from ptft_hf.comparing.verdicts import Method

DRAWS = 2_000


def method(name: str, right: np.ndarray) -> Method:
    """Right and wrong [S, M] as the runs of a method."""
    seeds = range(len(right))
    rows = tuple((f"train {seed}", "test") for seed in seeds)
    return Method(name, tuple(seeds), right.mean(axis=1), tuple(right.astype(float)), {}, True, rows)


# ---- intervals ----


def test_a_t_interval_by_hand():
    # mean 2, s = 1, t(0.975, 2) = 4.302653: 2 +- 4.302653 / sqrt(3)
    found = statistics.mean_interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    with pytest.raises(ValueError, match="at least two values, not 1"):
        statistics.mean_interval([1.0])


def test_seeds_that_agree_but_for_rounding_have_no_interval_around_them():
    for value in (0.7, 0.1, 1 / 3):
        assert statistics.mean_interval([value] * 11) == pytest.approx((value, value, value))
        assert statistics.mean_p_value([value] * 11) == 0.0


@pytest.mark.parametrize("seeds", [3, 5, 9, 10, 15])
@pytest.mark.parametrize("shape", ["normal", "skewed", "uniform"])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int, shape: str):
    rng = np.random.default_rng(seeds)
    draw = {
        "normal": lambda: rng.normal(0.0, 2.0, seeds),
        "skewed": lambda: rng.beta(8, 2, seeds) - 0.8,
        "uniform": lambda: rng.uniform(-1, 1, seeds),
    }[shape]
    times = DRAWS if seeds < 10 else 500  # a bootstrap costs milliseconds
    covered = 0
    for _ in range(times):
        interval = statistics.mean_interval(draw())
        covered += interval.low <= 0.0 <= interval.high
    assert 0.90 <= covered / times <= 0.99


def test_a_bootstrap_is_not_used_with_few_seeds():
    """Percentile intervals of three seeds cover far less: why ours are t intervals."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        x = rng.normal(0, 1, 3)
        means = x[rng.integers(0, 3, (500, 3))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0 <= high
    assert covered / 300 < 0.88


def test_the_p_value_of_differences_is_that_of_a_paired_t_test():
    x = np.array([0.01, 0.03, 0.02, 0.05])
    assert statistics.mean_p_value(x) == pytest.approx(stats.ttest_1samp(x, 0.0).pvalue)
    assert statistics.mean_p_value([0.1, 0.1, 0.1]) == 0.0  # the limit of t
    assert statistics.mean_p_value([0.0, 0.0, 0.0]) == 1.0
    rng = np.random.default_rng(1)
    many = rng.normal(0.5, 1.0, 12)
    assert statistics.mean_p_value(many) == pytest.approx(stats.ttest_1samp(many, 0.0).pvalue, abs=0.05)


# ---- tests over examples ----


def test_mcnemar_by_hand():
    # 2 against 8 of 10: 2 * (1 + 10 + 45) / 2**10
    assert statistics.mcnemar(2, 8) == pytest.approx(2 * 56 / 1024)
    assert statistics.mcnemar(0, 0) == 1.0
    one = np.array([[1] * 2 + [-1] * 8 + [0] * 50])
    assert statistics.mcnemar_over_runs(one) == pytest.approx(2 * 56 / 1024)


def test_mcnemar_over_runs_by_hand():
    # Sums by example 2, 1, -1, 0: (2 + 1 - 1)**2 / (4 + 1 + 1) = 4 / 6
    d = np.array([[1, 1, 0, 0], [1, 0, -1, 0]])
    assert statistics.mcnemar_over_runs(d) == pytest.approx(stats.chi2.sf(4 / 6, 1))
    assert statistics.mcnemar_over_runs(np.zeros((3, 5))) == 1.0


def test_runs_on_the_same_examples_are_no_more_examples():
    """Ten equal runs say as much as one; counted as ten times the examples they would say too much."""
    rng = np.random.default_rng(0)
    d = rng.choice([-1, 0, 1], p=[0.08, 0.8, 0.12], size=(1, 500))
    plain = stats.chi2.sf(float(d.sum()) ** 2 / float((d**2).sum()), 1)
    assert statistics.mcnemar_over_runs(np.repeat(d, 10, axis=0)) == pytest.approx(plain)


# ---- families ----


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, then never less than before
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_holm_against_its_definition():
    """Step down: reject the smallest while p <= alpha / (m - k); a hypothesis is rejected when adjusted <= alpha."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        p = rng.beta(0.3, 2, 7)
        rejected = np.zeros(7, bool)
        for k, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (7 - k):
                break
            rejected[index] = True
        assert (np.array(statistics.holm(list(p))) <= 0.05).tolist() == rejected.tolist()


def test_non_inferiority_by_hand():
    # (0.01 - 0.002) / 0.004 = 2 with 9 degrees of freedom
    found = statistics.inferiority_p_value(-0.002, 0.004, 0.01, 9)
    assert found == pytest.approx(stats.t.sf(2.0, 9))
    assert statistics.inferiority_p_value(-0.02, 0.001, 0.01, 9) > 0.999
    assert statistics.inferiority_p_value(0.02, 0.001, 0.01, 9) < 0.001
    assert [statistics.inferiority_p_value(mean, 0.0, 0.01, 2) for mean in (-0.01, -0.005)] == [1.0, 0.0]


# ---- how much more ----


def test_examples_needed_by_hand():
    # ((1.959964 + 0.841621) * 0.5 / 0.04)**2 = 1226.4: four points on about 1,200 items
    assert statistics.examples_needed(0.04, 0.5, 0.05) == pytest.approx(1226.4, abs=0.1)
    assert statistics.examples_needed(0.0, 0.5, 0.05) == math.inf


def test_as_many_examples_as_are_said_to_be_needed_find_the_difference_that_often():
    rng = np.random.default_rng(4)
    count = round(statistics.examples_needed(0.05, math.sqrt(0.25 - 0.05**2), 0.05))
    found = 0
    for _ in range(DRAWS):
        d = rng.choice([-1, 0, 1], p=[0.10, 0.75, 0.15], size=(1, count))
        found += statistics.mcnemar_over_runs(np.repeat(d, 2, axis=0)) <= 0.05
    assert found / DRAWS == pytest.approx(statistics.POWER, abs=0.04)


def test_as_many_seeds_as_are_said_to_be_needed_find_the_difference_that_often():
    rng = np.random.default_rng(5)
    count = statistics.seeds_needed(0.02, 0.015, 0.05)
    assert count is not None and count < 10
    found = sum(statistics.mean_p_value(rng.normal(0.02, 0.015, count)) <= 0.05 for _ in range(DRAWS))
    fewer = sum(statistics.mean_p_value(rng.normal(0.02, 0.015, count - 1)) <= 0.05 for _ in range(DRAWS))
    assert fewer / DRAWS < statistics.POWER <= found / DRAWS + 0.02
    assert statistics.seeds_needed(0.0, 1.0, 0.05) is None
    assert statistics.seeds_needed(1e-6, 1.0, 0.05) is None


# ---- the whole verdict ----


def runs(rng: np.random.Generator, ease: np.ndarray, seeds: int, level: float, scatter: float) -> np.ndarray:
    """Right or wrong [S, M]: examples differ in ease, seeds in level."""
    logits = level + ease[None] + rng.normal(0, scatter, (seeds, 1))
    return (rng.random((seeds, len(ease))) < 1 / (1 + np.exp(-logits))).astype(float)


@pytest.mark.parametrize(("seeds", "examples"), [(3, 400), (3, 40), (5, 400)])
def test_two_copies_of_one_method_are_rarely_called_different(seeds: int, examples: int):
    rng = np.random.default_rng(seeds + examples)
    called = 0
    for _ in range(DRAWS):
        ease = rng.normal(0, 1.5, examples)
        one, other = (method(name, runs(rng, ease, seeds, 1.0, 0.15)) for name in "ab")
        (verdict,) = verdicts.judge([one, other])
        called += verdict.word in ("better", "worse")
    assert called / DRAWS <= 0.06


def test_copies_are_rarely_called_different_where_the_metric_is_no_mean_over_examples():
    rng = np.random.default_rng(8)
    called = 0
    for _ in range(DRAWS):
        ease = rng.normal(0, 1.5, 300)
        pair = [method(name, runs(rng, ease, 3, 1.0, 0.15)) for name in "ab"]
        pair = [one._replace(quality=one.quality**2) for one in pair]
        called += verdicts.judge(pair)[0].word in ("better", "worse")
    assert 0.01 < called / DRAWS <= 0.06


@pytest.mark.parametrize("is_mean", [True, False])
def test_methods_of_equal_quality_with_weaknesses_of_their_own_are_rarely_called_different(is_mean: bool):
    """One has trouble with other examples than the other, alike with all seeds: on other examples of the same kind
    it may well be the better one, which seeds alone cannot tell."""
    rng = np.random.default_rng(12)
    called = 0
    for _ in range(DRAWS):
        ease = rng.normal(0, 1.5, 100)
        pair = [method(name, runs(rng, 4 * (ease + rng.normal(0, 1.5, 100)), 3, 4.0, 0.2)) for name in "ab"]
        pair = pair if is_mean else [one._replace(quality=one.quality**2) for one in pair]
        called += verdicts.judge(pair)[0].word in ("better", "worse")
    assert called / DRAWS <= 0.06


def test_a_metric_that_points_the_other_way_than_the_examples_decides_nothing():
    better = np.arange(200) < np.array([[150], [151], [152]])
    pair = [method("a", better), method("b", np.zeros((3, 200)))]
    pair[1] = pair[1]._replace(quality=pair[0].quality + np.array([0.1, 0.11, 0.12]))
    assert verdicts.judge(pair)[0].word == "cannot be separated"


def test_a_real_difference_is_found_and_has_the_right_sign():
    rng = np.random.default_rng(9)
    words = []
    for _ in range(200):
        ease = rng.normal(0, 1.5, 1000)
        weak, strong = runs(rng, ease, 5, 0.5, 0.05), runs(rng, ease, 5, 1.5, 0.05)
        words.append(verdicts.judge([method("weak", weak), method("strong", strong)])[0].word)
    assert words.count("worse") >= 190
    assert "better" not in words


def test_a_family_of_copies_holds_hardly_ever_a_false_claim():
    rng = np.random.default_rng(10)
    wrong = 0
    for _ in range(400):
        ease = rng.normal(0, 1.5, 300)
        methods = [method(str(i), runs(rng, ease, 3, 1.0, 0.15)) for i in range(4)]
        wrong += any(verdict.word in ("better", "worse") for verdict in verdicts.judge(methods))
    assert wrong / 400 <= 0.06


# ---- learning curves ----


def test_a_power_law_is_recovered():
    sizes = [100, 200, 400, 800]
    law = curves.Law(0.9, 1.2, 0.5)
    found = curves.fit(sizes, np.array([law.at(n) for n in sizes]))
    assert found.at(1600) == pytest.approx(law.at(1600), abs=2e-3)
    assert law.at(100) == pytest.approx(0.9 - 0.12)


def test_a_law_stays_below_the_ceiling_and_a_falling_curve_is_flat():
    steep = np.array([0.5, 0.7, 0.9])
    assert curves.fit([100, 200, 400], steep, 1.0).limit <= 1.0
    assert curves.fit([100, 200, 400], steep).limit > 1.0  # so the ceiling did it
    assert curves.fit([100, 200, 400], np.array([0.6, 0.5, 0.4])).at(800) == pytest.approx(0.5)


def test_a_forecast_is_checked_by_hiding_the_largest_size():
    sizes = [100, 200, 400, 800]
    law = curves.Law(0.9, 1.2, 0.5)
    exact = np.array([[law.at(n) + shift for n in sizes] for shift in (-0.01, 0.0, 0.01)])
    found = curves.forecast(sizes, exact, 1.0)
    assert found is not None
    assert (found.size, found.hidden) == (1600, [800])
    assert found.expected.mean == pytest.approx(law.at(1600), abs=2e-3)
    assert found.predicted == pytest.approx(found.measured, abs=2e-3)
    assert found.held and found.without_law == pytest.approx(law.at(400))
    sudden = exact.copy()
    sudden[:, 3] = sudden[:, 2]  # no more comes of more labels: the law was wrong, and it is said
    assert not curves.forecast(sizes, sudden, 1.0).held
    assert curves.forecast(sizes[:3], exact[:, :3]) is None
    assert curves.forecast(sizes, exact[:2]) is None
    near = curves.forecast(sizes, exact + np.array([[0.11], [0.1], [0.0]]), 1.0)
    assert near is not None and near.expected.high == 1.0

"""Kappas and biases against sums worked by hand, scikit-learn's kappa, and Fleiss' own example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from ptft_hf.feedback import reporting
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.statistics import (
    _cohen,
    _fleiss,
    bootstrap,
    cohen_kappa,
    fleiss_kappa,
    share,
    statistics_of,
)
from ptft_hf.feedback.store import Answer, Store
from tests.feedback import collection, judge_all

BOTH = Policy(overlap=1)
DIAGNOSES = """444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444 222333 144444
224445 333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224 111155 224444 133333 555555"""
"""Fleiss 1971, table 1: 30 patients, each given one of five diagnoses by six psychiatrists."""


def fleiss_table() -> np.ndarray[Any, Any]:
    return np.array([[row.count(digit) for digit in "12345"] for row in DIAGNOSES.split()], dtype=float)


def test_fleiss_own_example():
    assert fleiss_kappa(fleiss_table()) == pytest.approx(0.430, abs=5e-4)


def test_fleiss_by_hand_with_unlike_numbers_of_judgements():
    # Agreeing couples: 1 of 1, 1 of 3, 0 of 1; their mean is 4/9. Shares of the categories: 5/7 and 2/7.
    expected = (5 / 7) ** 2 + (2 / 7) ** 2
    assert fleiss_kappa([[2, 0], [2, 1], [1, 1]]) == pytest.approx((4 / 9 - expected) / (1 - expected))


def test_cohen_by_hand():
    # 35 of 50 agree; by chance .5 * .6 + .5 * .4 = .5 would.
    assert cohen_kappa([[20, 5], [10, 15]]) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert cohen_kappa([[0, 10], [10, 0]]) == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(5))
def test_cohen_is_scikit_learns(seed: int):
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 4, 60)
    second = np.where(draw.random(60) < 0.5, first, draw.integers(0, 4, 60))
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    assert cohen_kappa(table) == pytest.approx(cohen_kappa_score(first, second))


def test_a_kappa_of_one_category_alone_is_not_defined():
    assert cohen_kappa([[7, 0], [0, 0]]) is None
    assert fleiss_kappa([[2, 0], [3, 0]]) is None
    assert bootstrap(_fleiss, np.array([[2.0, 0], [3, 0]]), 2) == (None, None, None, 2)


def test_the_bootstrap_interval_is_about_the_analytic_one():
    """Fleiss, Cohen & Everitt 1969: the standard error of the table by hand above, with 50 pairs, is .128."""
    cells = np.eye(4)[[0] * 20 + [1] * 5 + [2] * 10 + [3] * 15]
    found = bootstrap(lambda drawn: _cohen(drawn.sum(-2).reshape(-1, 2, 2)), cells, 50)
    assert found.value == pytest.approx(0.4)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.128, abs=0.01)


def test_wilsons_interval():
    assert share(7, 10)[1:3] == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert share(0, 0) == (None, None, None, 0)


# ---- of a database ----


def test_two_annotators(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 12))
    judge_all(store, "anna", "alpha", BOTH)
    judge_all(store, "ben", "alpha", BOTH)
    found = statistics_of(store)
    assert found["counts"] == {
        "prompts": 12, "answers": 24, "pairs": 12, "judged": 12, "judgements": 24, "skipped": 0
    }  # fmt: skip
    assert found["agreement"]["method"] == "Cohen's kappa"
    assert found["agreement"]["kappa"]["value"] == 1  # though both prefer "alpha" throughout: it is not always first
    assert found["agreement"]["raw"]["value"] == 1
    assert found["longer"]["value"] == 0
    assert found["reward"]["of"] == 0
    (wins,) = found["wins"]
    assert (wins["first"], wins["second"], wins["value"], wins["of"], wins["neither"]) == ("alpha", "beta", 1, 24, 0)
    left = sum(one.verdict == "left" for one in store.judgements())
    assert found["left"] == share(left, 24)._asdict()


def test_three_annotators_and_a_reward_model(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 10))
    for name, verdict in (("anna", "left"), ("ben", "tie"), ("cora", "alpha")):
        judge_all(store, name, verdict, Policy(overlap=1, annotators=3))
    rows = store.rows("SELECT id, source = 'alpha' FROM answers")
    store.set_scores([(identity, float(good)) for identity, good in rows])
    found = statistics_of(tmp_path / "f.sqlite")
    assert found["agreement"]["method"] == "Fleiss' kappa"
    assert [(couple["first"], couple["second"]) for couple in found["agreement"]["couples"]] == [
        ("anna", "ben"), ("anna", "cora"), ("ben", "cora")
    ]  # fmt: skip
    counts, same = np.zeros((10, 3)), 0
    for one in store.judgements():
        counts[one.pair - 1, 2 if one.preferred is None else one.preferred] += 1
        same += one.preferred is not None and one.answers[one.preferred].source == "alpha"
    assert found["agreement"]["kappa"]["value"] == pytest.approx(fleiss_kappa(counts))
    assert found["reward"] == share(same, 20)._asdict()


def test_an_empty_collection_has_no_figures_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = statistics_of(collection(tmp_path / "f.sqlite", 1))
    assert found["agreement"] == {
        "method": None,
        "kappa": share(0, 0)._asdict(),
        "raw": share(0, 0)._asdict(),
        "couples": [],
    }
    reporting.show(found)
    assert "0 judgements of 0 of 1 pairs" in capsys.readouterr().out


def test_a_source_of_which_both_answers_come_is_no_contest(tmp_path: Path):
    with Store(tmp_path / "f.sqlite", create=True) as store:
        store.add([("p", [Answer("m", 0, "a"), Answer("m", 1, "b")])])
        judge_all(store, "anna")
        assert statistics_of(store)["wins"] == []

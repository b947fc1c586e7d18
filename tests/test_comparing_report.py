"""What the report says of given cells, and that nothing of it leaves the page or breaks it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ptft_hf.comparing import findings, groups, verdicts, words, write_report
from ptft_hf.comparing.words import POINTS
from ptft_hf.errors import ModelError
from tests.cells import cell, failed, grid

EVIL = '<script src="https://evil.example/x.js">alert(1)</script> & $x_$ | `b`'


def right(share: float, rows: int = 100) -> np.ndarray:
    return np.arange(rows) < round(share * rows)


def only_group(results: list) -> groups.Group:
    (group,) = groups.groups_of(results)
    return group


def judged(results: list, **options) -> list[verdicts.Verdict]:
    (methods,) = verdicts.methods_of(results).values()
    return verdicts.judge(methods, **options)


def said(results: list) -> str:
    (verdict,) = judged(results)
    return words.verdict(verdict, POINTS, 0.01)


def test_better_and_worse_in_words():
    ten = [cell("a", s, right(0.9 + 0.001 * s, 1000)) for s in range(3)]
    ten += [cell("b", s, right(0.8 + 0.002 * s, 1000)) for s in range(3)]
    assert said(ten) == "a is better than b, by 9.9 points"
    assert said(ten[3:] + ten[:3]) == "b is worse than a, by 9.9 points"


def test_equivalent_in_words():
    same = [cell(name, s, right(0.9, 1000)) for name in "ab" for s in range(3)]
    assert said(same) == "a and b are equivalent within 1.0 points"


def test_no_verdict_under_three_seeds():
    two = [cell("a", s, right(0.99)) for s in range(2)] + [cell("b", s, right(0.1)) for s in range(2)]
    assert said(two) == "no verdict on a and b: 2 seeds, and at least 3 are needed"
    assert judged(two)[0].mcnemar < 1e-6


def test_what_cannot_be_separated_says_what_would_be_needed():
    unclear = grid({"a": 0.78, "b": 0.80}, 3, rows=200, draw=3)
    assert re.fullmatch(
        r"a and b cannot be separated: about [\d,]+ more test examples and about [\d,]+ more seeds? would be "
        r"needed to show \d+\.\d points",
        said(unclear),
    )
    (verdict,) = judged(unclear)
    assert verdict.more_examples is not None and verdict.more_examples > 0


def test_what_the_number_of_pairs_alone_keeps_open_says_who_leads():
    def scores(name: str, mean: float) -> list:
        return [cell(name, s, right(mean + 0.01 * (s - 1) * (name == "a"), 1000)) for s in range(3)]

    a, b = scores("a", 0.9), scores("b", 0.85)
    assert said([*a, *b]) == "a is better than b, by 5.0 points"
    many = [*b, *a, *(one for i in range(9) for one in scores(f"c{i}", 0.85))]
    verdict = next(found for found in judged(many) if (found.first, found.second) == ("b", "a"))
    assert re.fullmatch(
        r"b and a cannot be separated among so many pairs, though a leads if it is compared with b alone: about "
        r"\d+ more seeds? would be needed to show 5\.0 points",
        words.verdict(verdict, POINTS, 0.01),
    )


def test_rows_that_are_not_the_same_are_not_compared():
    other = [cell("b", s, right(0.5)) for s in range(3)]
    for result in other:
        result["data"]["train"]["fingerprint"] = "another subset"
    alike = [cell(name, seed, right(0.9)) for name, seeds in (("a", (0, 1, 2)), ("c", (3, 4, 5))) for seed in seeds]
    results = [*alike, *other]
    assert judged(results) == []
    parts = findings.verdict_parts(only_group(results), 0.01, None)
    assert len(parts) == 1 and "1,000 training rows: a and b had other training or test rows" in str(parts[0])


def test_test_rows_that_differ_by_seed_are_examples_of_their_own():
    results = [cell(name, s, right(0.9 - 0.3 * (name == "b"), 50 + s)) for name in "ab" for s in range(3)]
    for result in results:
        result["data"]["test"]["fingerprint"] = f"cut {result['cell']['seed']}"
    (methods,) = verdicts.methods_of(results).values()
    found = verdicts.evidence(*methods)
    assert found is not None and found.examples.shape == (1, 50 + 51 + 52)


def test_a_reference_makes_a_family_of_its_own_pairs():
    results = grid({"a": 0.6, "b": 0.7, "c": 0.8, "d": 0.75}, 3)
    pairs = [(v.first, v.second) for v in judged(results, reference="c")]
    assert pairs == [("a", "c"), ("b", "c"), ("d", "c")]
    assert len(judged(results)) == 6


def test_lower_is_better_for_errors():
    results = [cell("a", s, right(0.2), metric="mse", value=2.0 + 0.01 * s) for s in range(3)]
    results += [cell("b", s, right(0.8), metric="mse", value=1.0 - 0.01 * s) for s in range(3)]
    (verdict,) = judged(results)
    assert verdict.word == "worse" and verdict.difference == pytest.approx(-1.02)
    assert only_group(results).unit.name == ""
    assert "Within 0.0100 of the best with the least memory: b" in findings.recommendations(
        only_group(results), 0.01
    )[1].replace(",", "")


def test_a_correlation_is_not_measured_by_the_scatter_of_squared_errors():
    """Labels between 0 and 1 have small squared errors: their scatter says nothing of 200 rows' correlation."""
    rng = np.random.default_rng(0)
    values = {("a", 0): 0.801, ("a", 1): 0.8, ("a", 2): 0.8, ("b", 0): 0.8, ("b", 1): 0.8, ("b", 2): 0.8}
    results = [cell(*of, right(0.8, 200), metric="pearson", value=value) for of, value in values.items()]
    for one in results:
        one["test"]["outcomes"] = (-(rng.normal(0, 0.1, 200) ** 2)).tolist()
    (verdict,) = judged(results)
    assert verdict.word == "cannot be separated" and verdict.more_examples is None
    assert "test examples" not in words.verdict(verdict, POINTS, 0.01)
    assert all("The runs do not settle it" in line for line in findings.recommendations(only_group(results), 0.01))
    (_, note) = findings.verdict_parts(only_group(results), 0.01, None)
    assert "squared error" in note and "nothing is called equivalent" in note and "are right" not in note
    same = [{**one, "metric": {"name": "mse", "higher_is_better": False}} for one in results]
    for one in same:
        one["test"] = {**one["test"], "metrics": {"mse": -float(np.mean(one["test"]["outcomes"]))}}
    assert judged(same)[0].fits and judged(same)[0].word == "equivalent"  # there it does


def test_a_recommendation_takes_the_cheapest_that_is_good_enough_and_says_how_sure_it_is():
    big = [cell("big", s, right(0.900, 1000), peak_memory_mb=900) for s in range(3)]
    small = [cell("small", s, right(0.892, 1000), peak_memory_mb=300) for s in range(3)]
    poor = [cell("poor", s, right(0.5, 1000), peak_memory_mb=10) for s in range(3)]
    (methods,) = verdicts.methods_of(big + small + poor).values()
    found = verdicts.recommend(methods, "peak_memory_mb", 0.01)
    assert (found.method, found.best, found.cost) == ("small", "big", 300)
    assert found.gap == pytest.approx(0.008) and not found.is_sure  # 1,000 rows are too few for that
    assert verdicts.recommend(methods, "peak_memory_mb", 0.001).method == "big"
    close = [cell("small", s, right(0.9 - 0.0005 * (s % 2), 20_000), peak_memory_mb=300) for s in range(3)]
    wide = [cell("big", s, right(0.9, 20_000), peak_memory_mb=900) for s in range(3)]
    (methods,) = verdicts.methods_of(wide + close).values()
    assert verdicts.recommend(methods, "peak_memory_mb", 0.01).is_sure


def test_what_has_the_highest_mean_itself_is_recommended_no_more_surely_than_the_runs_allow():
    def sentences(results: list) -> set[str]:
        return {line.partition(": ")[2] for line in findings.recommendations(only_group(results), 0.01)}

    near = grid({"a": 0.78, "b": 0.80}, 3, rows=200, draw=3)
    (found,) = sentences(near)
    assert found.startswith("a, which has the highest mean itself. The runs do not settle it: a larger loss is not")
    far = [cell(name, s, right(share, 1000)) for name, share in (("a", 0.5), ("b", 0.9)) for s in range(3)]
    (found,) = sentences(far)
    assert found == "b, which has the highest mean itself. The runs bear it out (p < 0.001 for a larger loss)."
    uneven = [*far, cell("c", 0, right(0.95, 1000))]
    (found,) = sentences(uneven)
    assert found.startswith("c, which has the highest mean itself. How sure that is cannot be said: it takes 3 seeds")
    assert sentences(far[:3]) == set()


# ---- the page ----


class Tags(HTMLParser):
    """Elements, and everything that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two tasks, four sizes, an evil name, a failure: both reports' text."""
    results = grid({"full/default": 0.8, "lora/r8": 0.79, "_head": 0.7}, 3, sizes=(100, 200, 400, 800))
    for seed in range(3):
        results += [
            cell(EVIL, seed, right(0.6), task=EVIL),
            cell("full/default", seed, right(0.7), task=EVIL),
        ]
    results.append(failed("lora/r8", 1, f"ModelError: {EVIL}"))
    folder = tmp_path_factory.mktemp("report")
    markdown, page = write_report(results, folder, command=f"ptft compare '{EVIL}'")
    return markdown.read_text("utf-8"), page.read_text("utf-8")


def test_no_request_leaves_the_page(report: tuple[str, str]):
    tags = Tags()
    tags.feed(report[1])
    assert tags.links and all(link.startswith("#") for link in tags.links)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(tags.names)
    assert "default-src 'none'" in report[1]
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", report[1])
    assert re.findall(r"url\((?!#)|@import|@font-face", without_namespaces) == []
    assert set(re.findall(r"https?://[\w.]+", without_namespaces)) == {
        "https://evil.example"
    }  # as text alone


def test_pictures_are_in_the_page_and_their_ids_do_not_clash(report: tuple[str, str]):
    tags = Tags()
    tags.feed(report[1])
    assert (
        tags.names.count("svg") == 3 + 2
    )  # quality and cost of both tasks, curves of the one with four sizes
    assert len(tags.ids) == len(set(tags.ids))


def test_names_are_text_in_both_reports(report: tuple[str, str]):
    markdown, page = report
    assert "<script" not in page and "&lt;script src=" in page
    assert "<script" not in markdown.replace("\\<script", "").replace(f"ptft compare '{EVIL}'", "")
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    heads = [i for i, line in enumerate(rows) if line.startswith("| --- |")]
    for i in heads:  # a bar in a name makes no column
        columns = rows[i].count("|")
        assert len(re.findall(r"(?<!\\)\|", rows[i + 1])) == columns


def test_the_report_says_what_it_must(report: tuple[str, str]):
    for text in (re.sub(r"\\(.)", r"\1", report[0]), report[1]):
        assert "lora/r8" in text and "cannot be separated" in text
        assert "Forecast of test accuracy with 1,600 training rows" in text and "800 rows hidden" in text
        assert "Cells that failed" in text and "ModelError" in text
        assert "0.001, 0.003 (failed)" in text  # the tries of a cell
        assert "torch 2.13.0" in text and "neg" in text
        assert "cells/lora-r8-2.json" in text


def test_a_cell_that_failed_tells_its_first_fault():
    both = str(ModelError("learning rate 1: it broke", "learning rate 3: it broke, too"))
    crash = "KeyError: 'x'\nTraceback (most recent call last):\n  File ..."
    (table,) = findings.findings([failed("a", 0, both), failed("b", 0, crash)], 0.01, "")[0].parts
    assert [row[-1] for row in table.rows] == ["2 problems: - learning rate 1: it broke", "KeyError: 'x'"]


def test_of_several_models_each_cell_names_its_own():
    results = [cell("a", 0, right(0.8)), failed("b", 0, "it broke")]
    others = [{**one, "cell": {**one["cell"], "model": "other"}} for one in results]
    failures, _, every, _ = findings.findings([*results, *others], 0.01, "")[-4:]
    for section in (failures, every):
        (table,) = section.parts
        assert [row[table.head.index("model")] for row in table.rows] == ["m", "other"]
        assert table.left == len(table.head)
    assert "model" not in findings.findings(results, 0.01, "")[-2].parts[0].head


def test_of_many_pairs_without_a_verdict_those_with_the_best_are_listed():
    results = [cell(f"m{i}", 0, right(0.5 + i / 100)) for i in range(8)]
    sentence, table = findings.verdict_parts(only_group(results), 0.01, None)
    assert sentence == "None of 28 pairs can be decided; here are those with m7, the best mean."
    assert len(table.rows) == 7 and all("m7" in row[0] for row in table.rows)
    (few,) = findings.verdict_parts(only_group(results[:4]), 0.01, None)
    assert len(few.rows) == 6
    decided = [cell(f"m{i}", seed, right(0.5 + i / 100)) for i in range(8) for seed in range(3)]
    assert len(findings.verdict_parts(only_group(decided), 0.01, None)[0].rows) == 28


def test_methods_that_ran_with_fewer_rows_alone_are_counted():
    results = [cell(name, seed, right(0.8)) for name in "ab" for seed in range(3)]
    fewer = copy.deepcopy([*results, *(cell("c", seed, right(0.9)) for seed in range(3))])
    for one in fewer:
        one["cell"]["size"] = one["data"]["train"]["rows"] = 50
    (first, *_) = findings.findings([*results, *fewer], 0.01, "")[0].parts
    assert first.endswith("3 seeds a method. 2 of 3 methods ran with so many.")
    assert findings.findings(results, 0.01, "")[0].parts[0].endswith("3 seeds a method.")


def test_rates_at_the_edge_of_what_was_tried_are_said():
    chosen = {"edge": (3e-3, 3e-3, 1e-3), "low": (1e-4, 1e-4, 1e-4), "inside": (1e-3, 1e-3, 3e-3)}
    results = []
    for name, rates in chosen.items():
        for seed, rate in enumerate(rates):
            tries = [{"learning_rate": one} for one in (1e-4, 1e-3, 3e-3)]
            results.append({**cell(name, seed, right(0.8)), "learning_rate": rate, "tries": tries})
    assert groups.at_the_edge(only_group(results)) == [
        "Validation chose the highest learning rate that was tried for edge and the lowest learning rate that was "
        "tried for low: beyond it they may do better."
    ]
    fewer = copy.deepcopy([one for one in results if one["cell"]["adapter"]["name"] == "low"])
    for one in fewer:
        one["cell"]["size"] = one["data"]["train"]["rows"] = 50
    assert [line.partition(" chose")[0] for line in groups.at_the_edge(only_group([*results, *fewer]))] == [
        "With 1,000 rows validation", "With 50 rows validation",
    ]  # fmt: skip
    alone = [{**one, "tries": one["tries"][:1], "learning_rate": 1e-4} for one in results]
    assert groups.at_the_edge(only_group(alone)) == []
    assert groups.at_the_edge(only_group([one for one in results if "inside" in str(one["cell"])])) == []


def test_cells_of_unlike_precision_are_named_and_their_seconds_and_memory_not_recommended_by():
    results = [cell(name, seed, right(0.8)) for name in "abc" for seed in range(3)]
    assert len(findings.recommendations(only_group(results), 0.01)) == 4
    for one in results:
        adapter, seed = one["cell"]["adapter"]["name"], one["cell"]["seed"]
        one["settings"] = {"bf16": adapter == "a" or (adapter, seed) == ("b", 2), "fp16": False}
    mixed = findings.findings(results, 0.01, "")[0].parts
    assert mixed[1] == (
        "Not all cells were computed in the same precision, as when a grid goes on on a machine without bfloat16. In "
        "bfloat16: a with 1,000 rows; b with 1,000 rows (seed 2). In float32: b with 1,000 rows (seeds 0 and 1); c "
        "with 1,000 rows. What sets these apart may be the precision, and their seconds and memory do not compare."
    )
    costs = [line.partition(":")[0] for line in findings.recommendations(only_group(results), 0.01)]
    assert [cost.rpartition(" the ")[2] for cost in costs] == ["fewest trainable parameters", "least disk"]
    fewer = copy.deepcopy([one for one in results if one["cell"]["adapter"]["name"] != "a"])
    for one in fewer:
        one["cell"]["size"] = one["data"]["train"]["rows"] = 50
        one["settings"]["bf16"] = True
    alike = [{**one, "settings": {"bf16": False, "fp16": False}} for one in results]
    (said,) = groups.mixed_precision(only_group([*alike, *fewer]))
    assert "In float32: a, b and c with 1,000 rows. In bfloat16: b and c with 50 rows." in said
    assert len(findings.recommendations(only_group([*alike, *fewer]), 0.01)) == 4  # the largest were alike


def test_no_finished_cell_makes_a_report_all_the_same(tmp_path: Path):
    markdown, _ = write_report([failed("a", 0, "it broke")], tmp_path)
    assert "it broke" in markdown.read_text("utf-8")

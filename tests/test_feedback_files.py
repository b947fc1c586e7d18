"""Preferences in and out: which rows become pairs, and what several judgements of a pair come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.errors import DataError, OutputError
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.files import export_preferences, import_pairs, majority
from ptft_hf.feedback.judging import assign, judge
from ptft_hf.feedback.store import Judged, Judgement, Store
from tests.conftest import write_rows
from tests.feedback import ALONE, collection, judge_all

ROWS: list[dict[str, Any]] = [
    {"prompt": "p", "chosen": " good", "rejected": " bad"},
    {"prompt": "p", "chosen": " good", "rejected": " worse"},
    {"prompt": "q", "chosen": "yes", "rejected": "yes \n"},
    {"prompt": "q", "chosen": "yes", "rejected": "no", "extra": 1},
]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_a_file_that_is_reviewed_comes_out_as_it_went_in(tmp_path: Path):
    file, database = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "f.sqlite"
    assert import_pairs(file, database) == (3, 1, 0)
    assert import_pairs(file, database) == (0, 1, 3)
    with Store(database) as store:
        assert store.counts() == {"prompts": 2, "answers": 5, "pairs": 3}
        while (shown := assign(store, "anna", ALONE)) is not None:
            judge(store, shown.assignment, "left" if shown.left in (" good", "yes") else "right")
        assert export_preferences(store, tmp_path / "out.jsonl") == (3, 0, 0, 0)
    expected = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS if row is not ROWS[2]]
    assert lines(tmp_path / "out.jsonl") == expected


TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "p <|im_end|>"}]


def test_conversations_come_out_as_they_went_in(tmp_path: Path) -> None:
    rows = [{"prompt": TURNS, "chosen": f"good {i}", "rejected": "bad"} for i in range(3)]
    for name in ("first", "second"):
        database = tmp_path / f"{name}.sqlite"
        assert import_pairs(write_rows(tmp_path / f"{name}.jsonl", rows), database) == (3, 0, 0)
        with Store(database) as store:
            assert store.counts()["prompts"] == 1
            while (shown := assign(store, "anna", ALONE)) is not None:
                assert shown.prompt == TURNS
                judge(store, shown.assignment, "right" if shown.left == "bad" else "left")
        export_preferences(database, tmp_path / "out.jsonl")
        assert lines(tmp_path / "out.jsonl") == rows
        rows = lines(tmp_path / "out.jsonl")


def test_texts_beside_conversations_come_out_as_messages(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in (TURNS, "q")]
    import_pairs(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "f.sqlite")
    with Store(tmp_path / "f.sqlite") as store:
        judge_all(store, "anna")
    export_preferences(tmp_path / "f.sqlite", tmp_path / "out.jsonl")
    found = [row["prompt"] for row in lines(tmp_path / "out.jsonl")]
    assert found == [TURNS, [{"role": "user", "content": "q"}]]


def test_rows_that_do_not_fit_are_named(tmp_path: Path):
    bad = [{"prompt": "p", "chosen": "a"}, {"prompt": "", "chosen": "a", "rejected": ["b"]}, *[{}] * 3]
    bad.append({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError) as raised:
        import_pairs(write_rows(tmp_path / "in.jsonl", bad), tmp_path / "f.sqlite")
    said = str(raised.value)
    for words in ("row 1: has no 'rejected'", "row 2: prompt is an empty text", "rejected is list", "and 8 more"):
        assert words in said
    for name, words in (("gone.jsonl", "cannot be read"), ("in.txt", "the ending")):
        with pytest.raises(DataError, match=words):
            import_pairs(tmp_path / name, tmp_path / "f.sqlite")
    assert not (tmp_path / "f.sqlite").exists()


def test_the_real_file(real_data: Path, tmp_path: Path):
    found = import_pairs(real_data / "qa_feedback" / "train.jsonl", tmp_path / "f.sqlite")
    rows = len(lines(real_data / "qa_feedback" / "train.jsonl"))
    assert sum(found) == rows
    assert found.pairs > 0.9 * rows


PAIR = (Judged("m", "a", None), Judged("m", "b", None))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("0", "first"), ("1", "second"), ("t", "tie"), ("b", "both_bad"), ("01", "conflict"), ("0t", "conflict"),
        ("tb", "tie"), ("bb", "both_bad"), ("001", "first"), ("1t1", "second"), ("0tb", "tie"), ("01t", "conflict"),
        ("0011", "conflict"), ("0bb", "both_bad"),
    ],
)  # fmt: skip
def test_what_several_judgements_come_to(said: str, expected: str):
    verdicts = {"0": ("left", 0), "1": ("right", 1), "t": ("tie", None), "b": ("both_bad", None)}
    judged = [Judgement(1, str(i), verdicts[one][0], 1.0, "p", PAIR, verdicts[one][1]) for i, one in enumerate(said)]
    assert majority(judged) == expected


def test_ties_and_conflicts_are_counted_and_ties_written_on_request(tmp_path: Path):
    store, out = Store(collection(tmp_path / "f.sqlite", 4)), tmp_path / "out.jsonl"
    both = Policy(overlap=1)
    said = {"anna": iter(("one", "tie", "both_bad", "one")), "ben": iter(("one", "tie", "both_bad", "tie"))}
    for name, verdicts in said.items():
        while (shown := assign(store, name, both)) is not None:
            short = "left" if shown.left.startswith("short") else "right"
            verdict = next(verdicts)
            judge(store, shown.assignment, short if verdict == "one" else verdict)
    assert export_preferences(store, out) == (1, 1, 1, 1)
    (row,) = lines(out)
    assert row["chosen"].startswith("short") and set(row) == {"prompt", "chosen", "rejected"}
    assert export_preferences(store, out, ties=True) == (2, 1, 1, 1)
    assert sorted(row["tie"] for row in lines(out)) == [False, True]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 1))
    judge_all(store, "anna")
    with pytest.raises(OutputError, match="cannot be written"):
        export_preferences(store, tmp_path / "no" / "out.jsonl")

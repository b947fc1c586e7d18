"""The database of human feedback: what is shown to whom, and that nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from ptft_hf.errors import DataError, OutputError
from ptft_hf.feedback import judging
from ptft_hf.feedback.choosing import RESERVED_SECONDS, Policy
from ptft_hf.feedback.judging import annotator_name, ask_again, assign, judge, progress, undo
from ptft_hf.feedback.store import Answer, Store
from tests.feedback import ALONE, collection, judge_all


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(collection(tmp_path / "f.sqlite", 20))


def verdicts(store: Store) -> list[str]:
    return [one.verdict for one in store.judgements()]


# ---- prompts and pairs ----


def test_all_answers_to_a_prompt_are_paired_but_those_of_the_same_text(tmp_path: Path):
    with Store(tmp_path / "f.sqlite", create=True) as store:
        answers = [Answer("m", i, text) for i, text in enumerate(("a", "b", " a\n", "c"))]
        assert store.add([("p", answers)]) == 3  # a b, a c, b c
        assert store.add([("p", answers)]) == 0
        assert store.add_pairs([("p", "x", "y"), ("p", "x", "z")]) == 2
        assert store.add([("p", [Answer("n", 0, "d")])]) == 3
        assert store.counts() == {"prompts": 1, "answers": 8, "pairs": 8}
        assert store.answered() == {("p", "m"): 4, ("p", "n"): 1, ("p", "chosen"): 1, ("p", "rejected"): 2}


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    other, text, later = (tmp_path / name for name in ("other.sqlite", "text", "later.sqlite"))
    sqlite3.connect(other).executescript("CREATE TABLE t (x)")
    text.write_text("not a database, but long enough to be taken for one" * 40)
    Store(later, create=True).close()
    sqlite3.connect(later).execute("PRAGMA user_version = 99")
    gone = tmp_path / "gone"
    for path, words in ((other, "not one of"), (text, "no database"), (later, "version 99"), (gone, "not exist")):
        with pytest.raises(DataError, match=words):
            Store(path)
    with pytest.raises(OutputError, match="its folder does not exist"):
        Store(tmp_path / "no" / "f", create=True)
    with pytest.raises(OutputError, match="is a folder"):
        Store(tmp_path, create=True)


def test_what_is_committed_is_on_the_disk(store: Store):
    assert [store.rows(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous")] == ["wal", 2]


# ---- who judges what ----


def test_a_pair_stays_until_it_is_judged_and_sides_are_drawn(store: Store):
    first = assign(store, "anna", ALONE)
    assert first == assign(store, "anna", ALONE)
    assert judge_all(store, "anna") == 20
    left = Counter(one.preferred for one in store.judgements())
    assert left[0] + left[1] == 20
    assert min(left.values()) >= 2  # 2 in 100,000 by chance


def test_a_click_that_is_sent_again_is_not_counted_twice(store: Store):
    shown = assign(store, "anna", ALONE)
    assert shown is not None
    assert [judge(store, shown.assignment, verdict) for verdict in ("left", "left", "right")] == [True, False, False]
    assert verdicts(store) == ["left"]
    with pytest.raises(DataError, match="'x' is not known"):
        judge(store, "x", "left")
    with pytest.raises(DataError, match="'up' is none of left"):
        judge(store, shown.assignment, "up")


def test_undo_shows_the_pair_again_and_a_late_click_does_not_come_back(store: Store):
    first = assign(store, "anna", ALONE)
    judge(store, first.assignment, "left")
    assign(store, "anna", ALONE)
    assert undo(store, first.assignment)
    assert not undo(store, first.assignment)
    again = assign(store, "anna", ALONE)
    assert again == first._replace(assignment=again.assignment, again=True)
    assert again.assignment != first.assignment
    assert not judge(store, first.assignment, "left")
    assert verdicts(store) == []
    assert judge(store, again.assignment, "both_bad")
    assert verdicts(store) == ["both_bad"]


def test_undo_goes_back_as_far_as_one_likes(store: Store):
    shown = []
    for verdict in ("left", "tie", "skip"):
        shown.append(assign(store, "anna", ALONE))
        judge(store, shown[-1].assignment, verdict)
    for before in reversed(shown):
        assert undo(store, progress(store, "anna", ALONE).last)
        assert assign(store, "anna", ALONE).prompt == before.prompt
    assert progress(store, "anna", ALONE) == (0, 20, 0, 0, None)
    assert judge_all(store, "anna") == 20


def test_two_annotators_never_get_the_same_pair_without_overlap(store: Store):
    one, other = (assign(store, name, ALONE) for name in ("anna", "ben"))
    assert one.prompt != other.prompt
    assert judge_all(store, "anna") == 19  # ben's is on his screen
    assert judge_all(store, "ben") == 1
    assert progress(store, "ben", ALONE)[:3] == (20, 20, 1)


def test_a_share_of_pairs_is_given_to_two_and_raising_it_adds_pairs(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 120))
    sizes = {share: progress(store, "anna", Policy(overlap=share)).needed for share in (0, 0.1, 0.5, 1)}
    assert sizes[0] == 120 and sizes[1] == 240
    assert 122 <= sizes[0.1] <= 142 and 163 <= sizes[0.5] <= 197  # three standard deviations
    half = Policy(overlap=0.5)
    for name, expected in (("anna", 120), ("ben", sizes[0.5] - 120), ("cora", 0)):
        assert judge_all(store, name, policy=half) == expected
    pairs = Counter(one.pair for one in store.judgements())
    assert set(pairs.values()) == {1, 2}
    assert len({(one.pair, one.annotator) for one in store.judgements()}) == sizes[0.5]
    three = Policy(overlap=0.1, annotators=3)
    assert progress(store, "anna", three).needed == 120 + 2 * (sizes[0.1] - 120)


def test_what_somebody_left_on_the_screen_is_given_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    left = assign(store, "anna", ALONE)
    assert judge_all(store, "ben") == 19
    later = time.time() + RESERVED_SECONDS + 1
    monkeypatch.setattr(judging.time, "time", lambda: later)
    assert judge_all(store, "ben") == 1
    assert assign(store, "anna", ALONE) is None  # what she had is judged
    assert not judge(store, left.assignment, "left")
    assert len(verdicts(store)) == 20


def test_skipped_pairs_go_to_others_and_come_back_on_request(store: Store):
    assert judge_all(store, "anna", "skip") == 20
    assert progress(store, "anna", ALONE)[:4] == (0, 20, 0, 20)
    shown = assign(store, "ben", ALONE)
    judge(store, shown.assignment, "right")
    assert ask_again(store, "anna") == 20
    assert judge_all(store, "anna", "tie") == 19
    assert store.skipped() == 0


def test_uncertain_pairs_come_first(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 6))
    scores = {0: 0.3, 1: -0.1, 2: 4.0, 3: 0.0, 4: -2.0}  # of "short i", the other's is 0; pair 5 has none
    rows = store.rows("SELECT a.id, a.text, p.text FROM answers a JOIN prompts p ON p.id = a.prompt")
    numbered = [(identity, text, int(prompt.split()[1])) for identity, text, prompt in rows]
    store.set_scores(
        [(identity, scores[i] if text.startswith("short") else 0.0) for identity, text, i in numbered if i in scores]
    )
    seen = []
    while (shown := assign(store, "anna", Policy("uncertain", 0))) is not None:
        seen.append(int(shown.prompt.split()[1]))
        judge(store, shown.assignment, "tie")
    assert seen == [3, 1, 0, 4, 2, 5]
    assert len(store.unscored()) == 2


def test_options_that_mean_nothing_are_named_together():
    faults = Policy("uncertian", 1.5, 1).faults()
    assert len(faults) == 3
    assert "did you mean 'uncertain'?" in faults[0]
    assert Policy().faults() == []


def test_one_name_is_one_annotator(store: Store):
    judge_all(store, "Anna Å")
    assert annotator_name(store, "  anna   å ") == "Anna Å"
    assert annotator_name(store, "Ben") == "Ben"
    for bad in ("", "  ", "x" * 61, "a\u200bb"):
        with pytest.raises(DataError, match="name: "):
            annotator_name(store, bad)


# ---- nothing lost, nothing twice ----


def test_threads_that_judge_at_once(tmp_path: Path):
    store = Store(collection(tmp_path / "f.sqlite", 60))
    policy = Policy(overlap=0.5)
    threads = [threading.Thread(target=judge_all, args=(store, name, "left", policy)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done, needed, *_ = progress(store, "a", policy)
    assert done == needed == len(store.judgements())


JUDGE = """
import sys, time
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.judging import assign, judge
from ptft_hf.feedback.store import Store
store = Store(sys.argv[1])
while (shown := assign(store, sys.argv[2], Policy(overlap=1))) is not None:
    assert judge(store, shown.assignment, "left")
    print(shown.assignment, flush=True)
    time.sleep(0.002)  # or the other would wait for the file
"""


def test_two_processes_killed_between_and_within_clicks_lose_nothing(tmp_path: Path):
    path = collection(tmp_path / "f.sqlite", 2_000)
    said: list[str] = []
    for _ in range(2):
        processes = [
            subprocess.Popen([sys.executable, "-c", JUDGE, str(path), name], stdout=subprocess.PIPE, text=True)
            for name in ("anna", "ben")
        ]
        for process in processes:
            assert process.stdout is not None
            said += [process.stdout.readline().strip() for _ in range(10)]  # both are at it
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            said += process.communicate()[0].split()
    store = Store(path)
    kept = {row[0] for row in store.rows("SELECT id FROM assignments WHERE verdict IS NOT NULL")}
    assert len(said) == len(set(said)) >= 40
    assert set(said) <= kept
    assert len(kept) - len(said) <= 6  # what was committed and not yet said when the kill came
    assert len({(one.pair, one.annotator) for one in store.judgements()}) == len(kept)

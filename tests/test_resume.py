"""A run that was stopped and goes on is the run that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from ptft_hf.errors import OutputError
from tests.conftest import rows
from tests.stopped_runs import Place, assert_same, snapshot


@pytest.fixture
def place(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Place:
    return Place(tmp_path, checkpoint("bert"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """An unbroken run with the usual settings."""
    place = Place(tmp_path_factory.mktemp("whole"), checkpoint("bert"))
    place.run("whole")
    return place.folder / "whole"


# ---- bit for bit ----


@pytest.mark.parametrize(
    ("adapter", "settings", "steps"),
    [
        # In the middle of an epoch, at an epoch's end, between two logs, when nothing is left but publishing.
        ("full/default", {}, (1, 6)),
        ("lora/r8_attention", {"eval_on_start": True}, (2, 5)),
        ("full/default", {"adapter.gradual_unfreezing": True, "task.oversample": True}, (2,)),
        # Saved at step 3, the last of an epoch whose evaluation and log come after its steps.
        (
            "full/default",
            {
                "eval_strategy": "epoch",
                "save_strategy": "steps",
                "logging_strategy": "epoch",
                "load_best_model_at_end": False,
            },
            (3, 6),
        ),
        ("lora/r8_attention", {"lr_scheduler_type": "cosine", "train_sampling_strategy": "random"}, (4,)),
    ],
    ids=["full", "lora", "gradual unfreezing and oversampling", "by epoch", "cosine and random order"],
)
def test_a_resumed_run_is_the_unbroken_run(
    place: Place, adapter: str, settings: dict[str, Any], steps: tuple[int, ...]
) -> None:
    place.run("whole", adapter, settings)
    for step in steps:
        stopped = place.stopped(step, place.folder / "whole")
        place.run(stopped.name, adapter, settings, resume=True)
        assert_same(place.folder / "whole", stopped)


def test_early_stopping_goes_on_counting(place: Place) -> None:
    # At a rate of 1e-12 no evaluation after the first is better: the first is the best, and patience 3 ends the
    # run after step 4 of 12. A resume that forgot the count would stop later; one that forgot the stop, go on.
    early = {"task.early_stopping_patience": 3, "learning_rate": 1e-12, "gradient_accumulation_steps": 1}
    place.run("whole", settings=early)
    record = json.loads((place.folder / "whole" / "run.json").read_text("utf-8"))
    assert (record["training"]["steps"], record["training"]["best_step"]) == (4, 1)
    for step in (2, 4):
        stopped = place.stopped(step, place.folder / "whole")
        place.run(stopped.name, settings=early, resume=True)
        assert_same(place.folder / "whole", stopped)


def test_a_run_is_resumed_where_everything_has_moved(place: Place, whole: Path) -> None:
    # `whole` was trained from another folder's task and data; their content is what counts.
    stopped = place.stopped(4, whole)
    place.run(stopped.name, resume=True)
    assert_same(whole, stopped)


# ---- what may be resumed, and what is replaced ----


def test_a_resume_of_nothing_starts_and_says_so(
    place: Place, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run("new", resume=True)
    assert "has no run to resume: starting from the beginning" in capsys.readouterr().err
    assert_same(whole, place.folder / "new")


def test_a_resume_with_other_settings_or_data_names_every_difference(place: Place, whole: Path) -> None:
    stopped = place.stopped(2, whole)
    before = snapshot(stopped)
    other = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(rows(count, seed))
            for name, count, seed in (("train", 48, 9), ("validation", 16, 2), ("test", 16, 3))
        }
    )
    with pytest.raises(OutputError) as caught:
        place.run(
            stopped.name,
            settings={"learning_rate": 2e-3, "num_train_epochs": 3},
            seed=7,
            data=other,
            resume=True,
        )
    said = str(caught.value)
    assert "training.learning_rate: 0.001 when the run began, 0.002 now" in said
    assert "training.num_train_epochs: 2.0 when the run began, 3.0 now" in said
    assert "seed: 42 when the run began, 7 now" in said
    assert "data.train: 'sha256:" in said
    assert "data.test" not in said
    assert snapshot(stopped) == before


def test_a_finished_run_is_not_trained_again(
    place: Place, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(whole)
    again = place.run(str(whole), resume=True)  # an absolute path stands for itself
    assert "holds the finished run already; nothing to resume" in capsys.readouterr().err
    assert snapshot(whole) == before
    assert again.path == whole


def test_overwrite_replaces_the_run_and_leaves_what_is_not_its_own(place: Place, whole: Path) -> None:
    place.run("out", "lora/r8_attention")
    (place.folder / "out" / "notes.txt").write_text("mine")
    before = snapshot(place.folder / "out")
    with pytest.raises(OutputError, match="holds another run"):
        place.run("out")
    assert snapshot(place.folder / "out") == before
    place.run("out", overwrite=True)
    assert (place.folder / "out" / "notes.txt").read_text() == "mine"
    (place.folder / "out" / "notes.txt").unlink()
    assert_same(whole, place.folder / "out")  # and nothing of the adapter is left


def test_a_run_is_not_replaced_by_one_that_starts_from_it(place: Place, whole: Path) -> None:
    before = snapshot(whole)
    elsewhere = Place(place.folder, whole / "checkpoints" / "checkpoint-3")
    with pytest.raises(OutputError, match=r"holds what the run starts from, .*which --overwrite would delete"):
        elsewhere.run(str(whole), overwrite=True)
    assert snapshot(whole) == before


def test_checkpoints_of_an_unknown_run_are_not_resumed(place: Place, whole: Path) -> None:
    stopped = place.stopped(2, whole)
    (stopped / "settings.json").unlink()
    with pytest.raises(OutputError, match="it is not known which run they are of"):
        place.run(stopped.name, resume=True)

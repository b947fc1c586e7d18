"""Every bad input ends in one clear message, exit code 2, nothing written and nothing overwritten."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ptft_hf import cli
from tests.bad_files import MODELS, PREFERENCES, ROWS, RUNS, STOPPED
from tests.bad_inputs import FLAGS, RECIPES, TRAIN, Case
from tests.conftest import rows, write_rows
from tests.tiny import make_checkpoint

TASK = """family: sequence_classification
data:
  path: json
  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}
training: {num_train_epochs: 1, per_device_train_batch_size: 16}
"""


def run(command: str, patch: pytest.MonkeyPatch) -> int:
    """Exit code of ``ptft COMMAND``, in this process."""
    patch.setattr(sys, "argv", ["ptft", *shlex.split(command)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of :class:`tests.bad_inputs.Case`, with everything in it good."""
    folder = tmp_path_factory.mktemp("good")
    make_checkpoint("bert", folder / "model")
    make_checkpoint("bert", folder / "other", initializer_range=0.03)
    for name, count, seed in (("train", 48, 1), ("dev", 16, 2), ("test", 16, 3)):
        write_rows(folder / f"{name}.jsonl", rows(count, seed))
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, adapter in (("full", "full/default"), ("lora", "lora/r8_attention")):
            assert run(TRAIN.replace("full/default", adapter).replace("new", name), patch) == 0
    # "stopped" is what a kill after the last save leaves.
    for name in ("settings.json", "metrics.jsonl"):
        (folder / "stopped").mkdir(exist_ok=True)
        shutil.copy(folder / "full" / name, folder / "stopped")
    shutil.copytree(folder / "full" / "checkpoints", folder / "stopped" / "checkpoints")
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        folder = tmp_path / "work"
        shutil.copytree(good, folder)
        monkeypatch.chdir(folder)
        case.change()
        before = snapshot(tmp_path)
        capsys.readouterr()
        code = run(case.command, monkeypatch)
        said = capsys.readouterr().err
        print(said)
        assert code == 2, said
        assert "Traceback" not in said
        assert len(re.findall(r"^error: |^╭─ Error", said, re.MULTILINE)) == 1, said
        assert [word for word in case.words if word not in said] == [], said
        assert snapshot(tmp_path) == before

    return check


@pytest.mark.parametrize("case", RECIPES, ids=lambda case: case.name)
def test_a_bad_recipe_is_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", FLAGS, ids=lambda case: case.name)
def test_a_bad_setting_is_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_bad_data_are_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", PREFERENCES, ids=lambda case: case.name)
def test_bad_pairs_of_answers_are_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_bad_model_is_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case.name)
def test_a_bad_use_of_a_run_is_refused(case: Case, refused: Callable[[Case], None]) -> None:
    refused(case)


@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.name)
def test_a_bad_resume_is_refused(case: Case, refused: Callable[[Case], None]) -> None:
    again = TRAIN.replace("new", "stopped")
    command = case.command.replace("RESUME", f"{again} --resume").replace("OVERWRITE", f"{again} --overwrite")
    refused(case._replace(command=command))


def test_the_good_inputs_are_good(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command that the table breaks works on the unbroken folder; else every refusal above proves nothing."""
    shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    assert run(TRAIN, monkeypatch) == 0
    assert run(TRAIN.replace("new", "stopped") + " --resume", monkeypatch) == 0
    assert run("predict full text", monkeypatch) == 0
    assert run("predict lora text", monkeypatch) == 0
    assert run("evaluate full --data test.jsonl", monkeypatch) == 0
    assert run("merge lora --output merged", monkeypatch) == 0
    assert run("validate task.yaml", monkeypatch) == 0

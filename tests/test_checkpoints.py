"""Folders that are either whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptft_hf import checkpoints, records
from ptft_hf.errors import CheckpointError, OutputError


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- manifests ----


def test_a_manifest_names_every_file_with_its_size_and_sha256(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", one="abc", two="")
    folder_with(folder / "inner", three="x")
    checkpoints.write_manifest(folder)
    # `printf abc | sha256sum`, `printf '' | sha256sum`, `printf x | sha256sum`
    assert checkpoints.manifest(folder) == {
        "inner/three": (1, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"),
        "one": (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        "two": (0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    }
    assert checkpoints.damage(folder) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "one").unlink(), ["one: missing"]),
        (lambda f: (f / "one").write_text("ab"), ["one: 2 bytes instead of 3"]),
        (lambda f: (f / "one").write_text("abd"), ["one: its bytes have changed", "SHA-256"]),
        (lambda f: (f / "manifest.json").unlink(), ["no manifest.json", "never finished"]),
        (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json: not readable"]),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), ["manifest.json: not readable"]),
        (lambda f: (f / "manifest.json").write_text('{"files": []}'), ["manifest.json: not readable"]),
        (lambda f: (f / "manifest.json").write_text('{"files": {}}'), ["manifest.json: names no files"]),
        (lambda f: (f / "manifest.json").write_text('{"files": {"one": {"size": 3}}}'), ["not readable"]),
    ],
)
def test_damage_says_what_is_wrong(tmp_path: Path, harm: Callable[[Path], Any], words: list[str]) -> None:
    folder = folder_with(tmp_path / "a", one="abc")
    checkpoints.write_manifest(folder)
    harm(folder)
    (problem,) = checkpoints.damage(folder)
    assert all(word in problem for word in words), problem


def test_damage_names_every_file_that_is_damaged(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", one="abc", two="abc", three="abc")
    checkpoints.write_manifest(folder)
    (folder / "one").unlink()
    (folder / "two").write_text("x")
    assert len(checkpoints.damage(folder)) == 2


# ---- writing ----


def test_a_text_replaces_the_old_one_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    checkpoints.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_published_folder_has_a_manifest_and_replaces_the_old_one(tmp_path: Path) -> None:
    folder_with(tmp_path / "final", old="x")
    checkpoints.publish(folder_with(tmp_path / ".staging", new="y"), tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["manifest.json", "new"]
    assert checkpoints.damage(tmp_path / "final") == []


def test_publishing_into_a_folder_moves_the_manifest_first_and_the_last_file_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "run", settings="kept")
    folder_with(folder / "inner", old="x")
    staged = folder_with(folder / ".staging", a="1", last="2", z="3")
    folder_with(staged / "inner", new="y")
    moved: list[str] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        moved.append(Path(target).name)
        assert not (folder / "last").exists()
        if Path(target).name == "last":
            assert names(folder) == [".last.staged", "a", "inner", "manifest.json", "settings", "z"]
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    checkpoints.publish_into(staged, folder, last="last")
    assert moved[0] == "manifest.json" and moved[-1] == "last"
    assert names(folder) == ["a", "inner", "last", "manifest.json", "settings", "z"]
    assert names(folder / "inner") == ["new"]
    assert set(checkpoints.manifest(folder)) == {"a", "inner/new", "last", "z"}
    assert checkpoints.damage(folder) == []


def test_a_half_deleted_folder_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "checkpoint-1", a="1")
    checkpoints.write_manifest(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)  # the kill comes before the deletion
        checkpoints.remove(folder)
    assert names(tmp_path) == [".deleted-checkpoint-1"]
    assert checkpoints.steps(tmp_path) == []
    checkpoints.discard_unfinished(tmp_path)
    assert names(tmp_path) == []


def test_what_a_kill_leaves_is_discarded_and_nothing_else(tmp_path: Path) -> None:
    for name in (".staging", ".staging-3", ".deleted-x", "checkpoint-1"):
        folder_with(tmp_path / name, a="1")
    for name in (".settings.json.staged", ".hidden", "run.json"):
        (tmp_path / name).write_text("")
    checkpoints.discard_unfinished(tmp_path)
    assert names(tmp_path) == [".hidden", "checkpoint-1", "run.json"]


# ---- checkpoints of a run ----


def run_with(folder: Path, *steps: int, best: int | None = None) -> Path:
    """Intact checkpoints, each of which knows the best one so far."""
    for step in steps:
        path = folder_with(folder / f"checkpoint-{step}", weights=str(step))
        (path / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
        checkpoints.write_manifest(path)
    return folder


def test_steps_are_ordered_by_number_and_other_folders_are_left_out(tmp_path: Path) -> None:
    run_with(tmp_path, 10, 9, 100)
    folder_with(tmp_path / "checkpoint-last", a="1")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [9, 10, 100]


def test_the_newest_intact_checkpoint_is_found_and_each_newer_one_accounted_for(tmp_path: Path) -> None:
    run_with(tmp_path, 2, 9, 10, 11)
    (tmp_path / "checkpoint-11" / "weights").unlink()
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    found, skipped = checkpoints.newest_intact(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert [line.split(":")[0] for line in skipped] == ["skipped checkpoint-11", "skipped checkpoint-10"]


@pytest.mark.parametrize(("with_best", "expected"), [(True, None), (False, "checkpoint-3")])
def test_the_best_checkpoint_must_be_intact_where_it_is_needed(
    tmp_path: Path, with_best: bool, expected: str | None
) -> None:
    run_with(tmp_path, 1, 3, best=1)
    (tmp_path / "checkpoint-1" / "weights").write_text("2")
    found, skipped = checkpoints.newest_intact(tmp_path, with_best=with_best)
    assert found == (tmp_path / expected if expected else None)
    assert any("it needs the best one so far" in line for line in skipped) is with_best


def test_checkpoints_after_the_start_are_discarded(tmp_path: Path) -> None:
    run_with(tmp_path, 1, 2, 10)
    checkpoints.discard_newer(tmp_path, tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    checkpoints.discard_newer(tmp_path, None)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (None, None, [2, 4, 6, 8]),
        (1, None, [8]),
        (1, 2, [2, 8]),  # never the best or the newest, even if they are one more than asked for
        (1, 8, [8]),
        (2, 4, [4, 8]),
        (3, 2, [2, 6, 8]),
        (9, 2, [2, 4, 6, 8]),
    ],
)
def test_rotation_deletes_the_oldest_that_are_neither_best_nor_newest(
    tmp_path: Path, keep: int | None, best: int | None, kept: list[int]
) -> None:
    run_with(tmp_path, 2, 4, 6, 8)
    checkpoints.rotate(tmp_path, keep, best)
    assert [step for step, _ in checkpoints.steps(tmp_path)] == kept


# ---- a run that is replaced ----


def test_clearing_a_run_deletes_its_files_and_no_others(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", weights="w", **{"run.json": "{}"})
    checkpoints.write_manifest(folder)
    for name in ("settings.json", "metrics.jsonl", "notes.txt"):
        (folder / name).write_text("")
    run_with(folder / "checkpoints", 1)
    records.clear(folder)
    assert names(folder) == ["notes.txt"]


def test_a_run_with_a_damaged_manifest_is_not_cleared(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "run", weights="w", **{"run.json": "{}", "manifest.json": "{"})
    with pytest.raises(OutputError, match="which files are the run's; delete"):
        records.clear(folder)
    assert names(folder) == ["manifest.json", "run.json", "weights"]


@pytest.mark.parametrize("text", ["{", "[]", b"\xff"])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=r"run\.json: "):
        checkpoints.read_json(path)

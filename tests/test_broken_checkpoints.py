"""Row 2 of what upstream really does: a checkpoint broken by a kill is resumed from, and crashes the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from ptft_hf import checkpoints
from ptft_hf.errors import CheckpointError
from ptft_hf.resuming import check_best
from tests.stopped_runs import Place, assert_same, flip_last_byte


@pytest.fixture
def place(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Place:
    return Place(tmp_path, checkpoint("bert"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Path:
    """An unbroken run with the usual settings."""
    place = Place(tmp_path_factory.mktemp("whole"), checkpoint("bert"))
    place.run("whole")
    return place.folder / "whole"


# ---- upstream ----


def upstream_trainer(checkpoint: Path, output: Path, steps: int) -> transformers.Trainer:
    """A plain ``transformers.Trainer`` on eight rows, which saves at every step."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    data = [{"input_ids": [1, i + 5, 2], "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(output),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(model, arguments, train_dataset=data)


def test_upstream_resumes_from_a_broken_checkpoint_and_crashes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream_trainer(checkpoint("bert"), tmp_path, 3).train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])  # what a kill in the middle of a save leaves
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()  # an intact one is there
    with pytest.raises(safetensors.SafetensorError, match="header"):
        upstream_trainer(checkpoint("bert"), tmp_path, 4).train(resume_from_checkpoint=True)


def test_upstream_resumes_from_changed_weights_without_a_word(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    upstream_trainer(checkpoint("bert"), tmp_path, 2).train()
    flip_last_byte(tmp_path / "checkpoint-2" / "model.safetensors")
    upstream_trainer(checkpoint("bert"), tmp_path, 3).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3").exists()


# ---- ours ----


def test_ours_skips_broken_checkpoints_and_says_which_and_why(
    place: Place, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = place.stopped(6, whole)
    places = stopped / "checkpoints"
    (places / "checkpoint-6" / "optimizer.pt").unlink()
    flip_last_byte(places / "checkpoint-5" / "model.safetensors")
    (places / "checkpoint-4" / "manifest.json").unlink()
    content = (places / "checkpoint-3" / "model.safetensors").read_bytes()
    (places / "checkpoint-3" / "model.safetensors").write_bytes(content[:1000])
    (places / ".staging-6").mkdir()
    place.run(stopped.name, resume=True)
    said = capsys.readouterr().err
    for line in (
        f"skipped checkpoint-6: {places / 'checkpoint-6' / 'optimizer.pt'}: missing",
        f"skipped checkpoint-5: {places / 'checkpoint-5' / 'model.safetensors'}: its bytes have changed since it "
        "was written (SHA-256 differs)",
        f"skipped checkpoint-4: {places / 'checkpoint-4'}: no manifest.json; it was never finished",
        f"skipped checkpoint-3: {places / 'checkpoint-3' / 'model.safetensors'}: 1000 bytes instead of "
        f"{len(content)}",
        "resuming from checkpoint-2",
    ):
        assert line in said
    assert_same(whole, stopped)
    assert not (places / ".staging-6").exists()


def test_a_checkpoint_whose_best_one_is_broken_is_skipped(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    # At a rate of 1e-12 the first step stays the best one: without it no later checkpoint can end the run.
    still = {"learning_rate": 1e-12, "num_train_epochs": 1}
    place.run("whole", settings=still)
    stopped = place.stopped(3, place.folder / "whole")
    flip_last_byte(stopped / "checkpoints" / "checkpoint-1" / "model.safetensors")
    capsys.readouterr()
    place.run(stopped.name, settings=still, resume=True)
    said = capsys.readouterr().err
    assert "skipped checkpoint-3: it needs the best one so far: " in said
    assert "has no intact checkpoint: starting from the beginning" in said
    assert_same(place.folder / "whole", stopped)


def test_with_no_intact_checkpoint_it_starts_over_and_says_so(
    place: Place, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = place.stopped(2, whole)
    for _, path in checkpoints.steps(stopped / "checkpoints"):
        (path / "trainer_state.json").write_text("{")
    place.run(stopped.name, resume=True)
    said = capsys.readouterr().err
    assert "skipped checkpoint-2: " in said and "skipped checkpoint-1: " in said
    assert "has no intact checkpoint: starting from the beginning" in said
    assert_same(whole, stopped)


def test_the_best_checkpoint_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    checkpoints.write_manifest(folder)
    check_best(folder)
    flip_last_byte(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the best checkpoint is lost"):
        check_best(folder)


def test_a_best_checkpoint_that_is_damaged_while_the_run_goes_on_stops_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptft_hf import trainer

    load_best = trainer.Trainer._load_best_model

    def damage_and_load(self: trainer.Trainer) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        flip_last_byte(folder / "model.safetensors")
        load_best(self)

    monkeypatch.setattr(trainer.Trainer, "_load_best_model", damage_and_load)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        place.run("out", settings={"num_train_epochs": 1})
    assert not (place.folder / "out" / "run.json").exists()

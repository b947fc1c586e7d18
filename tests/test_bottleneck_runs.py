"""Runs with bottleneck adapters: proven, resumed, trained further, pushed, and never mistaken for PEFT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import ptft_hf
from ptft_hf import checkpoints, hub, inference
from ptft_hf.errors import AdapterError, CheckpointError
from tests.conftest import rows
from tests.references.sine_weights import build
from tests.runs import bert_without_dropout, recipe, short_run, splits
from tests.stopped_runs import Place, assert_same
from tests.test_bottleneck_adapterhub import STORED
from tests.test_distributed import COMMON, on_two_processes, task_of
from tests.tiny import make_checkpoint, make_tokenizer

Checkpoint = Callable[[str], Path]


def run(model: Path, adapter: Any, folder: Path, **settings: Any) -> Any:
    return short_run(model, adapter, folder, **{"learning_rate": 0.01, **settings})


@pytest.fixture(scope="module")
def finished(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bottleneck") / "run"
    run(checkpoint("bert"), "bottleneck/pfeiffer", folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 9, 10, 11, 2]])).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("bert", "houlsby"),
        ("bart", "parallel"),
        ("t5", "houlsby"),
        ("deberta-v2", "pfeiffer"),
        ("gpt2", "parallel"),
    ],
)
def test_what_is_saved_is_what_was_trained(
    architecture: str, variant: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trained = run(checkpoint(architecture), f"bottleneck/{variant}", tmp_path / "run")
    assert trained.run["proof"]["max_difference"] == 0.0
    assert torch.equal(logits(ptft_hf.load(tmp_path / "run").model), logits(trained.model))
    base = set(load_file(checkpoint(architecture) / "model.safetensors"))
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert not {name for name in saved if any(name.endswith(f".{other}") for other in base)}
    assert any(value.abs().max() > 0 for name, value in saved.items() if name.endswith("up.weight"))


def test_a_run_with_gradient_checkpointing_learns_the_same(tmp_path: Path) -> None:
    # Without dropout, and with steps that are proportional to the gradients, which rounding then hardly changes.
    model = bert_without_dropout(tmp_path / "bert")
    learned = []
    for checkpointing in (False, True):
        folder = tmp_path / f"run-{checkpointing}"
        settings = {
            "activation_checkpointing": checkpointing,
            "optim": "sgd",
            "learning_rate": 1.0,
            "bf16": False,
        }
        run(model, "bottleneck/pfeiffer", folder, **settings)
        learned.append(load_file(folder / "adapter_model.safetensors"))
    assert all(torch.allclose(learned[0][name], learned[1][name], atol=1e-6) for name in learned[0])
    assert all(value.any() for name, value in learned[1].items() if name.endswith("up.weight"))


def test_a_loaded_run_predicts_evaluates_and_is_saved_elsewhere(finished: Path, tmp_path: Path) -> None:
    model = ptft_hf.load(finished)
    assert model.predict(["a good film"])[0]["label"] in ("neg", "pos")
    data = splits(rows(8, 5))
    assert set(model.evaluate(data)) >= {"accuracy", "report"}
    again = ptft_hf.load(model.save(tmp_path / "copy"))
    assert torch.equal(logits(again.model), logits(model.model))
    assert model.run["settings"]["learning_rate"] == 0.01


def test_the_default_learning_rate_is_adapterhub_s(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = ptft_hf.train(
        model=str(checkpoint("bert")),
        task=recipe(),
        adapter="bottleneck/houlsby",
        output_dir=tmp_path / "run",
        data=splits(rows(16, 1)),
        settings={"max_steps": 1},
    )
    assert result.run["settings"]["learning_rate"] == 1e-4


def test_plain_peft_does_not_take_it_for_its_own(finished: Path, checkpoint: Checkpoint) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint("bert"))
    with pytest.raises(KeyError, match="peft_type"):
        peft.PeftModel.from_pretrained(base, str(finished))
    card = (finished / "README.md").read_text("utf-8")
    assert "library_name: ptft_hf" in card
    assert "Plain `peft` has no bottleneck adapters and cannot load this one." in card
    assert "from ptft_hf import load" in card
    assert "PeftModel" not in card


def test_merging_is_refused_by_name(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="bottleneck cannot be merged on this model: a bottleneck's non-lin"
    ):
        inference.merge(finished, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_and_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    other = make_checkpoint("bert", tmp_path / "other", initializer_range=0.03)
    with pytest.raises(CheckpointError, match="not the base that this adapter was trained on"):
        ptft_hf.load(finished, model=str(other))
    folder = shutil.copytree(finished, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["adapters"]["default"]["reduction_factor"] = 8
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"its bytes have changed|bytes instead of"):
        ptft_hf.load(folder)
    with pytest.raises(CheckpointError, match=r"of another shape are .*down\.weight"):
        ptft_hf.load(folder, verify=False)
    (folder / "adapter_config.json").write_text('{"adapter_kind": "bottleneck"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="not readable as a bottleneck adapter's"):
        ptft_hf.load(folder, verify=False)


def test_what_is_pushed_says_whose_it_is(finished: Path) -> None:
    files = hub.contents(finished, checkpoints.read_json(finished / "run.json"), "owner/name")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    card = files["README.md"]
    assert isinstance(card, bytes) and b"Plain `peft` has no bottleneck adapters" in card


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, checkpoint: Checkpoint) -> None:
    place = Place(tmp_path, checkpoint("bert"))
    place.run("whole", "bottleneck/houlsby", {"load_best_model_at_end": True})
    for step in (2, 5):
        stopped = place.stopped(step, place.folder / "whole")
        place.run(stopped.name, "bottleneck/houlsby", {"load_best_model_at_end": True}, resume=True)
        assert_same(place.folder / "whole", stopped)


@pytest.mark.slow
def test_two_processes_train_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    task = task_of(tmp_path, 32)
    settings = {**COMMON, "per_device_train_batch_size": 4}
    done = on_two_processes(checkpoint("bert"), task, "bottleneck/pfeiffer", tmp_path / "run", settings)
    assert done.returncode == 0, done.stderr
    assert ptft_hf.load(tmp_path / "run").run["proof"]["max_difference"] == 0.0


def test_training_on_begins_where_the_earlier_run_ended(
    finished: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    before = logits(ptft_hf.load(finished).model)
    # Steps of 1e-30 change no weight, so that the outcome is the beginning.
    still = run(checkpoint("bert"), str(finished), tmp_path / "still", learning_rate=1e-30, weight_decay=0.0)
    assert torch.equal(logits(still.model), before)
    moved = run(checkpoint("bert"), finished, tmp_path / "moved")
    assert moved.run["proof"]["max_difference"] == 0.0
    assert not torch.equal(logits(moved.model), before)
    with pytest.raises(AdapterError, match=r"adapter.reduction_factor: cannot be changed when .* it is 16"):
        run(checkpoint("bert"), str(finished), tmp_path / "new", **{"adapter.reduction_factor": 4})
    with pytest.raises(AdapterError, match=r"\['neg', 'pos'\], and the data is for .* \['neutral', 'pos'\]"):
        run(checkpoint("bert"), str(finished), tmp_path / "new", labels=("neutral", "pos"))


def test_an_adapter_of_adapterhub_s_library_is_trained_further(tmp_path: Path) -> None:
    from transformers import AutoModel

    base = build("bert", AutoModel)
    base.resize_token_embeddings(len(make_tokenizer("bert")), mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer("bert").save_pretrained(tmp_path / "base")
    theirs = STORED / "bert-houlsby"
    still = run(tmp_path / "base", theirs, tmp_path / "still", learning_rate=1e-30, weight_decay=0.0)
    weights = torch.load(theirs / "pytorch_adapter.bin")
    layer = still.model.bert.encoder.layer[1]
    down = weights["bert.encoder.layer.1.attention.output.adapters.task.adapter_down.0.weight"]
    assert torch.equal(layer.mh_adapter["default"].down.weight, down)
    assert still.run["adapter"]["non_linearity"] == "swish"
    assert run(tmp_path / "base", str(theirs), tmp_path / "moved").run["proof"]["max_difference"] == 0.0

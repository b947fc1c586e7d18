"""A finished run in use: load, predict, evaluate; and what a damaged one says."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import ptft_hf
from ptft_hf.errors import CheckpointError, DataError, ModelError
from tests.conftest import rows, write_rows
from tests.finished import QUICK, Finished, full, logits_of, lora, read_rows  # noqa: F401
from tests.tiny import make_checkpoint


def copy_of(run: Finished, folder: Path) -> Path:
    shutil.copytree(run.folder, folder)
    return folder


# ---- predict ----


def test_predictions_are_the_softmax_of_the_logits_of_each_text_alone(lora: Finished):
    model = ptft_hf.load(lora.folder)
    expected = logits_of(model, lora.texts).double().softmax(-1)
    answers = model.predict(lora.texts, batch_size=3)
    scores = np.array([[answer["scores"][label] for label in ("neg", "pos")] for answer in answers])
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)
    assert [answer["label"] for answer in answers] == [("neg", "pos")[i] for i in expected.argmax(-1)]
    assert {answer["label"] for answer in answers} == {"neg", "pos"}


def test_answers_keep_the_order_of_the_texts_though_batches_are_made_by_length(lora: Finished):
    model = ptft_hf.load(lora.folder)
    forth = model.predict(lora.texts, batch_size=2)
    back = model.predict(lora.texts[::-1], batch_size=5)[::-1]
    assert [a["label"] for a in forth] == [a["label"] for a in back]
    np.testing.assert_allclose(
        [a["scores"]["pos"] for a in forth], [a["scores"]["pos"] for a in back], atol=1e-6
    )


def test_a_mapping_is_as_good_as_a_string_and_its_other_keys_are_passed_over(lora: Finished):
    model = ptft_hf.load(lora.folder)
    (one,) = model.predict(["a good film"])
    (other,) = model.predict([{"text": "a good film", "id": 7, "label": "neg"}])
    assert one == other


@pytest.mark.parametrize("text", ["", " ", "Ünïcödé ✓ 漢字 🙂", "a\u2028b\x00c", "x" * 5000, "good " * 5000])
def test_any_text_gets_an_answer(lora: Finished, text: str):
    (answer,) = ptft_hf.load(lora.folder).predict([text])
    assert sum(answer["scores"].values()) == pytest.approx(1)


def test_no_texts_give_no_answers(lora: Finished):
    assert ptft_hf.load(lora.folder).predict([]) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 5], r"input 2: 5 is neither a text nor an object with the key 'text'"),
        (["a", {"body": "b"}], r"input 2: 'text' must be given, as text; .* the input has \['body'\]"),
        ([{"text": None}], r"input 1: 'text' must be given, as text"),
        (["\ud83d"], r"input 1: 'text' has half of a surrogate pair, which is no text"),
    ],
)
def test_what_is_no_text_is_refused_by_its_number(lora: Finished, texts: list, message: str):
    with pytest.raises(DataError, match=message):
        ptft_hf.load(lora.folder).predict(texts)


def test_a_model_of_pairs_wants_both_texts(checkpoint: Callable[[str], Path], tmp_path: Path):
    for name, count in (("train", 24), ("validation", 8), ("test", 8)):
        pairs = [{**row, "text_pair": f"the plot {i}"} for i, row in enumerate(rows(count, seed=count))]
        write_rows(tmp_path / f"{name}.jsonl", pairs)
    task = tmp_path / "pairs.yaml"
    files = "{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}"
    task.write_text(f"family: sequence_classification\ndata: {{path: json, data_files: {files}}}\n")
    model = ptft_hf.train(
        model=str(checkpoint("bert")),
        task=task,
        adapter="partial/head_only",
        output_dir=tmp_path / "out",
        settings={**QUICK, "num_train_epochs": 1},
    )
    with pytest.raises(DataError, match="'text_pair' must be given"):
        model.predict(["a text alone"])
    one, other = model.predict([{"text": "a", "text_pair": "good"}, {"text": "a", "text_pair": "bad plot 1"}])
    assert one != other
    assert '"text_pair": "Another one."' in (tmp_path / "out" / "README.md").read_text("utf-8")


# ---- evaluate ----


@pytest.mark.parametrize("name", ["full", "lora"])
def test_evaluate_gives_exactly_what_the_run_recorded(name: str, request: pytest.FixtureRequest):
    run = request.getfixturevalue(name)
    model = ptft_hf.load(run.folder)
    for split in ("validation", "test"):
        result = model.evaluate(split=split)
        assert result.pop("report") == run.run["report"][split]
        assert result == run.run["metrics"][split]
    assert run.run["metrics"]["test"]["accuracy"] > 0.6


def test_evaluate_on_a_file_counts_by_hand(lora: Finished, tmp_path: Path):
    model = ptft_hf.load(lora.folder)
    labelled = rows(10, seed=9)
    file = write_rows(tmp_path / "other.jsonl", labelled)
    right = sum(
        answer["label"] == row["label"]
        for answer, row in zip(model.predict([r["text"] for r in labelled]), labelled, strict=True)
    )
    result = ptft_hf.evaluate(lora.folder, str(file))
    assert result["accuracy"] == right / 10
    assert sum(map(sum, result["report"]["confusion"])) == 10


def test_evaluate_refuses_labels_that_the_model_never_saw(lora: Finished, tmp_path: Path):
    file = write_rows(
        tmp_path / "other.jsonl", [{"text": "a", "label": "pos"}, {"text": "b", "label": "odd"}]
    )
    message = r"test: labels \['odd'\] are unknown to this model; it knows \['neg', 'pos'\]"
    with pytest.raises(DataError, match=message):
        ptft_hf.evaluate(lora.folder, str(file))


def test_data_that_has_changed_since_the_run_is_said_aloud(
    lora: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model = ptft_hf.load(lora.folder)
    model.evaluate()
    assert "is not what it was" not in capfd.readouterr().err
    write_rows(tmp_path / "test.jsonl", read_rows(lora.data / "test.jsonl")[:8])
    files = {**model.task.recipe.data.data_files, "test": str(tmp_path / "test.jsonl")}
    source = model.task.recipe.data.model_copy(update={"data_files": files})
    model.task.recipe = model.task.recipe.model_copy(update={"data": source})
    model.evaluate()
    assert "- the test data is not what it was when this model was trained" in capfd.readouterr().err


# ---- load ----


def test_an_adapter_finds_its_base_where_it_has_moved(lora: Finished, tmp_path: Path):
    moved = shutil.copytree(lora.base, tmp_path / "moved")
    model = ptft_hf.load(lora.folder, model=str(moved))
    assert torch.equal(logits_of(model, lora.texts), logits_of(ptft_hf.load(lora.folder), lora.texts))
    saved = model.save(tmp_path / "saved")
    assert json.loads((saved / "run.json").read_text("utf-8"))["model"]["reference"] == str(moved)
    assert str(moved) in (saved / "README.md").read_text("utf-8")


def test_a_base_that_is_gone_says_how_to_name_its_new_place(lora: Finished, tmp_path: Path):
    folder = copy_of(lora, tmp_path / "copy")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["model"]["reference"] = str(tmp_path / "gone")
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(ModelError, match=r"(?s)gone: no such folder here.*say where it is \(--model"):
        ptft_hf.load(folder, verify=False)


def test_another_base_of_the_same_shape_is_refused_by_its_fingerprint(lora: Finished, tmp_path: Path):
    other = make_checkpoint("bert", tmp_path / "other")
    weights = transformers.AutoModel.from_pretrained(other)
    with torch.no_grad():
        weights.encoder.layer[1].output.dense.bias[3] += 1e-6
    weights.save_pretrained(other)
    with pytest.raises(CheckpointError, match=f"{other}: not the base that this adapter was trained on"):
        ptft_hf.load(lora.folder, model=str(other))
    assert ptft_hf.load(lora.folder, model=str(other), verify=False).predict(["a"])  # as asked for


def test_a_whole_model_has_no_base_to_move(full: Finished):
    with pytest.raises(CheckpointError, match="a whole model, without a base"):
        ptft_hf.load(full.folder, model=str(full.base))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "config.json", "tokenizer.json", "run.json"])
def test_one_flipped_bit_is_refused_by_the_name_of_its_file(lora: Finished, tmp_path: Path, name: str):
    file = copy_of(lora, tmp_path / "copy") / name
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        ptft_hf.load(file.parent)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "run.json", "manifest.json"]
)
def test_a_missing_file_is_named(lora: Finished, tmp_path: Path, name: str):
    folder = copy_of(lora, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        ptft_hf.load(folder)


def test_all_damaged_files_are_named_at_once(full: Finished, tmp_path: Path):
    folder = copy_of(full, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        ptft_hf.load(folder)
    assert len(caught.value.problems) == 2


def test_prediction_is_in_float32_unless_asked(lora: Finished):
    model = ptft_hf.load(lora.folder)
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    half = ptft_hf.load(lora.folder, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    one, other = (m.predict(lora.texts)[0]["scores"]["pos"] for m in (model, half))
    assert one != other
    assert one == pytest.approx(other, abs=0.05)
    with pytest.raises(ModelError, match="'int8' is no dtype"):
        ptft_hf.load(lora.folder, dtype="int8")


def test_a_head_trained_in_float32_over_a_bfloat16_base_comes_back_whole(
    lora: Finished, checkpoint: Callable[[str], Path], tmp_path: Path
):
    """PEFT puts a saved head into the type of the base that it is loaded on: bfloat16 would cut it short."""
    settings = {**QUICK, "bf16": True, "num_train_epochs": 1, "model.dtype": "bfloat16"}
    model = ptft_hf.train(
        model=str(checkpoint("bert")),
        task=lora.data / "task.yaml",
        adapter="lora/r8_attention",
        output_dir=tmp_path / "out",
        settings=settings,
    )
    (head,) = [
        p
        for n, p in model.model.named_parameters()
        if n.endswith("classifier.modules_to_save.default.weight")
    ]
    assert not torch.equal(head, head.bfloat16().float())
    assert model.run["proof"]["max_difference"] == 0.0

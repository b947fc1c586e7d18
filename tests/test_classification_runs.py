"""Classification of every kind end to end, on a tiny BERT that learns a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from ptft_hf import inference, training
from ptft_hf.errors import DataError
from tests.conftest import rows
from tests.runs import QUICK, build, learner, recipe, splits, told

LEARN = {**QUICK, "num_train_epochs": 8, "per_device_train_batch_size": 16, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learner(tmp_path_factory.mktemp("bert"))


def learn(model: Path, data: Any, folder: Path, task: Any = None, **settings: Any) -> Any:
    return training.train(
        model=str(model),
        task=task or recipe(),
        adapter="full/default",
        output_dir=folder,
        data=data,
        seed=1,
        settings={**LEARN, **settings},
    )


def three(table: list[dict[str, Any]]) -> datasets.DatasetDict:
    """The last 24 rows are the test set, the 24 before them the validation set."""
    return splits(table[:-48], validation=table[-48:-24], test=table[-24:])


def test_single_label(bert: Path, tmp_path: Path) -> None:
    data = three([{"text": text, "label": kind[0]} for text, kind in told(144, (["neg"], ["pos"]))])
    trained = learn(bert, data, tmp_path / "run", recipe(calibrate=True))
    assert trained.run["metrics"]["test"]["accuracy"] == 1.0
    assert trained.run["labels"] == ["neg", "pos"]
    again = inference.load(tmp_path / "run")
    assert again.task.temperature == trained.task.temperature != 1.0
    texts = [text for text, _ in told(30, (["pos"], ["neg"]))]
    assert again.predict(texts) == trained.predict(texts)
    assert [p["label"] for p in again.predict(texts)] == ["pos", "neg"] * 15
    with pytest.raises(DataError, match=r"labels \['neutral'\] are unknown to this model"):
        again.evaluate(datasets.Dataset.from_list([{"text": "plain", "label": "neutral"}]))


def test_a_prediction_does_not_depend_on_its_batch(bert: Path, tmp_path: Path) -> None:
    trained = learn(bert, splits(rows(32)), tmp_path / "run", num_train_epochs=1)
    texts = [row["text"] for row in rows(30, 9)]  # of 5 to 20 words
    alone = [trained.predict([text])[0] for text in texts]
    assert len({p["scores"]["pos"] for p in alone}) == 30  # an order could be told apart
    for size in (1, 7, 64):
        together = trained.predict(texts, batch_size=size)
        assert [p["label"] for p in together] == [p["label"] for p in alone]
        for one, other in zip(together, alone, strict=True):  # padding changes the last bits alone
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


def test_multi_label(bert: Path, tmp_path: Path) -> None:
    table = told(192, (["pos"], ["neg"], ["neg", "pos"], []))
    data = three([{"text": text, "label": list(kind)} for text, kind in table])
    task = recipe(tune_thresholds=True, class_weights="balanced")
    trained = learn(bert, data, tmp_path / "run", task, num_train_epochs=12)
    assert trained.run["metrics"]["test"]["macro_f1"] > 0.9
    found = trained.predict(["the film 3", "the good film 7"])
    assert [p["label"] for p in found] == [[], ["pos"]]
    assert set(found[0]["scores"]) == {"neg", "pos"}
    assert inference.load(tmp_path / "run").task.thresholds == trained.task.thresholds is not None


def test_regression(bert: Path, tmp_path: Path) -> None:
    targets = {"neg": -1.0, "neutral": 0.5, "pos": 2.0}
    table = told(144, (["neg"], ["neutral"], ["pos"]))
    data = three([{"text": text, "label": targets[kind[0]]} for text, kind in table])
    trained = learn(bert, data, tmp_path / "run")
    assert trained.run["metrics"]["test"]["pearson"] > 0.9
    assert trained.run["labels"] == []
    found = trained.predict(["the awful film 4", "the great film 5"])
    assert [list(p) for p in found] == [["label"], ["label"]]
    assert found[0]["label"] == pytest.approx(-1.0, abs=0.6)
    assert found[1]["label"] == pytest.approx(2.0, abs=0.6)
    assert trained.evaluate(data["test"])["mse"] == pytest.approx(trained.run["metrics"]["test"]["mse"])


def test_pairs(bert: Path, tmp_path: Path) -> None:
    # The label is whether the first text holds the word of praise or the second: the order of a pair tells.
    table = []
    for i in range(64):
        pair = ["the good film", f"the plain film {i}"]
        first, second = pair if i % 2 else reversed(pair)
        table.append({"a": first, "b": second, "label": ["second", "first"][i % 2]})
    data = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(part)
            for name, part in (("train", table[:48]), ("validation", table[48:56]), ("test", table[56:]))
        }
    )
    task = recipe(columns={"text": "a", "text_pair": "b"})
    trained = learn(bert, data, tmp_path / "run", task)
    assert trained.run["metrics"]["test"]["accuracy"] == 1.0
    good, plain = "the good film", "the plain film 70"
    found = trained.predict([{"text": good, "text_pair": plain}, {"text": plain, "text_pair": good}])
    assert [p["label"] for p in found] == ["first", "second"]
    with pytest.raises(DataError, match="'text_pair' must be given"):
        trained.predict(["the good film"])


def test_truncation_is_said_aloud(bert: Path, tmp_path: Path) -> None:
    long = [{**row, "text": row["text"] + " the" * (40 if i < 3 else 0)} for i, row in enumerate(rows(16))]
    _, ready = build(
        bert,
        splits(long, validation=rows(16, 2), test=rows(16, 3)),
        tmp_path,
        task=recipe(model={"max_length": 32}),
    )
    assert [note for note in ready.notes if "truncated" in note] == [
        "train: 3 of 16 inputs are longer than 32 tokens and were truncated (model.max_length)"
    ]

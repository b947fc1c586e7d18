"""The task family: labels of every kind, imbalance, and what a user gets at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from ptft_hf.errors import DataError, RecipeError
from ptft_hf.tasks.labels import MULTI, REGRESSION, SINGLE
from ptft_hf.tasks.sequence_classification import SequenceClassification
from tests.runs import recipe
from tests.tiny import make_tokenizer


def look(
    labels: Sequence[Any], *, held: Sequence[Any] | None = None, **fields: Any
) -> SequenceClassification:
    """A task that has seen these training labels; ``held`` are the validation set's."""
    task = SequenceClassification(recipe(**fields))
    names = {"train": labels, "validation": held if held is not None else labels, "test": labels}
    given = {
        name: datasets.Dataset.from_dict(
            {"text": [f"t{i}" for i in range(len(values))], "label": list(values)}
        )
        for name, values in names.items()
    }
    task.notes = task.look_at(type("Splits", (), given))
    return task


# --- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected", "problem_type"),
    [
        (["b", "a", "C", "b"], ["C", "a", "b"], SINGLE),  # by code point, as Python sorts
        ([10, 2, 2, -1], ["-1", "2", "10"], SINGLE),  # by number, not "10" < "2"
        ([True, False], ["False", "True"], SINGLE),
        ([["b"], ["a", "b"], []], ["a", "b"], MULTI),
        ([[10], [2, 10], []], ["2", "10"], MULTI),
        ([1.5, 2.0, 1.0], [], REGRESSION),
    ],
)
def test_labels_are_sorted_and_the_problem_type_is_inferred(
    labels: list[Any], expected: list[str], problem_type: str
) -> None:
    task = look(labels)
    assert (task.labels, task.problem_type) == (expected, problem_type)
    config = task.config()
    assert config["problem_type"] == problem_type
    assert config["num_labels"] == (len(expected) or 1)
    if expected:
        assert config["id2label"] == dict(enumerate(expected))
        assert config["label2id"] == {label: i for i, label in enumerate(expected)}


def test_integers_are_numbers_if_the_recipe_says_so() -> None:
    task = look([1, 2, 5], problem_type=REGRESSION)
    assert task.config() == {"num_labels": 1, "problem_type": REGRESSION}
    assert task.notes == ["regression: training targets from 1 to 5"]
    assert (task.best_metric, look(["a", "b"]).best_metric) == ("pearson", "macro_f1")


def test_labels_and_their_counts_are_said() -> None:
    assert look(["a"] * 3 + ["b"]).notes == ["2 labels in 4 training rows: a 3 (75%), b 1 (25%)"]
    many = look([str(i) for i in range(10) for _ in range(10 - i)])
    assert many.notes[0].endswith("6 4 (7%), 7 3 (5%), and 2 more down to 9 1")


@pytest.mark.parametrize(
    ("labels", "fields", "held", "expected"),
    [
        (
            ["a", "b"],
            {},
            ["a", "c", "c"],
            "validation: label 'c' (2 rows) is not in the training split, so no model could learn it",
        ),
        ([["a"], ["b"]], {}, [["a", "c"]], "validation: label 'c' (1 rows) is not in the training split"),
        (["a", "a"], {}, None, "train has only one class, ['a']: there is nothing to learn"),
        ([[], []], {"problem_type": MULTI}, None, "train has only one class, []: there is nothing to learn"),
        ([0.5, 0.5], {}, None, "every training row has the same label 0.5"),
        (["1", "2"], {"problem_type": REGRESSION}, None, "labels such as '1' (str) do not fit regression"),
        (
            ["a", "b"],
            {"problem_type": MULTI},
            None,
            "do not fit multi_label_classification, which needs lists",
        ),
        ([1.5, 2.5], {"problem_type": SINGLE}, None, "(float) do not fit single_label_classification"),
    ],
)
def test_labels_that_cannot_be_learnt_are_an_error(
    labels: list[Any], fields: dict[str, Any], held: list[Any] | None, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        look(labels, held=held, **fields)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "fields", "expected"),
    [
        ([0.5, 1.5], {"class_weights": "balanced"}, "class_weights: regression has no classes"),
        ([0.5, 1.5], {"loss": "focal"}, "'focal' needs classes, but this is regression"),
        ([["a"], ["b"]], {"oversample": True}, "oversample: needs one class a row"),
        ([["a"], ["b"]], {"calibrate": True}, "calibrate: is for single-label"),
        (["a", "b"], {"tune_thresholds": True}, "tune_thresholds: is for multi-label"),
        (["a", "b"], {"class_weights": {"a": 1, "c": 1}}, "class_weights: no label 'c'; the labels are"),
        (["a", "b"], {"class_weights": {"a": 1, "c": 1}}, "class_weights: label 'b' has none"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_an_error(
    labels: list[Any], fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        look(labels, **fields)
    assert expected in str(caught.value)


# --- imbalance --------------------------------------------------------------------------------------------


def weights_of(task: SequenceClassification) -> list[float]:
    assert task.weights is not None
    return pytest.approx(task.weights.tolist())


def test_balanced_weights_by_hand() -> None:
    # 8 rows / (2 classes x 6 rows) and 8 / (2 x 2); each class then weighs 4 in sum.
    assert weights_of(look(["a"] * 6 + ["b"] * 2, class_weights="balanced")) == [2 / 3, 2.0]
    # Multi-label: rows without the label per row with it: a is in 3 of 4, b in 1 of 4; twice in one is once.
    several = look([["a"], ["a", "b"], ["a", "a"], []], class_weights="balanced")
    assert weights_of(several) == [1 / 3, 3.0]


def test_a_label_of_every_row_keeps_a_weight() -> None:
    # c is in all 4 rows; a weight of 0 / 4 would leave it untrained.
    assert weights_of(look([["c"], ["c"], ["c"], ["b", "c"]], class_weights="balanced")) == [3.0, 1 / 4]


def test_given_weights_are_by_label() -> None:
    assert weights_of(look([2, 10, 2], class_weights={"10": 7.0, "2": 0.5})) == [0.5, 7.0]
    assert look(["a", "b"]).weights is None


def test_oversampling_gives_each_class_the_same_chance() -> None:
    task = look(["a", "b"], oversample=True)
    assert task.sampling_weights({"labels": [0, 0, 0, 1]}) == [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert look(["a", "b"]).sampling_weights({"labels": [0, 1]}) is None


# --- rows to batches --------------------------------------------------------------------------------------


def encode(task: SequenceClassification, table: list[dict[str, Any]], longest: int = 64) -> tuple[Any, int]:
    return task.encode(datasets.Dataset.from_list(table), make_tokenizer("bert"), longest)


def test_labels_are_encoded_as_the_losses_want_them() -> None:
    single, _ = encode(look([10, 2]), [{"text": "a", "label": 10}, {"text": "b", "label": 2}])
    assert single["labels"] == [1, 0]
    multi, _ = encode(look([["a"], ["b"]]), [{"text": "x", "label": ["b"]}, {"text": "y", "label": []}])
    assert multi["labels"] == [[0.0, 1.0], [0.0, 0.0]]
    number, _ = encode(look([1, 2], problem_type=REGRESSION), [{"text": "x", "label": 3}])
    assert number["labels"] == [3.0]
    unlabelled, _ = encode(look(["a", "b"]), [{"text": "x"}])
    assert "labels" not in unlabelled.column_names
    collate = single_collator()
    assert collate(single.to_list())["labels"].dtype == torch.int64
    assert collate(multi.to_list())["labels"].dtype == torch.float32
    assert collate(number.to_list())["labels"].dtype == torch.float32


def single_collator() -> Any:
    return look(["a", "b"]).collator(make_tokenizer("bert"))


def test_truncated_rows_are_counted() -> None:
    # "the" is one token; two marks stand around a text. Of 4, 5 and 6 tokens only the last is over 5.
    table = [{"text": " ".join(["the"] * n), "label": "a"} for n in (2, 3, 4)]
    encoded, cut = encode(look(["a", "b"]), table, 5)
    assert (encoded["length"], cut) == ([4, 5, 5], 1)
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 5, 5]


def test_a_pair_is_one_input_of_two_segments() -> None:
    encoded, _ = encode(look(["a", "b"]), [{"text": "the film", "text_pair": "a plot", "label": "a"}])
    # <s> the film </s> a plot </s>
    assert encoded["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 1]]
    with_longer, cut = encode(look(["a", "b"]), [{"text": "the", "text_pair": "a " * 30, "label": "a"}], 10)
    assert (with_longer["length"], cut) == ([10], 1)


def test_a_batch_is_padded_to_its_own_longest_row() -> None:
    encoded, _ = encode(look(["a", "b"]), [{"text": "the " * n, "label": "a"} for n in (1, 5, 20)])
    table = encoded.to_list()
    assert single_collator()(table[:2])["input_ids"].shape == (2, 7)
    batch = single_collator()(table)
    assert batch["input_ids"].shape == (3, 22)
    assert batch["attention_mask"].sum(-1).tolist() == [3, 7, 22]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


# --- after the model --------------------------------------------------------------------------------------


def test_predictions_by_hand() -> None:
    task = look(["a", "b"])
    (found,) = task.predictions(np.array([[np.log(3), 0.0]], dtype=np.float32))
    assert found["label"] == "a"
    assert found["scores"] == pytest.approx({"a": 0.75, "b": 0.25})
    task.temperature = 2.0  # logits halved: sqrt(3) to 1
    (found,) = task.predictions(np.array([[np.log(3), 0.0]], dtype=np.float32))
    assert found["scores"]["a"] == pytest.approx(np.sqrt(3) / (1 + np.sqrt(3)))
    multi = look([["a"], ["b"]])
    (found,) = multi.predictions(np.array([[np.log(3), 0.0]]))
    assert found == {"label": ["a", "b"], "scores": pytest.approx({"a": 0.75, "b": 0.5})}
    multi.thresholds = [0.8, 0.5]
    assert multi.predictions(np.array([[np.log(3), 0.0], [-9.0, -9.0]]))[0]["label"] == ["b"]
    assert multi.predictions(np.array([[-9.0, -9.0]]))[0]["label"] == []
    assert look([0.5, 1.5]).predictions(np.array([[2.5]])) == [{"label": 2.5}]


def test_thresholds_are_chosen_on_validation_and_used_afterwards() -> None:
    task = look([["a"], ["b"]], tune_thresholds=True)
    # Both labels are told apart perfectly, but a's logits are all below 0, where the threshold 0.5 is.
    logits = np.array([[-1.0, 3.0], [-1.5, -3.0], [-4.0, 2.0], [-5.0, -2.0]], dtype=np.float32)
    labels = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    before = task.metrics(logits, labels)
    (note,) = task.after_training(logits, labels)
    assert note.startswith("thresholds chosen on the validation set: a 0.")
    after = task.metrics(logits, labels)
    # Before, a is never found: its F1 is 0 and b's is 1.
    assert (before["macro_f1"], after["macro_f1"]) == (0.5, 1.0)
    assert [p["label"] for p in task.predictions(logits)] == [["a", "b"], ["a"], ["b"], []]


def test_calibration_lowers_overconfidence_and_changes_no_label() -> None:
    task = look(["a", "b"], calibrate=True)
    # Always sure (0.9999), but right in 3 of 4 rows: the best confidence is 3/4, so T = 9.2 / log 3 = 8.4.
    logits = np.array([[9.2, 0.0]] * 4, dtype=np.float32)
    labels = np.array([0, 0, 0, 1])
    before = task.predictions(logits)
    (note,) = task.after_training(logits, labels)
    assert task.temperature == pytest.approx(9.2 / np.log(3), rel=1e-3)
    assert note == "temperature 8.374 chosen on the validation set (calibration error 0.250 -> 0.000)"
    after = task.predictions(logits)
    assert [p["label"] for p in after] == [p["label"] for p in before]
    assert after[0]["scores"]["a"] == pytest.approx(0.75, abs=1e-3)
    assert look(["a", "b"]).after_training(logits, labels) == []


def test_state_brings_back_the_whole_task() -> None:
    task = look([["a"], ["b"]], tune_thresholds=True)
    task.thresholds = [0.25, 0.75]
    again = SequenceClassification(task.recipe)
    again.restore(task.state())
    logits = np.array([[-0.5, 0.5]])
    assert again.predictions(logits) == task.predictions(logits)
    assert again.config() == task.config()

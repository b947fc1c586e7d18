"""The family of named entities without a run: what it reads, refuses, trains and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ptft_hf import tasks
from ptft_hf.data import Splits
from ptft_hf.errors import DataError, ModelError, RecipeError
from ptft_hf.recipes import TokenClassificationRecipe
from ptft_hf.tasks import annotated
from ptft_hf.tasks.alignment import FINE, joined, split
from ptft_hf.tasks.annotated import Moved
from tests.tiny import make_tokenizer

WORDS = ["Ann", "Lee", "met", "Bob", "in", "Rome"]
TAGS = ["B-P", "I-P", "O", "B-P", "O", "B-K"]
ROW = {"tokens": WORDS, "tags": TAGS}
TEXT = {
    "text": "Ann Lee met Bob in Rome.",
    "spans": [
        {"start": 0, "end": 7, "label": "P"},
        {"start": 12, "end": 15, "label": "P"},
        {"start": 19, "end": 23, "label": "K"},
    ],
}
OF_TAGS = ["O", "B-K", "I-K", "B-P", "I-P"]


def recipe(**fields: Any) -> TokenClassificationRecipe:
    return TokenClassificationRecipe(name="test", family="token_classification", **fields)


def three(train: Sequence[Mapping[str, Any]], **others: Sequence[Mapping[str, Any]]) -> datasets.DatasetDict:
    given = {name: list(others.get(name, train)) for name in ("validation", "test")}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in {"train": list(train), **given}.items()}
    )


def look(
    train: Sequence[Mapping[str, Any]], fields: Any = None, **others: Any
) -> tuple[Any, list[str], Splits]:
    task = tasks.build(recipe(**(fields or {})))
    splits = tasks.load_splits(task, three(train, **others), task.recipe, 0)
    return task, task.look_at(splits), splits


def problems(train: Sequence[Mapping[str, Any]], **others: Any) -> tuple[str, ...]:
    with pytest.raises((DataError, RecipeError)) as caught:
        look(train, **others)
    return caught.value.problems


# --- what is read -----------------------------------------------------------------------------------------


def test_words_with_tags_and_texts_with_spans_are_the_same_entities() -> None:
    for rows in ([ROW], [TEXT]):
        task, notes, splits = look(rows)
        assert task.labels == ["K", "P"]
        assert task.config()["id2label"] == dict(enumerate(OF_TAGS))
        encoded, _ = task.encode(splits.train, make_tokenizer("bert"), 64)
        (reading,) = task.targets(encoded).rows.values()
        assert [OF_TAGS[i] for i in reading.tags][:6] == TAGS
        assert [reading.words.text[a:b] for a, b in reading.words.spans][:6] == WORDS
        assert notes[-1] == "2 types, 3 entities in 1 training rows: P 2 (67%), K 1 (33%)"


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (TAGS, "tags: IOB2"),
        (["I-P", "I-P", "O", "I-P", "O", "I-K"], "tags: I- only, read as IOB2 (B- begins, I- continues)"),
        (["B-P", "E-P", "O", "S-P", "O", "S-K"], "tags: BIOES, read as IOB2 (B- begins, I- continues)"),
        (["P", "P", "O", "P", "O", "K"], "tags: types only, read as IOB2 (B- begins, I- continues)"),
    ],
)
def test_every_scheme_is_read_and_said_aloud(tags: list[str], said: str) -> None:
    task, notes, splits = look([{"tokens": WORDS, "tags": tags}])
    assert said in notes
    encoded, _ = task.encode(splits.test, make_tokenizer("bert"), 64)
    assert [OF_TAGS[i] for i in encoded["tags"][0]] == TAGS


def test_numbers_with_names_are_tags() -> None:
    names = ["O", "B-P", "I-P", "B-K"]
    numbers = {"tokens": WORDS, "tags": [names.index(tag) for tag in TAGS]}
    labels = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    table = datasets.Dataset.from_list([numbers], features=labels)
    task = tasks.build(recipe())
    both = datasets.DatasetDict(train=table, validation=table, test=table)
    assert tasks.load_splits(task, both, task.recipe, 0).train["tags"][0] == TAGS
    task, _, splits = look([numbers], {"tag_names": names})
    assert task._read(splits.train[0]).tags == TAGS


def test_broken_sequences_are_counted_for_each_split() -> None:
    broken = {"tokens": ["x", "y", "z"], "tags": ["I-P", "O", "I-K"]}
    _, notes, _ = look([ROW, broken, ROW], validation=[ROW])
    assert [note for note in notes if "break" in note] == [
        f"{name}: 2 tags in 1 rows break IOB2; an entity is taken to begin where its type does"
        for name in ("train", "test")
    ]


def test_spans_that_words_cannot_hold_are_counted() -> None:
    text = "Müllerstraße 12, Berlin-Mitte"
    found = [(0, 6, "P"), (0, 12, "S"), (17, 23, "C"), (13, 15, "N")]  # the first one lies in the second
    spans = [{"start": a, "end": b, "label": c} for a, b, c in found]
    tags, moved = annotated.tags_of_spans(split(text, FINE), spans)
    assert list(zip([text[a:b] for a, b in split(text, FINE).spans], tags, strict=True)) == [
        ("Müllerstraße", "B-S"), ("12", "B-N"), (",", "O"), ("Berlin", "B-C"), ("-", "O"), ("Mitte", "O"),
    ]  # fmt: skip
    assert moved == Moved(widened=0, dropped=1)
    inside = [{"start": 1, "end": 6, "label": "P"}, {"start": 13, "end": 16, "label": "N"}]
    assert annotated.tags_of_spans(split(text, FINE), inside)[1] == Moved(widened=1, dropped=0)
    _, notes, _ = look([{"text": text, "spans": [*spans, *inside[:1]]}])
    assert "train: 1 of 5 spans begin or end inside a word: taken to its borders" not in notes
    assert any("train: 2 of 5 spans share words with a longer one: left out" in note for note in notes)


def test_a_text_without_entities_is_a_row_like_any_other() -> None:
    task, _, splits = look([TEXT, {"text": "nothing here", "spans": []}])
    assert len(splits.train) == 2
    assert task._read(splits.train[1]).tags == ["O", "O"]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "tags": TAGS[:5]}, "there must be one tag a word (row 2: 6 tokens, 5 tags: ['Ann', 'Lee'"),
        ({"tokens": WORDS, "tags": ["P", *TAGS[1:]]}, "tags: tags of several schemes, some with a prefix"),
        ({"tokens": WORDS, "tags": ["", *TAGS[1:]]}, "tags: tags of several schemes"),
    ],
)
def test_broken_rows_are_named(row: dict[str, Any], message: str) -> None:
    (problem,) = problems([ROW, row], validation=[ROW], test=[ROW])
    assert message in problem


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ({"start": 3, "end": 3, "label": "P"}, "a span must lie in its text: 0 <= start < end <= length"),
        ({"start": 0, "end": 99, "label": "P"}, "of 24"),
        ({"start": 3, "end": 4, "label": "P"}, "nothing but white space"),
        ({"start": None, "end": 4, "label": "P"}, "needs start and end, as whole numbers"),
        ({"start": 0, "end": 4, "label": None}, "and label, as text"),
    ],
)
def test_broken_spans_are_named(span: dict[str, Any], message: str) -> None:
    (problem,) = problems([TEXT, {**TEXT, "spans": [span]}], validation=[TEXT], test=[TEXT])
    assert problem.startswith("train: ")
    assert "row 2: " in problem
    assert message in problem


def test_other_faults_of_the_data() -> None:
    numbers = {"tokens": WORDS, "tags": [0] * 6}
    assert "name them all under tag_names" in problems([numbers])[0]
    assert "tag_names has 1 names" in problems([{**numbers, "tags": [1] * 6}], fields={"tag_names": ["O"]})[0]
    assert problems([{"tokens": ["a"], "tags": ["O"]}]) == (
        "train has no entity at all: there is nothing to learn",
    )
    new = {"tokens": ["x"], "tags": ["B-NEW"]}
    assert problems([ROW], test=[new, ROW]) == (
        "test: type 'NEW' (1 entities) is not in the training split, so no model could learn it; add such rows to "
        "train or take them out",
    )
    many = problems([{**ROW, "tags": ["O"]}] * 9)
    assert "; and 6 more)" in many[0]
    assert "no column 'tokens'" in problems([{"words": WORDS, "tags": TAGS}])[0]
    assert "tokens must be lists of words" in problems([{"tokens": "Ann Lee", "tags": ["B-P", "I-P"]}])[0]


def test_class_weights_want_every_type_and_o() -> None:
    assert problems([ROW], fields={"class_weights": {"P": 2.0, "X": 1.0}}) == (
        "test: class_weights: no type 'X'; it needs a weight for each of ['O', 'K', 'P']",
        "test: class_weights: 'K' has none; it needs a weight for each of ['O', 'K', 'P']",
        "test: class_weights: 'O' has none; it needs a weight for each of ['O', 'K', 'P']",
    )


def test_the_same_text_in_two_splits_is_a_leak() -> None:
    other = {"tokens": ["ann", "LEE", "met", "Bob", "in", "Rome"], "tags": TAGS}
    task = tasks.build(recipe(leakage="error"))
    with pytest.raises(DataError, match="1 of 1 train rows stand in test too"):
        tasks.load_splits(task, three([ROW], test=[other], validation=[{**ROW, "tokens": list("abcdef")}]),
                          task.recipe, 0)  # fmt: skip


# --- rows to batches --------------------------------------------------------------------------------------


def encoded_by(task: Any, rows: list[dict[str, Any]], longest: int = 64) -> Any:
    return task.encode(datasets.Dataset.from_list(rows), make_tokenizer("bert"), longest)[0]


def test_labels_stand_at_the_first_sub_word_or_at_all() -> None:
    # <s> a ##n ##n | l ##e ##e | the | b ##o ##b </s>
    row = {"tokens": ["Ann", "Lee", "the", "Bob"], "tags": ["B-P", "I-P", "O", "B-P"]}
    first, _, _ = look([row])
    every, _, _ = look([row], {"label_all_subwords": True})
    b, i, _ = 1, 2, -100
    assert first.tags == ["O", "B-P", "I-P"]
    assert encoded_by(first, [row])["labels"] == [[_, b, _, _, i, _, _, 0, b, _, _, _]]
    assert encoded_by(every, [row])["labels"] == [[_, b, i, i, i, i, i, 0, b, i, i, _]]


def test_a_batch_is_padded_with_labels_that_do_not_count() -> None:
    task, _, _ = look([ROW])
    rows = encoded_by(
        task, [{"tokens": ["Ann"], "tags": ["B-P"]}, {"tokens": ["the"] * 6, "tags": ["O"] * 6}]
    )
    tokenizer = make_tokenizer("bert")
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = task.collator(tokenizer)(rows.to_list())
        for line, row in zip(zip(batch["labels"], batch["attention_mask"], strict=True), rows, strict=True):
            labels, mask = line
            assert labels[mask.bool()].tolist() == row["labels"]
            assert (labels[~mask.bool()] == -100).all()


def test_a_row_without_words_is_still_answered() -> None:
    task, _, _ = look([ROW])
    rows = encoded_by(task, [{"tokens": [], "tags": []}, {"tokens": ["", " "], "tags": ["O", "B-P"]}])
    (nothing, _, _), (_, tags, _) = task._answers(
        [np.eye(5, dtype=np.float32)[np.maximum(labels, 0)] for labels in rows["labels"][:]],
        task.targets(rows),
    )
    assert nothing.tags == []
    assert tags == ["O", "B-P"]


# --- losses -----------------------------------------------------------------------------------------------


def test_the_loss_counts_labelled_tokens_alone_with_their_weights() -> None:
    task, _, _ = look([ROW], {"class_weights": {"O": 1, "K": 3, "P": 2}})
    assert task.weights.tolist() == [1, 3, 3, 2, 2]
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=draw)
    labels = torch.tensor([[-100, 0, 4, -100], [1, 3, -100, -100]])
    assert task.loss_weight(labels).item() == 1 + 2 + 3 + 2
    expected = F.cross_entropy(logits.view(-1, 5), labels.view(-1), task.weights, ignore_index=-100)
    assert (task.loss(logits, labels) / task.loss_weight(labels)).item() == pytest.approx(expected.item())
    smooth = F.cross_entropy(logits.view(-1, 5), labels.view(-1), task.weights, label_smoothing=0.1)
    assert (task.loss(logits, labels, 0.1) / 8).item() == pytest.approx(smooth.item())


def test_focal_and_balanced_by_hand() -> None:
    task, _, _ = look([ROW], {"class_weights": "balanced", "loss": "focal"})
    # 6 words, 3 classes: 2 O, 3 P, 1 K.
    assert task.weights.tolist() == [1.0, 2.0, 2.0, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    even = torch.zeros(1, 2, 5)  # p = 1/5 for all
    loss = task.loss(even, torch.tensor([[1, -100]])).item()
    assert loss == pytest.approx(2.0 * 0.8**2 * math.log(5))
    assert not task.smooths_labels
    nothing = torch.full((1, 2), -100)
    assert task.loss(even, nothing).item() == task.loss_weight(nothing).item() == 0


# --- answers ----------------------------------------------------------------------------------------------


def test_predictions_by_hand() -> None:
    task, _, _ = look([ROW])
    row = task.input_row({"tokens": ["Ann", "Lee", "Rome"]}, ["tokens"])
    encoded = encoded_by(task, [row, task.input_row("Ann, Lee", ["tokens"])])
    words = encoded["words"][:]
    chosen = {0: {0: "I-P", 1: "I-P", 2: "B-K"}, 1: {0: "B-P", 1: "O", 2: "I-K"}}
    outputs = []
    for k, own in enumerate(words):
        logits = np.zeros((len(own), 5), dtype=np.float32)
        for i, word in enumerate(own):
            if word >= 0:
                logits[i, OF_TAGS.index(chosen[k][word])] = math.log(6 if word == 0 else 16)  # 6/10, 16/20
        outputs.append(logits)
    first, second = task.predictions(outputs, task.targets(encoded))
    assert first == {
        "text": "Ann Lee Rome",
        "entities": [
            {"text": "Ann Lee", "type": "P", "start": 0, "end": 7, "score": pytest.approx(0.7)},
            {"text": "Rome", "type": "K", "start": 8, "end": 12, "score": pytest.approx(0.8)},
        ],
    }
    assert [(e["text"], e["type"], e["start"]) for e in second["entities"]] == [
        ("Ann", "P", 0),
        ("Lee", "K", 5),
    ]
    assert task.same(first, {**first, "entities": [{**e, "score": 0.1} for e in first["entities"]]})
    assert not task.same(first, second)
    outputs[0][1, 0] = np.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        task.predictions(outputs, task.targets(encoded))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "5 is neither a text nor an object with the key 'text' or 'tokens'"),
        (
            {"body": "x"},
            r"'text', as text, or 'tokens', a list of words, must be given; the input has \['body'\]",
        ),
        ({"tokens": "Ann Lee"}, "'tokens' must be a list of words"),
        ({"tokens": ["a", 5]}, "'tokens' must be a list of words"),
        ("\ud83d", "half of a surrogate pair"),
    ],
)
def test_what_is_no_input_is_refused(value: Any, message: str) -> None:
    task, _, _ = look([ROW])
    with pytest.raises(DataError, match=message):
        task.input_row(value, ["tokens"])


def test_the_state_restores_the_task() -> None:
    task, _, _ = look([TEXT])
    again: Any = tasks.build(recipe())
    again.restore(task.state())
    assert (again.tags, again.pattern) == (OF_TAGS, FINE)
    assert again.unknown_labels(datasets.Dataset.from_list([{"tokens": ["x"], "tags": ["B-NEW"]}])) == ["NEW"]
    with pytest.raises(DataError, match="one tag a word"):
        again.unknown_labels(datasets.Dataset.from_list([{"tokens": ["x"], "tags": []}]))


def test_joined_words_stand_where_they_are_said_to() -> None:
    words = joined(["a", "", "b c", "d"])
    assert words.text == "a  b c d"
    assert [words.text[a:b] for a, b in words.spans] == ["a", "", "b c", "d"]

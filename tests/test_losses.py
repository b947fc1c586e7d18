"""Losses against hand-worked sums and plain PyTorch; and trap 1: the batch may be cut up as one likes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from ptft_hf.errors import RecipeError
from ptft_hf.tasks.labels import MULTI, REGRESSION, SINGLE
from ptft_hf.tasks.sequence_classification import SequenceClassification
from tests.conftest import rows
from tests.runs import NO_DROPOUT, bert_without_dropout, build, logged, recipe, splits

LOG_2 = math.log(2)


def a_task(problem_type: str, weights: list[float] | None = None, **fields: Any) -> SequenceClassification:
    task = SequenceClassification(recipe(**fields))
    task.problem_type = problem_type
    task.weights = None if weights is None else torch.tensor(weights)
    return task


def value(tensor: torch.Tensor) -> float:
    return pytest.approx(tensor.item(), abs=1e-5)


# --- by hand ----------------------------------------------------------------------------------------------

# softmax(log 3, 0) = (3/4, 1/4); softmax(0, 0) = (1/2, 1/2)
LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [math.log(3), 0.0]])
LABELS = torch.tensor([0, 1, 1])
TERMS = (math.log(4 / 3), math.log(2), math.log(4))


def test_cross_entropy_by_hand() -> None:
    task = a_task(SINGLE)
    assert value(task.loss(LOGITS, LABELS)) == sum(TERMS)
    assert value(task.loss_weight(LABELS)) == 3


def test_class_weights_by_hand() -> None:
    task = a_task(SINGLE, [1.0, 10.0])
    assert value(task.loss(LOGITS, LABELS)) == 1 * TERMS[0] + 10 * TERMS[1] + 10 * TERMS[2]
    assert value(task.loss_weight(LABELS)) == 1 + 10 + 10


def test_focal_loss_by_hand() -> None:
    # -(1 - p)**2 log p, with p of the true class 3/4, 1/2 and 1/4
    expected = (1 / 4) ** 2 * TERMS[0] + (1 / 2) ** 2 * TERMS[1] + (3 / 4) ** 2 * TERMS[2]
    assert value(a_task(SINGLE, loss="focal").loss(LOGITS, LABELS)) == expected
    weighted = a_task(SINGLE, [2.0, 3.0], loss="focal", focal_gamma=1.0)
    expected = 2 * (1 / 4) * TERMS[0] + 3 * (1 / 2) * TERMS[1] + 3 * (3 / 4) * TERMS[2]
    assert value(weighted.loss(LOGITS, LABELS)) == expected
    assert value(weighted.loss_weight(LABELS)) == 2 + 3 + 3


def test_label_smoothing_by_hand() -> None:
    # 0.2 of the weight goes to both classes alike: targets (0.9, 0.1), (0.1, 0.9), (0.1, 0.9)
    a, b = math.log(4 / 3), math.log(4)
    expected = (0.9 * a + 0.1 * b) + LOG_2 + (0.1 * a + 0.9 * b)
    assert value(a_task(SINGLE).loss(LOGITS, LABELS, 0.2)) == expected


def test_multi_label_by_hand() -> None:
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2; a label costs -log p, its absence -log(1 - p)
    logits, labels = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    task = a_task(MULTI)
    assert value(task.loss(logits, labels)) == math.log(4 / 3) + LOG_2 + math.log(4) + LOG_2
    assert value(task.loss_weight(labels)) == 4
    weighted = a_task(MULTI, [5.0, 7.0])  # weights of the labels that are there
    assert value(weighted.loss(logits, labels)) == 5 * math.log(4 / 3) + LOG_2 + math.log(4) + 7 * LOG_2
    # 0.2 moves to one half: targets 0.9 and 0.1
    smooth = math.log(4 / 3) + math.log(4) + 2 * LOG_2  # 0.9 a + 0.1 b + 0.1 a + 0.9 b = a + b
    assert value(task.loss(logits, labels, 0.2)) == smooth
    focal = a_task(MULTI, loss="focal")
    expected = (1 / 16) * math.log(4 / 3) + LOG_2 / 4 + (9 / 16) * math.log(4) + LOG_2 / 4
    assert value(focal.loss(logits, labels)) == expected


def test_regression_by_hand() -> None:
    # (1 - 3)**2 + (0.5 - 0)**2 + (-100 - -100)**2; -100.0 is a number here, not a mark for "no label"
    logits, labels = torch.tensor([[1.0], [0.5], [-100.0]]), torch.tensor([3.0, 0.0, -100.0])
    task = a_task(REGRESSION)
    assert value(task.loss(logits, labels)) == 4.25
    assert value(task.loss_weight(labels)) == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 4.0]])
def test_losses_are_plain_pytorchs(weights: list[float] | None, smoothing: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 4, generator=draw), torch.randint(4, (9,), generator=draw)
    given = None if weights is None else torch.tensor(weights)
    task = a_task(SINGLE, weights)
    expected = F.cross_entropy(logits, labels, given, label_smoothing=smoothing).item()
    assert value(task.loss(logits, labels, smoothing) / task.loss_weight(labels)) == expected
    hot = F.one_hot(labels, 4).float()
    expected = F.binary_cross_entropy_with_logits(logits, hot, pos_weight=given).item()
    task = a_task(MULTI, weights)
    assert value(task.loss(logits, hot) / task.loss_weight(hot)) == expected


def test_focal_loss_with_gamma_0_is_cross_entropy() -> None:
    task = a_task(SINGLE, [1.0, 3.0], loss="focal", focal_gamma=0.0)
    assert value(task.loss(LOGITS, LABELS)) == a_task(SINGLE, [1.0, 3.0]).loss(LOGITS, LABELS).item()


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1000, 2, dtype=torch.bfloat16)
    total = a_task(SINGLE).loss(logits, torch.zeros(1000, dtype=torch.long))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1000 * LOG_2, rel=1e-6)  # in bfloat16 it would be 692 or 696


def test_the_loss_of_no_rows_is_zero() -> None:
    for task, width, labels in (
        (a_task(SINGLE, [1.0, 2.0]), 2, torch.zeros(0, dtype=torch.long)),
        (a_task(SINGLE, loss="focal"), 2, torch.zeros(0, dtype=torch.long)),
        (a_task(MULTI), 2, torch.zeros(0, 2)),
        (a_task(REGRESSION), 1, torch.zeros(0)),
    ):
        logits = torch.zeros(0, width, requires_grad=True)
        task.loss(logits, labels).backward()
        assert task.loss(logits, labels).item() == 0 == task.loss_weight(labels).item()


# --- trap 1: gradient accumulation ------------------------------------------------------------------------

# The first rows have the rare class, so that micro-batches differ in the sum of their weights.
ROWS = sorted(rows(16, labels=("neg", "neg", "neg", "pos")), key=lambda row: row["label"], reverse=True)
LABEL_SETS = [["a"], ["a", "b"], [], ["b", "c"]]
CASES: dict[str, tuple[dict[str, Any], list[Any] | None, dict[str, Any]]] = {
    "single-label": ({}, None, {}),
    "class weights": ({"class_weights": {"neg": 1.0, "pos": 20.0}}, None, {}),
    "focal": ({"loss": "focal", "class_weights": "balanced"}, None, {}),
    "label smoothing": ({"class_weights": {"neg": 1.0, "pos": 20.0}}, None, {"label_smoothing_factor": 0.3}),
    "multi-label": ({"class_weights": "balanced"}, LABEL_SETS * 4, {}),
    "multi-label smoothing": ({}, LABEL_SETS * 4, {"label_smoothing_factor": 0.3}),
    "regression": ({}, [0.25 * i - 2.0 for i in range(15)] + [-7.0], {}),
}
ONE_STEP = {
    "train_sampling_strategy": "sequential",
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_grad_norm": 1e9,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_without_dropout(tmp_path_factory.mktemp("bert"))


def one_step(bert: Path, folder: Path, case: str, size: int, steps: int) -> tuple[Any, Any]:
    fields, labels, settings = CASES[case]
    given = [{**row, "label": label} for row, label in zip(ROWS, labels or [], strict=False)] or ROWS
    return build(
        bert,
        splits(given),
        folder / f"{size}x{steps}",
        task=recipe(**fields),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        **{**ONE_STEP, **settings},
    )


def plain_step(ready: Any, case: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same step in plain PyTorch: one batch, the mean loss as PyTorch defines it."""
    smoothing = CASES[case][2].get("label_smoothing_factor", 0.0)
    weights = ready.task.weights
    if case == "regression":
        return F.mse_loss(logits[:, 0], labels)
    if case.startswith("multi-label"):
        targets = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    if case == "focal":
        p = logits.softmax(-1)[torch.arange(len(labels)), labels]
        return (-((1 - p) ** 2) * p.log() * weights[labels]).sum() / weights[labels].sum()
    return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)


@pytest.mark.parametrize("case", CASES)
def test_ours_gives_the_same_step_however_the_batch_is_cut(case: str, bert: Path, tmp_path: Path) -> None:
    trainer, ready = one_step(bert, tmp_path, case, 16, 1)
    batch = ready.task.collator(ready.tokenizer)(ready.encoded["train"].to_list())
    labels = batch.pop("labels")
    loss = plain_step(ready, case, ready.model(**batch).logits, labels)
    gradients = torch.autograd.grad(loss, [p for p in ready.model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()

    trainer.train()
    assert logged(trainer) == [pytest.approx(loss.item(), abs=1e-5)]
    assert logged(trainer, "grad_norm") == [pytest.approx(norm, rel=1e-5)]
    for size, steps in ((4, 4), (5, 4)):  # 5 + 5 + 5 + 1 rows: micro-batches of unequal size
        cut, _ = one_step(bert, tmp_path, case, size, steps)
        cut.train()
        assert logged(cut) == [pytest.approx(loss.item(), abs=1e-5)], (size, steps)
        assert logged(cut, "grad_norm") == [pytest.approx(norm, rel=1e-5)], (size, steps)


def test_the_cases_do_have_micro_batches_of_unequal_weight(bert: Path, tmp_path: Path) -> None:
    _, ready = one_step(bert, tmp_path, "class weights", 4, 4)
    labels = torch.tensor(ready.encoded["train"]["labels"])
    assert [ready.task.loss_weight(part).item() for part in labels.split(4)] == [80.0, 4.0, 4.0, 4.0]


def test_upstream_multiplies_the_step_by_the_accumulation_steps(bert: Path, tmp_path: Path) -> None:
    found = {}
    for size, steps in ((16, 1), (4, 4)):
        ours, ready = one_step(bert, tmp_path, "single-label", size, steps)
        upstream = transformers.Trainer(
            model=ready.model,
            args=ours.args,
            train_dataset=ready.encoded["train"].remove_columns("length"),
            data_collator=ready.task.collator(ready.tokenizer),
        )
        upstream.train()
        found[size] = (logged(upstream)[0], logged(upstream, "grad_norm")[0])
    assert found[4][0] == pytest.approx(4 * found[16][0], rel=1e-5)
    assert found[4][1] == pytest.approx(4 * found[16][1], rel=1e-4)


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["class weights", "label smoothing", "multi-label", "regression"])
def test_the_evaluation_loss_is_the_mean_over_all_rows_for_any_batch_size(
    case: str, bert: Path, tmp_path: Path
) -> None:
    trainer, ready = one_step(bert, tmp_path, case, 16, 1)
    rows_ = ready.encoded["validation"].to_list()
    batch = ready.task.collator(ready.tokenizer)(rows_)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = ready.model.eval()(**batch).logits
    expected = (ready.task.loss(logits, labels) / ready.task.loss_weight(labels)).item()  # and not smoothed
    for size in (16, 3):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


# --- what would silently do nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "labels"), [({"loss": "focal"}, None), ({}, [0.5, 1.5] * 8)])
def test_label_smoothing_is_refused_where_the_loss_has_none(
    fields: dict[str, Any], labels: list[float] | None, bert: Path, tmp_path: Path
) -> None:
    given = [{**row, "label": label} for row, label in zip(ROWS, labels or [], strict=False)] or ROWS
    with pytest.raises(RecipeError, match=r"label_smoothing_factor: has no effect on the loss of test"):
        build(bert, splits(given), tmp_path / "run", task=recipe(**fields), label_smoothing_factor=0.1)
    assert not (tmp_path / "run").exists()


def test_the_models_of_these_tests_have_no_dropout(bert: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(bert)
    assert {name: getattr(config, name) for name in NO_DROPOUT} == NO_DROPOUT

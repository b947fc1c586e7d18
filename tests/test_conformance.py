"""A stretch of the matrix, another one each day, against what is recorded of it."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import record
from tests.conformance.matrix import ARCHITECTURES, FAMILIES, METHODS, Cell, cells
from tests.conformance.running import Watch, run_cell

# PEFT asks a transformers model for an attribute that was renamed, and warns of norms that it wraps as named.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SAMPLE = 16
DAY = int(os.environ.get("PTFT_CONFORMANCE_DAY") or datetime.datetime.now(datetime.UTC).date().toordinal())
"""Set it to run another day's stretch again."""


def stretch(day: int) -> list[Cell]:
    return [cells()[(day * SAMPLE + i) % len(cells())] for i in range(SAMPLE)]


@pytest.mark.parametrize("cell", stretch(DAY), ids=lambda cell: cell.name)
def test_a_cell_is_as_recorded(cell: Cell, tmp_path: Path) -> None:
    found, known = run_cell(cell, tmp_path), record.read().get(cell.name)
    assert found["status"] != "failed", f"day {DAY}: {found['problems']}"
    if known is not None:
        assert found["status"] == known["status"], f"day {DAY}: {found}"


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(ARCHITECTURES) >= 25
    assert len(FAMILIES) == 5
    assert len(METHODS) >= 14
    assert len(cells()) == len(set(cells())) >= 800


def test_every_cell_comes_up_within_the_year() -> None:
    assert {cell for day in range(365) for cell in stretch(day)} == {*cells()}


def test_what_is_recorded_has_not_failed_and_is_what_the_table_shows() -> None:
    known = record.read()
    assert not [name for name, found in known.items() if found["status"] == "failed"]
    assert {*known} <= {cell.name for cell in cells()}
    assert record.TABLE.read_text("utf-8") == record.table(known)


# ---- a cell that is wrong is found out ----


def refused(*_: Any, **__: Any) -> Any:
    from ptft_hf.errors import AdapterError

    raise AdapterError("cannot be had")


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ptft_hf import inference
    from ptft_hf.adapters import peft_models

    cell = Cell("bert", "sequence_classification", "lora/r8_attention")
    load, merge = inference.load_weights, peft_models.merge

    def other_weights(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
        return model

    def not_merged(wrapped: Any) -> Any:
        return wrapped.unload()

    for name, change, problem in (
        ("ptft_hf.inference.load_weights", other_weights, "differ"),
        ("ptft_hf.adapters.peft_models.merge", not_merged, "merged, its logits are"),
        ("ptft_hf.adapters.peft_models.unload", merge, "unloaded, its weights are others"),
        ("ptft_hf.training.checkpoints.prove", refused, "cannot be had"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, change)
            found = run_cell(cell, tmp_path / name)
        assert found["status"] == "failed", name
        assert problem in json.dumps(found["problems"]), found
    assert run_cell(cell, tmp_path)["status"] == "passed"


def test_gradients_are_watched() -> None:
    import torch

    layers = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 1, bias=False) for name in ("a", "b", "frozen", "still")}
    )
    for name in ("frozen", "still"):
        layers[name].requires_grad_(False)
    watch, inputs = Watch(), torch.ones(1, 2)
    watch.on_train_begin(None, None, None, model=layers)
    layers["a"](inputs).backward()
    layers["frozen"].weight.grad = torch.ones(1, 2)
    watch.on_pre_optimizer_step(None, None, None, model=layers)
    with torch.no_grad():
        layers["frozen"].weight += 1
    watch.on_train_end(None, None, None, model=layers)
    assert watch.seen == {"a.weight": True, "b.weight": False}
    assert watch.strays == {"frozen.weight"}
    assert watch.changed == ["frozen.weight"]

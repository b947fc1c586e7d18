"""What the tests of ptft_hf.data share: short calls, and small data sets on disk or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from ptft_hf import data
from ptft_hf.errors import DataError
from ptft_hf.recipes import DataSource

ROWS = [{"text": f"text number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(40)]
SPLITS = ("train", "validation", "test")


def load(source: Any, **options: Any) -> data.Splits:
    return data.load_splits(source, **{"columns": {}, "required": ["text", "label"], "seed": 0, **options})


def problems_of(source: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load(source, **options)
    return caught.value.problems


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def split_files(folder: Path, **splits: Iterable[Any]) -> DataSource:
    names = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in splits.items()}
    return DataSource(path="json", data_files=names)


def three(**splits: list[dict[str, Any]]) -> datasets.DatasetDict:
    """A DatasetDict of small splits; those not given hold two rows of their own."""
    other = {name: [{"text": f"{name} {i}", "label": "ab"[i]} for i in (0, 1)] for name in SPLITS}
    return datasets.DatasetDict({n: datasets.Dataset.from_list(rows) for n, rows in (other | splits).items()})

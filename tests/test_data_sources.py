"""Every kind of source gives the same rows; broken and missing ones are refused with file and line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from ptft_hf.data import files, sources
from ptft_hf.data.sources import quiet
from ptft_hf.recipes import DataSource
from tests.data_builders import ROWS, SPLITS, load, problems_of, split_files, three, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet and compressed files pass through the cache of `datasets`: keep it out of the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")


def _write(folder: Path, ending: str) -> str:
    path = folder / f"rows{ending}"
    table = datasets.Dataset.from_list(ROWS)
    if ending in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif ending == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif ending == ".parquet":
        table.to_parquet(str(path))
    elif ending == "":
        table.save_to_disk(str(path))
    elif ending == ".jsonl.gz":
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    else:
        write_jsonl(path, ROWS)
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".jsonl.gz", ""])
def test_a_bare_path_of_any_kind_is_read(
    ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with quiet():
        path = _write(tmp_path, ending)
    capfd.readouterr()
    splits = load(path)
    rows = [row for name in SPLITS for row in getattr(splits, name).to_list()]
    assert sorted(rows, key=str) == sorted(ROWS, key=str)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("builder", ["json", "csv", "parquet"])
def test_a_builder_with_data_files(builder: str, tmp_path: Path) -> None:
    with quiet():
        path = _write(tmp_path, f".{builder}")
    source = DataSource(path=builder, data_files={"train": path, "dev": [path], "test": path})
    splits = load(source)
    assert [getattr(splits, name).to_list() for name in SPLITS] == [ROWS, ROWS, ROWS]
    assert splits.notes == []


def test_a_folder_of_split_files(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS), ("dev", ROWS[:6]), ("test", ROWS[6:10])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    splits = load(str(tmp_path))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [40, 6, 4]


def test_a_saved_dataset_dict_and_one_in_memory(tmp_path: Path) -> None:
    given = three()
    with quiet():
        given.save_to_disk(str(tmp_path / "saved"))
    from_disk, in_memory = load(str(tmp_path / "saved")), load(given)
    assert from_disk.test.to_list() == in_memory.test.to_list() == given["test"].to_list()


def test_globs_are_expanded_in_order(tmp_path: Path) -> None:
    for i in (1, 0):
        write_jsonl(tmp_path / f"part{i}.jsonl", ROWS[i * 20 : i * 20 + 20])
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "dev.jsonl", ROWS[:2])
    held_out = {"validation": str(tmp_path / "dev.jsonl"), "test": str(tmp_path / "test.jsonl")}
    source = DataSource(path="json", data_files={"train": str(tmp_path / "part*.jsonl"), **held_out})
    assert load(source).train.to_list() == ROWS


def test_columns_are_renamed_even_if_swapped_and_the_rest_is_dropped() -> None:
    rows = [{"text": "ab"[i % 2], "label": f"text {i}", "id": i} for i in range(20)]
    splits = load(datasets.Dataset.from_list(rows), columns={"text": "label", "label": "text"})
    assert splits.train.column_names == ["text", "label"]
    assert {row["text"] for row in splits.train} <= {row["label"] for row in rows}


def test_splits_can_be_named_sliced_and_joined() -> None:
    names = ("train", "validation_matched", "validation_mismatched", "test")
    given = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS[:10]) for name in names})
    chosen, notes = sources.choose(
        {name: sources.Raw("memory", table) for name, table in given.items()},
        {
            "train": "train[:4]",
            "validation": "validation_matched[:2]+validation_mismatched[8:]",
            "test": "test[-3:]",
        },
    )
    texts = {name: [row["text"] for row in raw.data] for name, raw in chosen.items()}
    assert texts == {
        "train": [f"text number {i}" for i in range(4)],
        "validation": [f"text number {i}" for i in (0, 1, 8, 9)],
        "test": [f"text number {i}" for i in (7, 8, 9)],
    }
    assert notes == []


def test_a_split_that_serves_as_test_is_not_validation_too(tmp_path: Path) -> None:
    source = split_files(tmp_path, train=ROWS, validation=ROWS[:7])
    splits = load(DataSource(path="json", data_files=source.data_files, splits={"test": "validation"}))
    assert len(splits.test) == 7
    assert len(splits.train) + len(splits.validation) == 40
    assert any("there is no validation split" in note for note in splits.notes)


def test_unknown_splits_are_refused_and_unused_ones_named(tmp_path: Path) -> None:
    source = split_files(tmp_path, train=ROWS, unsupervised=ROWS[:3])
    assert "splits not used: unsupervised" in load(source).notes
    wrong = DataSource(
        path="json", data_files=source.data_files, splits={"test": "tset", "validation": "train[:"}
    )
    problems = problems_of(wrong)
    assert len(problems) == 2
    assert all("there are train, unsupervised" in problem for problem in problems)
    (problem,) = problems_of(
        datasets.DatasetDict({n: datasets.Dataset.from_list(ROWS) for n in ("test", "dev")})
    )
    assert "no split 'train'" in problem


# --- What is refused, and how it is said ------------------------------------------------------------------


def test_missing_columns_of_all_splits_are_reported_together_with_near_names(tmp_path: Path) -> None:
    source = split_files(
        tmp_path, train=[{"txt": "a", "y": 1}], validation=[{"text": "a", "y": 1}], test=ROWS
    )
    problems = problems_of(source, columns={"label": "Y", "words": "text"})
    assert len(problems) == 5
    assert problems[0].startswith("columns: the task has no 'words'")
    assert "split 'train' has no column 'text' (did you mean 'txt'?); it has 'txt', 'y'" in problems[1]
    assert "split 'train' has no column 'Y' (did you mean 'y'?)" in problems[2]


def test_one_column_cannot_serve_twice() -> None:
    (problem,) = problems_of(three(), columns={"label": "text"})
    assert problem == "columns: 'text' and 'label' are both taken from 'text'"


def test_empty_splits_are_refused() -> None:
    empty = datasets.Dataset.from_dict({"text": [], "label": []})
    problems = problems_of(
        datasets.DatasetDict(train=empty, validation=empty, test=datasets.Dataset.from_list(ROWS))
    )
    assert [problem.split(": ")[1] for problem in problems] == [
        "split 'train' has no rows",
        "split 'validation' has no rows",
    ]


def test_not_utf8_names_file_line_and_byte(tmp_path: Path) -> None:
    for name, encoding in (("train.jsonl", "latin-1"), ("test.csv", "utf-16")):
        text = '{"text": "a", "label": "b"}\n{"text": "caf\xe9", "label": "b"}\n'
        (tmp_path / name).write_bytes(text.encode(encoding))
    source = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.csv")}
    problems = problems_of(DataSource(data_files=source))
    assert "train.jsonl, line 2: not UTF-8 (byte 0xe9 at offset 41)" in problems[0]
    assert "test.csv, line 1: not UTF-8" in problems[1] and "UTF-16" in problems[1]


def test_a_byte_order_mark_and_odd_line_separators_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"one\u2028line {i}", "label": "a"} for i in range(30)]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert files.read_rows(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "b"\n',
            "a.jsonl, line 3: broken JSON: Expecting ',' delimiter at column 13",
        ),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2: ['b'] is not an object"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', "line 1: '\\ud83d' is half of a character"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: broken JSON"),
        (
            "a.json",
            '[\n{"text": "a"},\n{"text": b}]',
            "a.json, line 3: broken JSON: Expecting value at column 10",
        ),
        ("a.json", '[{"text": "a"}, 3]', "a.json, item 2: 3 is not an object"),
        (
            "a.csv",
            "text,label\na,b\na,b,c\n",
            "a.csv, line 3: 3 fields where the header has 2; put fields with a comma",
        ),
        (
            "a.tsv",
            "text\tlabel\na\n",
            "a.tsv, line 2: 1 fields where the header has 2; put fields with a tab",
        ),
        ("a.csv", 'text,label\n"a,b\nc,d\n', "a.csv, near line 3: broken csv: unexpected end of data"),
        ("a.csv", 'text,label\n"a" b,c\n', "a.csv, near line 2: broken csv"),
        ("a.csv", "text,text\na,b\n", "a.csv, line 1: columns with the same name: 'text'"),
        ("a.csv", " \n", "a.csv: the file is empty"),
        ("a.xlsx", "x", "a.xlsx: the ending '.xlsx' tells no format"),
    ],
)
def test_broken_files_are_named_with_their_line(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (problem,) = problems_of(str(tmp_path / name))
    assert expected in problem


def test_broken_lines_are_shown_five_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x\n" * 12, encoding="utf-8")
    problems = problems_of(str(path))
    assert len(problems) == 6
    assert problems[-1] == f"{path}: and 7 more broken lines"


def test_long_csv_fields_are_read_and_the_limit_of_csv_put_back(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 200_000},b\n", encoding="utf-8")
    before = csv.field_size_limit(1_000)
    try:
        assert len(files.read_rows(tmp_path / "a.csv")[0]["text"]) == 200_000
        assert csv.field_size_limit() == 1_000
    finally:
        csv.field_size_limit(before)


def test_missing_files_are_named_with_near_ones(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    missing = {"train": str(tmp_path / "trian.jsonl"), "test": str(tmp_path / "*.csv")}
    problems = problems_of(DataSource(data_files=missing))
    assert "trian.jsonl does not exist (did you mean 'train.jsonl'?)" in problems[0]
    assert "data_files: test:" in problems[1] and "*.csv does not exist" in problems[1]
    assert "does not exist" in problems_of(str(tmp_path / "no_folder"))[0]
    assert f"looked in {Path.cwd()}" in problems_of("no_such_file.csv")[0]


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("not parquet", encoding="utf-8")
    (problem,) = problems_of(str(tmp_path / "a.parquet"))
    assert "a.parquet" in problem and "cannot be loaded" in problem and "Parquet" in problem


def test_an_unreachable_hub_is_one_error_with_id_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (problem,) = problems_of(DataSource(path="nobody/nothing", revision="v1.0"))
    assert "data set 'nobody/nothing' (revision v1.0) cannot be reached" in problem
    assert "name local files" in problem


@pytest.mark.parametrize("source", [3, datasets.Dataset.from_list(ROWS).to_iterable_dataset()])
def test_other_objects_are_refused(source: Any) -> None:
    assert "data s" in problems_of(source)[0]


def test_progress_bars_and_log_levels_are_put_back() -> None:
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    libraries = (datasets, huggingface_hub.utils)
    before = [logger.level for logger in loggers], [lib.are_progress_bars_disabled() for lib in libraries]
    with pytest.raises(KeyError), quiet():
        assert [logger.level for logger in loggers] == [logging.CRITICAL] * 2
        assert all(lib.are_progress_bars_disabled() for lib in libraries)
        raise KeyError
    assert before == (
        [logger.level for logger in loggers],
        [lib.are_progress_bars_disabled() for lib in libraries],
    )

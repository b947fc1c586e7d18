"""YAML as recipes read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    CustomTaskRecipe,
    FullRecipe,
    load_adapter,
    load_task,
    to_yaml,
)

TASK = "family: sequence_classification\n"


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PTFT_RECIPES", raising=False)


def write(name: str, text: str) -> str:
    """A file in the working folder."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(call: Any, *arguments: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "t.yaml: is empty; a recipe is a map of keys to values"),
        (b"- a\n", "t.yaml: holds ['a']; a recipe is a map of keys to values"),
        (b"family: x\n\xff\n", "t.yaml:2: byte 0xff is not UTF-8; save it as UTF-8"),
        (b"a: [1\nb: 2\n", "t.yaml:2: not YAML: while parsing a flow sequence, expected ',' or ']'"),
        (b"a: 1\n\tb: 2\n", "t.yaml:2: not YAML: while scanning for the next token, found character"),
        (b"a: 1\n---\nb: 2\n", "t.yaml:2: not YAML: expected a single document in the stream"),
        (b"a: &x 1\nb: *x\n", "t.yaml:2: not YAML: aliases (*name) are not supported; use include:"),
        (b"a: \x01\n", "t.yaml: not YAML: unacceptable character"),
        (b"a: " + b"[" * 5000, "t.yaml: nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, expected: str) -> None:
    Path("t.yaml").write_bytes(content)
    (problem,) = problems(load_task, "t.yaml")
    assert problem.startswith(expected)


def test_a_python_tag_is_reported_and_never_run() -> None:
    write("t.yaml", TASK + "description: !!python/object/apply:os.mkdir [made]\nleakage: !!int x\n")
    found = problems(load_task, "t.yaml")
    assert not Path("made").exists()
    assert "t.yaml:3: leakage: 'x' is not of the type !!int" in found
    tag = "tag:yaml.org,2002:python/object/apply:os.mkdir"
    assert f"t.yaml:2: description: the YAML tag {tag!r} is not supported" in found


def test_scalars_are_those_of_yaml_1_2() -> None:
    write(
        "t.yaml",
        "family: m:T\noptions:\n  a: [3e-4, 5e3, 1., .5, -1e+2, 0x1f, 0o17, 012, 7, '7']\n"
        "  b: [yes, no, on, off, true, False, null, ~, '', 2024-01-01, 1_000, 1:30]\n"
        "  c: {1: x, no: y, true: z}\n",
    )
    task = load_task("t.yaml")
    assert isinstance(task, CustomTaskRecipe)
    assert repr(task.options["a"]) == "[0.0003, 5000.0, 1.0, 0.5, -100.0, 31, 15, 12, 7, '7']"
    assert task.options["b"] == [
        "yes", "no", "on", "off", True, False, None, None, "", "2024-01-01", "1_000", "1:30"
    ]  # fmt: skip
    assert task.options["c"] == {"1": "x", "no": "y", "true": "z"}
    again = load_task(write("again.yaml", to_yaml(task)))
    assert isinstance(again, CustomTaskRecipe)
    assert again.options == task.options


def test_yaml_keeps_strings_that_look_like_numbers_and_explicit_nulls() -> None:
    recipe = FullRecipe(name="x", family="full", training={"run_name": "1e-3", "metric_for_best_model": None})
    assert load_adapter(write("x.yaml", to_yaml(recipe))).training == recipe.training

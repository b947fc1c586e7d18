"""Finding recipes, includes and paths."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    CustomAdapterRecipe,
    CustomTaskRecipe,
    PartialRecipe,
    PeftRecipe,
    SequenceClassificationRecipe,
    catalogue,
    load_adapter,
    load_recipe,
    load_run,
    load_task,
    locate,
)

TASK = "family: sequence_classification\n"
SST2 = "sequence_classification/sst2"
LORA = "lora/r8_attention"


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


def test_unknown_and_mistaken_names() -> None:
    assert "did you mean 'sequence_classification/sst2'?" in problems(load_task, "sst2")[0]
    assert "did you mean 'lora/r8_attention'?" in problems(load_adapter, "lora/r8_atention")[0]
    assert problems(load_task, LORA) == [
        f"{LORA!r} names an adapter, where a task is expected; see: ptft ls tasks"
    ]
    assert problems(load_task, "mine.yaml") == ["mine.yaml: there is no such file"]
    assert "did you mean 'full/default'?" in problems(load_recipe, "full/defualt")[0]


def test_ptft_recipes_adds_names_and_a_name_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_RECIPES", "one:two")
    write("one/adapters/lora/r4.yaml", "r: 4\n")
    write("two/tasks/sequence_classification/mine.yaml", "data: {path: me/mine}\n")
    assert "lora/r4" in catalogue("adapters")
    assert load_adapter("lora/r4").family == "lora"
    assert load_task("sequence_classification/mine").name == "sequence_classification/mine"
    assert load_recipe("one/adapters/lora/r4.yaml").name == "lora/r4"

    write("two/adapters/lora/r4.yaml", "r: 5\n")
    twice = (
        "the name 'lora/r4' exists twice; rename one of: one/adapters/lora/r4.yaml, two/adapters/lora/r4.yaml"
    )
    assert problems(catalogue, "adapters") == problems(load_adapter, "lora/r4") == [twice]
    assert load_adapter("lora/r8_attention")

    write("two/tasks/lost.yaml", "{}\n")
    assert problems(catalogue, "tasks") == [
        "two/tasks/lost.yaml: a recipe's place is tasks/<family>/<name>.yaml; move it"
    ]
    monkeypatch.setenv("PTFT_RECIPES", "three")
    assert problems(catalogue, "tasks") == [
        "PTFT_RECIPES: 'three' is not a folder with tasks/ or adapters/ in it"
    ]


def test_a_family_is_the_folders_unless_it_is_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_RECIPES", "one")
    write("one/adapters/lora/wrong.yaml", "family: full\n")
    assert problems(load_adapter, "lora/wrong") == [
        "one/adapters/lora/wrong.yaml:1: family: 'full' contradicts the folder 'lora'; leave it out"
    ]
    write("one/tasks/mine/x.yaml", "family: my_package.inner:MyTask\noptions: {anything: 1}\n")
    task = load_task("mine/x")
    assert isinstance(task, CustomTaskRecipe)
    assert (task.family, task.options) == ("my_package.inner:MyTask", {"anything": 1})
    adapter = load_adapter(write("a.yaml", "family: m:A\noptions: {b: c}\n"))
    assert isinstance(adapter, CustomAdapterRecipe)
    assert problems(load_task, write("t.yaml", "family: my-package:MyTask\n")) == [
        "t.yaml:1: family: expected 'package.module:Class', got 'my-package:MyTask'"
    ]


def test_the_kind_of_a_file_is_told_by_its_keys_or_what_it_includes() -> None:
    write("a/base.yaml", f"include: {SST2}\n")
    assert isinstance(load_recipe(write("t.yaml", "include: a/base.yaml\n")), SequenceClassificationRecipe)
    assert isinstance(load_recipe(write("l.yaml", f"include: {LORA}\nr: 2\n")), PeftRecipe)
    assert isinstance(load_recipe(write("o.yaml", "family: my.tasks:T\ncolumns: {}\n")), CustomTaskRecipe)
    assert problems(load_recipe, write("n.yaml", "training: {}\n"))[0].startswith(
        "n.yaml: family: is missing"
    )
    write("p.yaml", "include: q.yaml\n")
    assert "a cycle" in problems(load_recipe, write("q.yaml", "include: p.yaml\n"))[0]


def test_include_merges_maps_replaces_lists_and_the_includer_wins() -> None:
    write(
        "base.yaml",
        "family: partial\nparameters: [a, b]\ntraining: {seed: 1, learning_rate: 1e-3}\nbias: true\n",
    )
    write("middle.yaml", "include: ./base.yaml\ntraining: {seed: 2}\n")
    recipe = load_adapter(write("sub/top.yaml", "include: ../middle.yaml\nparameters: [c]\ntop_layers: 3\n"))
    assert recipe == PartialRecipe(
        name="sub/top.yaml",
        family="partial",
        parameters=["c"],
        bias=True,
        top_layers=3,
        training={"seed": 2, "learning_rate": 1e-3},
    )


def test_a_fault_is_located_in_the_file_that_holds_it() -> None:
    write("base.yaml", "family: lora\n\nrr: 8\ntraining: {sed: 1}\n")
    assert problems(load_adapter, write("top.yaml", "include: base.yaml\ntraining:\n  seeed: 2\n")) == [
        "base.yaml:3: rr: unknown LORA name 'rr' (did you mean 'r'?)",
        "base.yaml:4: training.sed: unknown TrainingArguments name 'sed' (did you mean 'seed'?)",
        "top.yaml:3: training.seeed: unknown TrainingArguments name 'seeed' (did you mean 'seed'?)",
    ]


def test_faults_of_include() -> None:
    write("a.yaml", "training: {}\ninclude: b.yaml\n")
    write("b.yaml", "include: a.yaml\nfamily: full\n")
    assert "b.yaml:1: include: a cycle: a.yaml -> b.yaml -> a.yaml" in problems(load_adapter, "a.yaml")
    assert "c.yaml:1: include: a cycle: c.yaml -> c.yaml" in problems(
        load_adapter, write("c.yaml", "include: c.yaml\nfamily: full\n")
    )
    assert problems(load_adapter, write("d.yaml", "include: [a.yaml]\nfamily: full\n")) == [
        "d.yaml:1: include: expected one name or relative path, got ['a.yaml']"
    ]
    assert problems(load_adapter, write("e.yaml", "include: gone.yaml\nfamily: full\n")) == [
        "e.yaml:1: include: gone.yaml: there is no such file"
    ]
    (unknown,) = problems(load_adapter, write("f.yaml", "include: lora/r8_atention\nfamily: lora\n"))
    assert unknown.startswith(
        "f.yaml:1: include: there is no adapter 'lora/r8_atention' (did you mean 'lora/r8_"
    )


def test_data_files_are_relative_to_the_file_that_names_them() -> None:
    write(
        "one/base.yaml", TASK + "data: {path: csv, data_files: {train: train.csv, test: [a.csv, /b.csv]}}\n"
    )
    write("two/top.yaml", "include: ../one/base.yaml\ndata: {data_files: {validation: dev.csv}}\n")
    here = Path.cwd()
    data = load_task("two/top.yaml", {"data": {"data_files": {"extra": "here.csv"}}}).data
    assert data is not None
    assert data.data_files == {
        "train": str(here / "one/train.csv"),
        "test": [str(here / "one/a.csv"), "/b.csv"],
        "validation": str(here / "two/dev.csv"),
        "extra": str(here / "here.csv"),
    }


def test_hub_ids_urls_and_package_paths_are_left_alone() -> None:
    write(
        "t.yaml",
        TASK + "data: {path: org/data, data_files: [a.csv, 'https://x.org/b.csv', 'package:p/c.csv']}\n",
    )
    data = load_task("t.yaml").data
    assert data is not None
    assert (data.path, data.data_files) == ("org/data", ["a.csv", "https://x.org/b.csv", "package:p/c.csv"])
    Path("org/data").mkdir(parents=True)
    local = load_task("t.yaml").data
    assert local is not None
    assert local.path == str(Path.cwd() / "org/data")


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site/never_imported_package/__init__.py", "raise RuntimeError('imported')\n")
    inner = Path(write("site/never_imported_package/data/x.jsonl", "{}\n")).absolute()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate("package:never_imported_package/data/x.jsonl") == str(inner)
    assert locate("package:never_imported_package") == str(inner.parent.parent)
    assert "never_imported_package" not in sys.modules
    assert problems(locate, "package:never_imported_package/y.jsonl") == [
        "package:never_imported_package/y.jsonl: the installed package 'never_imported_package' "
        f"({inner.parent.parent}) does not hold 'y.jsonl'"
    ]
    assert problems(locate, "package:no_such_package/x") == [
        "package:no_such_package/x: the package 'no_such_package' is not installed; "
        "install it: pip install --no-deps no_such_package"
    ]
    assert locate("org/name@main") == "org/name@main"
    assert locate("json", tmp_path) == "json"
    assert locate("site", tmp_path) == str(tmp_path / "site")
    assert locate("./gone", tmp_path / "site") == str(tmp_path / "site/gone")
    assert locate("/abs/x", tmp_path) == "/abs/x"


def test_a_run_needs_the_packages_that_its_recipes_name() -> None:
    write(
        "t.yaml",
        TASK + "data:\n  path: json\n  data_files: {train: 'package:no_such_package/x.jsonl'}\n"
        "  converter: no_such_module.inner:rows\n",
    )
    assert load_task("t.yaml").data is not None
    found = problems(load_run, "t.yaml", write("a.yaml", "family: no_such_adapters:A\n"))
    assert found == [
        "t.yaml: data.data_files.train: package:no_such_package/x.jsonl: the package 'no_such_package' "
        "is not installed; install it: pip install --no-deps no_such_package",
        "t.yaml: data.converter: 'no_such_module.inner:rows': there is no package 'no_such_module'; "
        "install it, or put it on PYTHONPATH",
        "a.yaml: family: 'no_such_adapters:A': there is no package 'no_such_adapters'; "
        "install it, or put it on PYTHONPATH",
    ]

"""Recipes: the catalogue, what a recipe may say, and how every fault of it is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import ptft_hf.recipes
from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    AdapterRecipe,
    DataSource,
    FullRecipe,
    Overrides,
    PartialRecipe,
    PeftRecipe,
    SequenceClassificationRecipe,
    TaskRecipe,
    adapter_from_dict,
    catalogue,
    load_adapter,
    load_recipe,
    load_run,
    load_task,
    parse_set,
    resolve_training,
    task_from_dict,
    to_yaml,
)

TASK = "family: sequence_classification\n"
SST2 = "sequence_classification/sst2"
LORA = "lora/r8_attention"
ROOT = Path(ptft_hf.recipes.__file__).parents[2]  # a subprocess there imports the package under test


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


ISSUE_TASKS = {"sst2", "mnli", "stsb", "ag_news", "clinc_oos", "aclsum_roles", "aclsum_roles_multilabel"}
ISSUE_ADAPTERS = {
    "full/default",
    "partial/head_only",
    "partial/top_2_layers",
    "partial/bias_only",
    "lora/r8_attention",
    "lora/r16_all_linear",
}


def test_every_recipe_of_the_catalogue_loads_and_survives_its_own_yaml() -> None:
    assert {f"sequence_classification/{name}" for name in ISSUE_TASKS} <= set(catalogue("tasks"))
    assert set(catalogue("adapters")) >= ISSUE_ADAPTERS
    for kind, base in (("tasks", TaskRecipe), ("adapters", AdapterRecipe)):
        for name in catalogue(kind):  # type: ignore[arg-type]
            recipe = load_recipe(name)
            assert isinstance(recipe, base)
            assert recipe.name == name
            assert recipe.family == name.split("/")[0]
            assert recipe.description and "\n" not in recipe.description
            again = load_recipe(write("again.yaml", to_yaml(recipe)))
            assert again == recipe.model_copy(update={"name": "again.yaml"})


def test_recipes_never_import_what_is_slow() -> None:
    program = (
        "import sys\n"
        "from ptft_hf.recipes import catalogue, load_recipe, load_run\n"
        "names = catalogue('tasks') + catalogue('adapters')\n"
        "assert len(names) >= 13\n"
        "for name in names: load_recipe(name)\n"
        f"load_run({SST2!r}, {LORA!r}, ['learning_rate=3e-4'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_published_settings_of_the_catalogue() -> None:
    assert load_adapter("lora/r8_attention").model_dump(include={"peft_type", "config", "training"}) == {
        "peft_type": "LORA",
        "config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        "training": {"learning_rate": 1e-3},
    }
    all_linear = load_adapter("lora/r16_all_linear")
    assert isinstance(all_linear, PeftRecipe)
    assert all_linear.config["target_modules"] == "all-linear"
    assert isinstance(load_adapter("full/default"), FullRecipe)
    assert load_adapter("full/default").training == {"learning_rate": 5e-5}
    bitfit = load_adapter("partial/bias_only")
    assert isinstance(bitfit, PartialRecipe)
    assert (bitfit.bias, bitfit.top_layers) == (True, 0)
    roles, several = (load_task(f"sequence_classification/aclsum_roles{end}") for end in ("", "_multilabel"))
    assert roles.data is not None and several.data is not None
    assert roles.data.converter == "ptft_hf.data:aclsum_roles"
    assert several.data == roles.data.model_copy(update={"converter": "ptft_hf.data:aclsum_roles_multilabel"})
    assert isinstance(several, SequenceClassificationRecipe)
    assert several.problem_type == "multi_label_classification"


def test_the_whole_task_of_the_issue_is_accepted() -> None:
    write(
        "sub/mine.yaml",
        "family: sequence_classification        # implied by the folder for a catalogue recipe\n"
        "data:\n"
        "  path: json\n"
        "  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}\n"
        "columns: {text: body, label: folder}\n"
        "leakage: warn\n"
        "training: {num_train_epochs: 3}\n",
    )
    here = Path.cwd() / "sub"
    assert load_task("sub/mine.yaml") == SequenceClassificationRecipe(
        name="sub/mine.yaml",
        family="sequence_classification",
        data=DataSource(
            path="json",
            data_files={
                "train": str(here / "train.jsonl"),
                "validation": str(here / "dev.jsonl"),
                "test": str(here / "test.jsonl"),
            },
        ),
        columns={"text": "body", "label": "folder"},
        training={"num_train_epochs": 3},
    )


def test_all_faults_of_both_files_and_of_set_arrive_together() -> None:
    write(
        "t.yaml",
        TASK + "data:\n  pth: json\n  data_files: {train: 3}\n  splits: {tain: x}\nleakage: eror\n"
        "training:\n  learning_rte: 3\n  seed: 1\n  seed: 2\n",
    )
    write("a.yaml", "family: lora\nrr: 4\ntrainin: {}\nlayerwise_lr_decay: 2\n")
    sets = ["learning_rte=1", "adapter.lora_alpa=3", "task.columns.txt=body", "model.max_lenght=3", "nothing"]
    assert problems(load_run, "t.yaml", "a.yaml", sets) == [
        "t.yaml:10: training.seed: given twice (first on line 9)",
        "t.yaml:3: data.pth: unknown key 'pth' (did you mean 'path'?)",
        "t.yaml:4: data.data_files.train: expected text or a list, got 3",
        "t.yaml:5: data.splits.tain: expected 'train', 'validation' or 'test', got 'tain' "
        "(did you mean 'train'?)",
        "t.yaml:6: leakage: expected 'warn', 'drop' or 'error', got 'eror' (did you mean 'error'?)",
        "t.yaml:8: training.learning_rte: unknown TrainingArguments name 'learning_rte' "
        "(did you mean 'learning_rate'?)",
        "--set model.max_lenght: unknown name 'max_lenght' (did you mean 'max_length'?)",
        "--set task.columns.txt: unknown column 'txt' (did you mean 'text'?)",
        "a.yaml:2: rr: unknown LORA name 'rr' (did you mean 'r'?)",
        "a.yaml:3: trainin: unknown LORA name 'trainin' (did you mean 'training'?)",
        "a.yaml:4: layerwise_lr_decay: expected a number of at most 1, got 2",
        "--set adapter.lora_alpa: unknown LORA name 'lora_alpa' (did you mean 'lora_alpha'?)",
        "--set nothing: expected key=value",
        "--set learning_rte: unknown TrainingArguments name 'learning_rte' (did you mean 'learning_rate'?)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zzz: 1", "zzz: unknown key 'zzz'; known: add_tokens, calibrate, class_weights, columns, data, description, "
         "early_stopping_patience, family, focal_gamma, include, leakage, loss, max_truncated, model, oversample, "
         "problem_type, training, tune_thresholds"),
        ("name: x", "name: unknown key 'name'; a recipe's name is that of its file"),
        ("problem_type: regresion", "problem_type: expected 'single_label_classification', "
         "'multi_label_classification' or 'regression', got 'regresion' (did you mean 'regression'?)"),
        ("class_weights: balnced", "class_weights: expected 'balanced' or a map, got 'balnced' "
         "(did you mean 'balanced'?)"),
        ("class_weights: {a: heavy}", "class_weights.a: expected a number, got 'heavy'"),
        ("class_weights: {a: 0.0}", "class_weights.a: expected a number greater than 0, got 0.0"),
        ("class_weights: {a: .nan}", "class_weights.a: expected a finite number, got nan"),
        ("focal_gamma: -1", "focal_gamma: expected a number of at least 0, got -1"),
        ("oversample: 1", "oversample: expected true or false, got 1"),
        ("oversample: yes", "oversample: expected true or false, got 'yes'"),
        ("training: null", "training: expected a map, got null"),
        ("training: {output_dir: x}", "training.output_dir: cannot be set here: the output folder is given "
         "by --output (in Python: output_dir=)"),
        ("data: {name: x}",
         "data: names no data: give path (what datasets.load_dataset takes) or data_files"),
        ("data: json", "data: expected a map, got 'json'"),
        ("data: {path: x, converter: a.b}", "data.converter: expected 'package.module:function', got 'a.b'"),
        ("data: {path: x, splits: {validation: test, test: test}}",
         "data.splits.test: 'test' is named by 'validation' already; a split cannot be two"),
        ("columns: {text: a, label: a}",
         "columns.label: 'a' is named by 'text' already; each needs a column of its own"),
        ("columns: {text: 3}", "columns.text: expected text, got 3"),
        ("columns: {id: a}", "columns.id: unknown column 'id'; known: label, text, text_pair"),
        ("model: {revison: x}", "model.revison: unknown name 'revison' (did you mean 'revision'?)"),
        ("model: {max_length: true}", "model.max_length: expected a whole number of at least 1, got true"),
        ("model: {max_length: 0}", "model.max_length: expected a whole number of at least 1, got 0"),
        ("{problem_type: regression, class_weights: balanced}",
         "class_weights: 'balanced' has no meaning for regression; leave it out"),
        ("{problem_type: regression, loss: focal}",
         "loss: 'focal' has no meaning for regression; leave it out"),
        ("{problem_type: multi_label_classification, oversample: true}",
         "oversample: true has no meaning for multi_label_classification; leave it out"),
        ("{problem_type: single_label_classification, tune_thresholds: true}",
         "tune_thresholds: true has no meaning for single_label_classification; leave it out"),
        ("{loss: focal, training: {label_smoothing_factor: 0.1}}",
         "training.label_smoothing_factor: cannot be combined with loss: focal; leave one out"),
    ],
)  # fmt: skip
def test_a_fault_of_a_task(text: str, expected: str) -> None:
    flow = text.removeprefix("{").removesuffix("}") if text.startswith("{") else text
    write("t.yaml", f"{{family: sequence_classification, {flow}}}\n")
    assert problems(load_task, "t.yaml") == [f"t.yaml:1: {expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("family: loraa", "family: unknown family 'loraa' (did you mean 'lora'?)"),
        ("family: 1zzz", "family: unknown family '1zzz'; known: adalora, "),
        ("family: 3", "family: expected one of full, partial, bottleneck, lora, or another method of PEFT, got 3"),
        ("family: full\nr: 8", "r: unknown key 'r'; known: "),
        ("family: lora\nconfig: {r: 8}", "config: unknown LORA name 'config'"),
        ("family: lora\npeft_type: LORRA", "peft_type: unknown PEFT method 'LORRA' (did you mean 'LORA'?)"),
        ("family: lora\ntask_type: SEQ_CLS",
         "task_type: cannot be set here: it follows from the model and the task"),
        ("family: lora\nlora_alpah: 8",
         "lora_alpah: unknown LORA name 'lora_alpah' (did you mean 'lora_alpha'?)"),
        ("family: partial\ntop_layers: -1", "top_layers: expected a number of at least 0, got -1"),
        ("family: partial\ntop_layers: 1.5", "top_layers: expected a whole number, got 1.5"),
        ("family: partial\nparameters: [a, '(']", "parameters.1: '(' is not a regular expression: "),
        ("family: full\nhead_learning_rate: 0",
         "head_learning_rate: expected a number greater than 0, got 0"),
        ("family: full\nlayerwise_lr_decay: 0",
         "layerwise_lr_decay: expected a number greater than 0, got 0"),
        ("family: full\nlayerwise_lr_decay: '0.9'", "layerwise_lr_decay: expected a number, got '0.9'"),
        ("family: full\nquantization: {load_in_4bt: true}",
         "quantization.load_in_4bt: unknown BitsAndBytesConfig name 'load_in_4bt' "
         "(did you mean 'load_in_4bit'?)"),
    ],
)  # fmt: skip
def test_a_fault_of_an_adapter(text: str, expected: str) -> None:
    (problem,) = problems(load_adapter, write("a.yaml", text + "\n"))
    assert problem.startswith(f"a.yaml:{text.count(chr(10)) + 1}: {expected}")


def test_an_unknown_family_does_not_hide_other_faults() -> None:
    found = problems(load_adapter, write("a.yaml", "family: lroa\nr: 8\ntraining: {sed: 1}\n"))
    assert [problem.split(": ")[:2] for problem in found] == [
        ["a.yaml:1", "family"],
        ["a.yaml:3", "training.sed"],
    ]


def test_a_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match=r"config\.rr: unknown LORA name 'rr'"):
        PeftRecipe(name="x", family="lora", peft_type="LORA", config={"rr": 8})
    with pytest.raises(ValidationError, match="frozen"):
        FullRecipe(name="x", family="full").family = "partial"


def test_parse_set_sorts_by_destination() -> None:
    assert parse_set(
        [
            "learning_rate=3e-4",
            "lr_scheduler_kwargs={num_cycles: 2}",
            "run_name=a=b",
            "metric_for_best_model=null",
            "adapter.r=16",
            "adapter.target_modules=[query, value]",
            "task.leakage=error",
            "task.columns.text=body",
            "task.columns.label=folder",
            "model.max_length=64",
        ]
    ) == Overrides(
        training={
            "learning_rate": 3e-4,
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "run_name": "a=b",
            "metric_for_best_model": None,
        },
        task={"leakage": "error", "columns": {"text": "body", "label": "folder"}},
        adapter={"r": 16, "target_modules": ["query", "value"]},
        model={"max_length": 64},
    )


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["seed"], "--set seed: expected key=value"),
        (["=3"], "--set =3: expected key=value"),
        (["task.=3"], "--set task.=3: expected key=value"),
        (["seed="], "--set seed=: no value; for none, write null"),
        (["seed=[1"], "--set seed=[1: not YAML: while parsing a flow sequence"),
        (["seed=1", "seed=2"], "--set seed=2: given twice"),
        (["task.data=x", "task.data.path=y"],
         "--set task.data.path=y: 'data' is given a value of its own by another"),
        (["training.seed=1"], "--set training.seed=1: TrainingArguments names stand alone: seed=1"),
        (["taks.leakage=warn"], "--set taks.leakage=warn: unknown prefix 'taks' (did you mean 'task'?)"),
        (["task=x"], "--set task=x: expected task.NAME=value"),
        (["sed=1"], "--set sed: unknown TrainingArguments name 'sed' (did you mean 'seed'?)"),
        (["r=8"],
         "--set r: unknown TrainingArguments name 'r'; a recipe's field is written with its place: "
         "adapter.r"),
        (["resume_from_checkpoint=x"],
         "--set resume_from_checkpoint: cannot be set here: a run is resumed by --resume"),
    ],
)  # fmt: skip
def test_a_fault_of_set(sets: list[str], expected: str) -> None:
    (problem,) = problems(parse_set, sets)
    assert problem.startswith(expected)


def test_a_run_has_its_overrides_in_its_recipes() -> None:
    sets = [
        "learning_rate=3e-4",
        "adapter.r=16",
        "task.leakage=error",
        "model.max_length=64",
        "model.dtype=float32",
    ]
    task, adapter, overrides = load_run(SST2, LORA, sets)
    assert task.leakage == "error"
    assert task.model == {"max_length": 64, "dtype": "float32"}
    assert isinstance(adapter, PeftRecipe)
    assert adapter.config == {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
    assert overrides.training == {"learning_rate": 3e-4}
    assert adapter.training == {"learning_rate": 1e-3}


def test_overrides_in_python_are_checked_like_a_file() -> None:
    assert load_task(SST2, {"class_weights": {"negative": 2}}) == load_task(SST2).model_copy(
        update={"class_weights": {"negative": 2.0}}
    )
    assert problems(load_adapter, LORA, {"rr": 2}) == [
        "overrides.rr: unknown LORA name 'rr' (did you mean 'r'?)"
    ]


def test_the_last_of_library_task_adapter_and_command_line_wins() -> None:
    assert resolve_training(
        {"a": "library", "b": "library", "c": "library", "d": "library"},
        {"b": "task", "c": "task", "d": "task"},
        {"c": "adapter", "d": "adapter"},
        {"d": "command line", "e": None},
    ) == {"a": "library", "b": "task", "c": "adapter", "d": "command line", "e": None}


def test_recipes_survive_run_json_and_are_taken_as_objects() -> None:
    for kind in ("tasks", "adapters"):
        for name in catalogue(kind):
            recipe = load_recipe(name)
            values = json.loads(json.dumps(recipe.model_dump(mode="json")))
            again = task_from_dict(values) if kind == "tasks" else adapter_from_dict(values)
            assert again == recipe
    adapter = load_adapter(LORA)
    assert load_run(load_task(SST2), adapter, ["adapter.r=2"])[1] == adapter.model_copy(
        update={"config": {"r": 2, "lora_alpha": 16, "lora_dropout": 0.0}}
    )
    assert problems(load_run, load_task(SST2), adapter, ["adapter.rr=2"]) == [
        "--set adapter.rr: unknown LORA name 'rr' (did you mean 'r'?)"
    ]
    written = {**adapter.model_dump(mode="json"), "layerwise_lr_decay": 3}
    assert problems(adapter_from_dict, written) == [
        "lora/r8_attention: layerwise_lr_decay: expected a number of at most 1, got 3"
    ]

"""Recipes: YAML files that say what to learn (``tasks/``) and which weights to train (``adapters/``).

Found by catalogue name or path, merged with what they include and with ``--set``, and checked to the last
name before torch is imported; every fault of a run is reported at once. This module and what it imports never
import torch, transformers, datasets, peft or numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes.bottleneck import BottleneckConfig, BottleneckRecipe, HookPoint
from ptft_hf.recipes.corpora import CausalLMRecipe, Cleaning, CorpusRecipe, MaskedLMRecipe, TokenizerRecipe
from ptft_hf.recipes.documents import Document, dump, from_mapping, read, shown
from ptft_hf.recipes.explaining import explain
from ptft_hf.recipes.families import ADAPTER_FAMILIES, PEFT_FAMILIES, TASK_FAMILIES
from ptft_hf.recipes.faults import Fault
from ptft_hf.recipes.files import (
    CONFIG,
    Kind,
    anchor,
    assemble,
    catalogue,
    find,
    from_nothing,
    locate,
    name_of,
    package_paths,
    saved_adapter_kind,
)
from ptft_hf.recipes.models import (
    IMPORT_PATH,
    PEFT_SET_BY_THE_RUN,
    AdapterRecipe,
    ClassificationRecipe,
    CustomAdapterRecipe,
    CustomTaskRecipe,
    DataSource,
    FullRecipe,
    ImageClassificationRecipe,
    PartialRecipe,
    PeftRecipe,
    SequenceClassificationRecipe,
    TaskRecipe,
    TokenClassificationRecipe,
    keys_of,
)
from ptft_hf.recipes.overrides import Overrides, parse_set, read_sets
from ptft_hf.recipes.preference import PreferenceRecipe
from ptft_hf.recipes.prompts import NO_ANSWERS
from ptft_hf.recipes.summarization import SummarizationRecipe
from ptft_hf.recipes.upstream import (
    importable,
    peft_config_names,
    peft_types,
    quantization_names,
    training_argument_names,
)

__all__ = [
    "AdapterRecipe",
    "BottleneckConfig",
    "BottleneckRecipe",
    "ClassificationRecipe",
    "CONFIG",
    "CausalLMRecipe",
    "Cleaning",
    "CorpusRecipe",
    "CustomAdapterRecipe",
    "CustomTaskRecipe",
    "DataSource",
    "FullRecipe",
    "HookPoint",
    "ImageClassificationRecipe",
    "MaskedLMRecipe",
    "Overrides",
    "PartialRecipe",
    "PeftRecipe",
    "PreferenceRecipe",
    "SequenceClassificationRecipe",
    "SummarizationRecipe",
    "TaskRecipe",
    "TokenClassificationRecipe",
    "TokenizerRecipe",
    "adapter_from_dict",
    "catalogue",
    "check_run",
    "from_nothing",
    "load_adapter",
    "load_recipe",
    "load_run",
    "load_task",
    "locate",
    "parse_set",
    "peft_config_names",
    "peft_types",
    "quantization_names",
    "resolve_training",
    "saved_adapter_kind",
    "task_from_dict",
    "to_yaml",
    "training_argument_names",
]

_R = TypeVar("_R", TaskRecipe, AdapterRecipe)


def load_task(reference: str, overrides: Mapping[str, Any] | None = None) -> TaskRecipe:
    """Load one task recipe.

    Args:
        reference: A catalogue name (``sequence_classification/sst2``) or the path of a ``.yaml`` file.
        overrides: Laid over the file, nested as in the file: ``{"leakage": "error"}``.

    Raises:
        RecipeError: With every fault of the file, of what it includes and of the overrides.
    """
    return _required(*_load("tasks", reference, [_given(overrides)], TaskRecipe))


def load_adapter(reference: str, overrides: Mapping[str, Any] | None = None) -> AdapterRecipe:
    """Load one adapter recipe; as :func:`load_task`. A PEFT method's own fields stand flat: ``{"r": 16}``."""
    return _required(*_load("adapters", reference, [_given(overrides)], AdapterRecipe))


def load_recipe(reference: str) -> TaskRecipe | AdapterRecipe:
    """Load a recipe of either kind, told apart by its name or its family.

    Raises:
        RecipeError: With every fault of the recipe, or if its kind cannot be told.
    """
    if _kind_of(reference) == "tasks":
        return load_task(reference)
    return load_adapter(reference)


def load_run(
    task: str | Path | TaskRecipe,
    adapter: str | Path | AdapterRecipe,
    sets: Sequence[str] = (),
    *,
    of_prompts: bool = False,
) -> tuple[TaskRecipe, AdapterRecipe, Overrides]:
    """Load and check all settings of a run; what ``sets`` says of task, model and adapter is in the recipes.

    Args:
        task: A catalogue name, a file, or a recipe.
        adapter: A catalogue name, a file, or a recipe.
        sets: ``key=value`` as given to ``--set`` (see :func:`parse_set`).
        of_prompts: Whether the run may learn from prompts alone, as those of reinforcement learning do.

    Raises:
        RecipeError: With every fault of both recipes and of ``sets``, missing packages included.
    """
    overrides, problems = read_sets(sets)
    here = Path.cwd()
    given = [
        from_mapping(overrides.task, "--set task.", here),
        from_mapping({"model": overrides.model} if overrides.model else {}, "--set ", here),
    ]
    the_task, task_problems = _load("tasks", task, given, TaskRecipe)
    the_adapter, adapter_problems = _load(
        "adapters", adapter, [from_mapping(overrides.adapter, "--set adapter.", here)], AdapterRecipe
    )
    for recipe in (the_task, the_adapter):
        problems += [] if recipe is None else _missing_packages(recipe)
    if the_task is not None and the_task.family == "prompts" and not of_prompts:
        problems.append(f"{the_task.name}: family: {NO_ANSWERS}")
    problems = [*task_problems, *adapter_problems, *problems]
    if problems or the_task is None or the_adapter is None:
        raise RecipeError(*problems)
    return the_task, the_adapter, overrides


def check_run(task: str, adapter: str, sets: Sequence[str]) -> None:
    """Every fault of a run's recipes and settings that can be told before torch is imported; where ``adapter`` is the
    folder of an earlier run, of the task's alone.

    Raises:
        RecipeError: With all of them.
    """
    if saved_adapter_kind(adapter) is None:
        load_run(task, adapter, sets)
    else:
        load_run(task, "full/default", [pair for pair in sets if not pair.strip().startswith("adapter.")])


def task_from_dict(values: Mapping[str, Any]) -> TaskRecipe:
    """The inverse of ``recipe.model_dump(mode="json")``, as it stands in ``run.json``.

    Raises:
        RecipeError: With every fault.
    """
    document = _written(values)
    return _required(_build("tasks", values["name"], document, TaskRecipe), document.problems)


def adapter_from_dict(values: Mapping[str, Any]) -> AdapterRecipe:
    """As :func:`task_from_dict`."""
    document = _written(values)
    return _required(_build("adapters", values["name"], document, AdapterRecipe), document.problems)


def resolve_training(
    library_defaults: Mapping[str, Any],
    task: Mapping[str, Any],
    adapter: Mapping[str, Any],
    command_line: Mapping[str, Any],
) -> dict[str, Any]:
    """``TrainingArguments`` by name: library defaults < task recipe < adapter recipe < command line."""
    return {**library_defaults, **task, **adapter, **command_line}


def to_yaml(recipe: TaskRecipe | AdapterRecipe) -> str:
    """A recipe as a YAML file that loads to the same recipe: includes merged in, defaults spelt out."""
    values = recipe.model_dump(exclude={"name"})
    config = values.pop("config", {})
    if values.get("data"):
        values["data"] = _stated(values["data"])
    return f"# {recipe.name}\n" + dump(_stated(values) | config)


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value not in ({}, [])}


def _written(values: Mapping[str, Any]) -> Document:
    """A recipe object's values as a document, a PEFT method's fields flat."""
    flat = {
        key: value for key, value in values.items() if key not in ("name", "config") and value is not None
    }
    return from_mapping({**flat, **(values.get("config") or {})}, f"{values['name']}: ", Path.cwd())


def _given(overrides: Mapping[str, Any] | None) -> Document:
    return from_mapping(overrides or {}, "overrides.", Path.cwd())


def _required(recipe: _R | None, problems: list[str]) -> _R:
    if recipe is None or problems:
        raise RecipeError(*problems)
    return recipe


def _load(
    kind: Kind,
    reference: str | Path | TaskRecipe | AdapterRecipe,
    overrides: Sequence[Document],
    base: type[_R],
) -> tuple[_R | None, list[str]]:
    """A recipe, or None with what is wrong."""
    try:
        if isinstance(reference, TaskRecipe | AdapterRecipe):
            name, document = reference.name, _written(reference.model_dump(mode="json"))
        else:
            file = find(kind, str(reference), Path.cwd())
            document = assemble(kind, file)
            name = name_of(kind, file) or str(reference)
    except RecipeError as error:
        return None, list(error.problems)
    for override in overrides:
        document.merge(override)
    if isinstance(document.values.get("data"), dict):
        anchor(document.values["data"], document)
    recipe = _build(kind, name, document, base) if document.values else None
    return (None if document.problems else recipe), document.problems


def _build(kind: Kind, name: str, document: Document, base: type[_R]) -> _R | None:
    """The recipe that a document holds; what is wrong is added to the document's problems."""
    model, family_fault = _model(kind, document.values.get("family"))
    values = dict(document.values)
    faults: list[Fault] = [] if family_fault is None else [(("family",), family_fault)]
    if issubclass(model, PeftRecipe):
        faults += _set_by_the_run(values)
        values = _nest(values, model)
    elif "name" in values:
        faults.append((("name",), "unknown key 'name'; a recipe's name is that of its file"))
    values["name"] = name
    recipe: _R | None = None
    try:
        built = model.model_validate(values)
        recipe = built if isinstance(built, base) else None
    except ValidationError as error:
        found = explain(error, model, values)
        if family_fault is not None:  # which keys there are depends on the family
            found = [
                (k, text) for k, text in found if k != ("family",) and not text.startswith("unknown key")
            ]
        faults += found
    located = [(key[1:] if key[0] == "config" and len(key) > 1 else key, message) for key, message in faults]
    located.sort(key=lambda fault: document.origin(fault[0]).order)
    for key, message in located:
        document.problem(key, message)
    return recipe


def _model(kind: Kind, family: object) -> tuple[type[TaskRecipe] | type[AdapterRecipe], str | None]:
    """The model of a family; if there is none, what all families share and what is wrong."""
    tasks = kind == "tasks"
    known: Mapping[str, type[TaskRecipe] | type[AdapterRecipe]] = TASK_FAMILIES if tasks else ADAPTER_FAMILIES
    shared = TaskRecipe if tasks else AdapterRecipe
    names = [*known, *([] if tasks else [*PEFT_FAMILIES, *(method.lower() for method in peft_types())])]
    if not isinstance(family, str):
        common = ", ".join([*known, *([] if tasks else ["lora, or another method of PEFT"])])
        return shared, "is missing" if family is None else f"expected one of {common}, got {shown(family)}"
    if family in known:
        return known[family], None
    if family in names:
        return PeftRecipe, None
    if ":" in family:
        fault = None if IMPORT_PATH.fullmatch(family) else f"expected 'package.module:Class', got {family!r}"
        return (CustomTaskRecipe if tasks else CustomAdapterRecipe), fault
    near = did_you_mean(family, names) or f"; known: {', '.join(sorted(names))}"
    return shared, f"unknown family {family!r}{near}"


def _set_by_the_run(values: Mapping[str, Any]) -> Iterator[Fault]:
    for name in values:
        if name in PEFT_SET_BY_THE_RUN:
            yield (name,), "cannot be set here: it follows from the model and the task"


def _nest(values: Mapping[str, Any], model: type[PeftRecipe]) -> dict[str, Any]:
    """The flat fields of a PEFT method put under ``config``, and the method that the family implies."""
    keys = keys_of(model)
    family = values["family"]
    return {
        "peft_type": PEFT_FAMILIES.get(family, family.upper()),
        **{key: value for key, value in values.items() if key in keys},
        "config": {key: value for key, value in values.items() if key not in keys},
    }


def _missing_packages(recipe: TaskRecipe | AdapterRecipe) -> Iterator[str]:
    """Packages that a recipe needs and that are not installed, or do not hold the file it names."""
    imports = {"family": recipe.family}
    if isinstance(recipe, AdapterRecipe) and recipe.quantization and not importable("bitsandbytes"):
        yield f"{recipe.name}: quantization: needs the package bitsandbytes: pip install 'ptft-hf[quant]'"
    if isinstance(recipe, TaskRecipe) and recipe.data is not None:
        if recipe.data.converter:
            imports["data.converter"] = recipe.data.converter
        for key, path in package_paths(recipe.data.model_dump()):
            try:
                locate(path)
            except RecipeError as error:
                yield f"{recipe.name}: {'.'.join(map(str, key))}: {error}"
    for where, path in imports.items():
        package = path.partition(":")[0].partition(".")[0]
        if ":" in path and not importable(package):
            found = f"there is no package {package!r}; install it, or put it on PYTHONPATH"
            yield f"{recipe.name}: {where}: {path!r}: {found}"


def _kind_of(reference: str) -> Kind:
    """Whether a name or file is of a task or of an adapter; a file by its place, its family or its keys."""
    kinds: tuple[Kind, Kind] = ("tasks", "adapters")
    names = {kind: catalogue(kind) for kind in kinds}
    if not reference.endswith((".yaml", ".yml")):
        for kind in kinds:
            if reference in names[kind]:
                return kind
        near = did_you_mean(reference, [*names["tasks"], *names["adapters"]])
        raise RecipeError(
            f"there is no recipe {reference!r}{near}; see: ptft ls, or give the path of a .yaml file"
        )
    only_tasks = keys_of(TaskRecipe) - keys_of(AdapterRecipe)
    file, seen = find("tasks", reference, Path.cwd()), set[Path]()
    while file not in seen:
        seen.add(file)
        for kind in kinds:
            if name_of(kind, file) is not None:
                return kind
        values = read(file).values
        family, include = values.get("family"), values.get("include")
        if family in TASK_FAMILIES or include in names["tasks"] or only_tasks & set(values):
            return "tasks"
        if isinstance(include, str) and include.endswith((".yaml", ".yml")):
            file = find("tasks", include, file.parent).resolve()
    return "adapters"

"""A grid: models x tasks x adapters x seeds x training-set sizes, read from YAML, flags or Python, and its cells.

Like the recipes this imports neither torch nor numpy, so that a grid's faults are told before anything is loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptft_hf import recipes
from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes import AdapterRecipe, TaskRecipe
from ptft_hf.recipes.documents import read

ALL = "all"
"""The size of a training set that is taken whole."""
CLIMB: Final = "climb"
AROUND: Final = "around"
FORMAT = 1
"""Part of every cell's identity; to be raised when a cell's numbers would mean something else."""

Size = Annotated[int, Field(ge=1)]
Rates = list[Annotated[float, Field(gt=0)]]


class Grid(BaseModel):
    """What is compared. Every combination is a cell: one method, trained and tested once.

    Raises:
        pydantic.ValidationError: A value is of the wrong type or a name unknown; from YAML and flags
            (:func:`read_grid`) that is a ``RecipeError``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[str], Field(min_length=1)]
    """Hub ids, ``name@revision`` or folders of pretrained checkpoints."""
    tasks: Annotated[list[str | TaskRecipe], Field(min_length=1)]
    """Catalogue names, YAML files (relative to the grid's own) or recipes."""
    adapters: Annotated[list[str | AdapterRecipe], Field(min_length=1)]
    """The same of the methods."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    """Of initial weights, order of rows, dropout, and of which rows are in a smaller training set. Three, since
    under three there is no verdict."""
    sizes: Annotated[list[Size | str], Field(min_length=1)] = [ALL]
    """Rows of train, or ``all``; a smaller set is contained in the larger ones."""
    validation_size: Size | None = None
    """Rows of validation; None takes all. Every try is scored on them after every epoch."""
    test_size: Size | None = None
    """Rows of test, the same for all methods, and for all seeds unless test is cut from train; None takes all. Fewer
    cost less, where answers are generated above all, and tell fewer methods apart."""
    learning_rates: Annotated[int, Field(ge=1, le=9)] | dict[str, Rates] = 3
    """How many each method tries, or for each adapter its own, equally many."""
    search: Literal["climb", "around"] = CLIMB
    """Which rates are tried where their number is given: ``climb`` goes from the method's default towards the better
    (:func:`ptft_hf.comparing.cells.climb`), ``around`` takes the same for each seed
    (:func:`ptft_hf.comparing.cells.rates_around`)."""
    settings: list[str] = []
    """``key=value`` as after ``--set``, for every cell."""

    def cells(self) -> list[Cell]:
        """Every combination, the adapters innermost, so that what can be compared comes early.

        Raises:
            RecipeError: Every fault of the grid and of every recipe in it.
        """
        problems = list(dict.fromkeys(self._faults()))
        if problems:
            raise RecipeError(*problems)
        loaded: dict[tuple[int, int], tuple[TaskRecipe, AdapterRecipe, dict[str, Any]]] = {}
        for (t, task), (a, adapter) in itertools.product(enumerate(self.tasks), enumerate(self.adapters)):
            try:
                loaded_task, loaded_adapter, overrides = recipes.load_run(task, adapter, self.settings)
                loaded[t, a] = loaded_task, loaded_adapter, overrides.training
            except RecipeError as error:
                problems += error.problems
        if not problems:
            tasks = [loaded[t, 0][0] for t in range(len(self.tasks))]
            problems += self._twins(tasks, [loaded[0, a][1] for a in range(len(self.adapters))])
            problems += _unlike_metrics(loaded.values())
        if problems:
            raise RecipeError(*dict.fromkeys(problems))
        sizes = [None if size == ALL else int(size) for size in self.sizes]
        search = self.search if isinstance(self.learning_rates, int) else AROUND
        return [
            Cell(
                model,
                *loaded[t, a][:2],
                seed=seed,
                size=size,
                validation_size=self.validation_size,
                rates=self._rates(a),
                training=loaded[t, a][2],
                search=search,
                test_size=self.test_size,
            )
            for model, t, size, seed, a in itertools.product(
                self.models, range(len(self.tasks)), sizes, self.seeds, range(len(self.adapters))
            )
        ]

    def name_of_reference(self, reference: str) -> str:
        """The name that cells have of an adapter: a file in the catalogue has the catalogue's.

        Raises:
            RecipeError: It is none of the adapters; or whatever is wrong with the grid.
        """
        loaded = [cell.adapter.name for cell in self.cells()[: len(self.adapters)]]
        names = dict(zip(map(_name, self.adapters), loaded, strict=True)) | dict(zip(loaded, loaded, strict=True))
        if reference not in names:
            raise RecipeError(
                f"reference: {reference!r} is none of the adapters{did_you_mean(reference, names)}"
            )
        return names[reference]

    def _twins(self, tasks: Sequence[TaskRecipe], adapters: Sequence[AdapterRecipe]) -> Iterator[str]:
        """What is given twice by different names: its cells would be taken for more seeds than there are."""
        folders = [os.path.realpath(model) if Path(model).is_dir() else model for model in self.models]
        meant = {"models": folders, "tasks": [x.name for x in tasks], "adapters": [x.name for x in adapters]}
        for field, names in meant.items():
            given: dict[str, list[str]] = {}
            for value, name in zip(getattr(self, field), names, strict=True):
                file = os.path.realpath(name) if name.endswith((".yaml", ".yml")) else name
                given.setdefault(file, []).append(_name(value))
            yield from (f"{field}: {' and '.join(same)} are the same" for same in given.values() if len(same) > 1)

    def _rates(self, adapter: int) -> int | list[float]:
        rates = self.learning_rates
        return rates if isinstance(rates, int) else rates[_name(self.adapters[adapter])]

    def _faults(self) -> Iterator[str]:
        for field in ("models", "tasks", "adapters", "seeds", "sizes"):
            names = [value if isinstance(value, int) else _name(value) for value in getattr(self, field)]
            for twice in sorted({str(name) for name in names if names.count(name) > 1}):
                yield f"{field}: {twice} is given twice"
        for size in self.sizes:
            if isinstance(size, str) and size != ALL:
                yield f"sizes: {size!r} is neither a number of rows nor {ALL!r}"
        if any(pair.partition("=")[0].strip() == "learning_rate" for pair in self.settings):
            yield "settings: learning_rate is what the methods try; give learning_rates"
        if isinstance(self.learning_rates, dict):
            adapters = [_name(adapter) for adapter in self.adapters]
            for name in sorted(self.learning_rates.keys() - set(adapters)):
                yield f"learning_rates: {name!r} is none of the adapters{did_you_mean(name, adapters)}"
            for name in adapters:
                if name not in self.learning_rates:
                    yield f"learning_rates: {name!r} has none; every method gets as many tries"
            counts = {len(rates) for rates in self.learning_rates.values()}
            for name, rates in self.learning_rates.items():
                if len(set(rates)) < len(rates):
                    yield f"learning_rates: {name!r} has {max(rates, key=rates.count):g} twice"
            if len(counts) > 1 or 0 in counts:
                yield f"learning_rates: {sorted(counts)} tries; every method gets as many, and at least one"


def _unlike_metrics(loaded: Iterable[tuple[TaskRecipe, AdapterRecipe, dict[str, Any]]]) -> Iterator[str]:
    """Methods that would be chosen and compared by different metrics on a task."""
    by_task: dict[str, dict[str, str]] = {}
    for task, adapter, overrides in loaded:
        training = recipes.resolve_training({}, task.training, adapter.training, overrides)
        by_task.setdefault(task.name, {})[adapter.name] = training.get("metric_for_best_model") or "the family's own"
    for name, metrics in by_task.items():
        if len(set(metrics.values())) > 1:
            each = ", ".join(f"{adapter}: {metric}" for adapter, metric in metrics.items())
            yield (
                f"{name}: metric_for_best_model differs ({each}), and methods are compared by one metric; give it "
                "in the task's recipe or under settings"
            )


def _name(value: Any) -> str:
    return value if isinstance(value, str) else str(value.name)


class Cell(NamedTuple):
    """One method on one task: its tries of the learning rate, and the test of the chosen one."""

    model: str
    task: TaskRecipe
    adapter: AdapterRecipe
    seed: int
    size: int | None
    """Rows of train; None is all."""
    validation_size: int | None
    rates: int | list[float]
    """Learning rates, or how many around the method's own."""
    training: dict[str, Any]
    """``TrainingArguments`` given for the whole grid."""
    search: str = AROUND
    """How rates are found that are not given."""
    test_size: int | None = None
    """Rows of test; None is all."""

    @property
    def key(self) -> str:
        """The name of the cell's file: readable, different for whatever may change its figures, and the same on
        every machine where data files lie below the folder that the command is given in."""
        said = f"{self.task.name}--{self.adapter.name}--{self.size or ALL}--seed{self.seed}"
        readable = re.sub(r"[^\w.-]+", "-", said).strip("-.")[-120:]
        values = self.to_dict()
        for recipe in (values["task"], values["adapter"]):
            del recipe["description"]
        here = json.dumps(f"{Path.cwd()}/")[1:-1]
        told = json.dumps([FORMAT, values], sort_keys=True).replace(f'"{here}', '"')
        digest = hashlib.sha256(told.encode())
        return f"{readable}--{digest.hexdigest()[:10]}"

    @property
    def label(self) -> str:
        """For a progress line."""
        rows = "all rows" if self.size is None else f"{self.size:,} rows"
        return f"{self.adapter.name} on {self.task.name}, {rows}, seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: both recipes whole. ``search`` only where rates are searched for, and ``test_size`` only
        where it is given, so that cells from before there were such things keep their names."""
        values = {
            **self._asdict(),
            "task": self.task.model_dump(mode="json"),
            "adapter": self.adapter.model_dump(mode="json"),
        }
        without = {"search": AROUND, "test_size": None}
        return {k: v for k, v in values.items() if k not in without or v != without[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of :meth:`to_dict`."""
        return cls(
            **{
                **values,
                "task": recipes.task_from_dict(values["task"]),
                "adapter": recipes.adapter_from_dict(values["adapter"]),
            }
        )


def read_grid(file: str | Path | None, given: Mapping[str, Any]) -> Grid:
    """A grid from a YAML file with the fields of :class:`Grid`, from flags, or from both.

    Args:
        file: The YAML file, if there is one.
        given: Fields by name; they stand over the file's.

    Raises:
        RecipeError: Every fault of the file and of the values.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not Path(file).is_file():
            raise RecipeError(f"{file}: there is no such file")
        document = read(Path(file))
        if document.problems:
            raise RecipeError(*document.problems)
        values = dict(document.values)
        for field in ("tasks", "adapters"):
            if isinstance(values.get(field), list):
                values[field] = [_beside(Path(file), value) for value in values[field]]
        if isinstance(values.get("learning_rates"), dict):
            rates = values["learning_rates"]
            values["learning_rates"] = {_beside(Path(file), name): rates[name] for name in rates}
    try:
        return Grid.model_validate({**values, **given})
    except ValidationError as error:
        source = f"{file}: " if file is not None else ""
        raise RecipeError(*dict.fromkeys(_explained(error, source, given))) from None


def _beside(file: Path, reference: Any) -> Any:
    """A recipe's file that a grid's file names, from where we are; kept relative, so that a cell has the same name
    on every machine."""
    if isinstance(reference, str) and reference.endswith((".yaml", ".yml")):
        return str(file.parent / Path(reference).expanduser())
    return reference


def _explained(error: ValidationError, source: str, given: Mapping[str, Any]) -> Iterator[str]:
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else ""
        where = field if field in given else f"{source}{field}"
        if field in ("tasks", "adapters") and len(item["loc"]) > 1:
            yield f"{where}: number {int(item['loc'][1]) + 1} is no name of a recipe; give a catalogue name or a file"
        elif item["type"] == "extra_forbidden":
            yield f"{where}: unknown key{did_you_mean(field, Grid.model_fields)}"
        elif item["type"] == "missing":
            yield f"{where}: is missing; name at least one"
        else:
            yield f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def split_commas(values: Sequence[str]) -> list[str]:
    """Every name of ``A,B`` and of options that are given many times."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def numbers(field: str, text: str | None) -> list[int | str]:
    """The numbers of ``0,1,2``; what is none stays text, for :class:`Grid` to judge.

    Raises:
        RecipeError: There is nothing between the commas.
    """
    names = split_commas([] if text is None else [text])
    if text is not None and not names:
        raise RecipeError(f"{field}: {text!r} names none")
    return [int(name) if name.isdecimal() else name for name in names]

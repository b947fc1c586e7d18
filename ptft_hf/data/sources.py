"""Where rows come from: the hub, local files and folders, or memory; one dict of raw splits for all."""

from __future__ import annotations

import glob
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import huggingface_hub.constants
import huggingface_hub.utils

from ptft_hf.data import files, images
from ptft_hf.errors import DataError, did_you_mean
from ptft_hf.recipes import DataSource, locate

SPLITS = ("train", "validation", "test")
ALIASES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "testing": "test",
}

_BUILDERS = {**files.KINDS, ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


class Raw(NamedTuple):
    """One split before its columns are renamed."""

    origin: str  # for messages: the file, folder or hub id
    data: datasets.Dataset | list[files.Row]
    untyped: bool = False  # all values are strings, as in csv

    @property
    def columns(self) -> list[str]:
        if isinstance(self.data, list):
            return list(dict.fromkeys(name for row in self.data for name in row))
        return list(self.data.column_names)


Source: TypeAlias = DataSource | datasets.Dataset | datasets.DatasetDict | str | os.PathLike[str]


def open_source(source: Source) -> tuple[dict[str, Raw], list[str]]:
    """All splits of a source that `split_map` asks for, by our names (train, validation, test), and notes.

    Raises:
        DataError: The source cannot be found, reached or read; a split it names does not exist; a converter
            fails.
    """
    if isinstance(source, datasets.Dataset):
        return {"train": Raw("the Dataset given", source)}, []
    if isinstance(source, datasets.DatasetDict):
        return choose({name: Raw("the DatasetDict given", data) for name, data in source.items()}, {})
    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            "a streamed data set has no length and cannot be split: load it without streaming=True"
        )
    if isinstance(source, str | os.PathLike):
        source = DataSource(path=os.fspath(source))
    if not isinstance(source, DataSource):
        raise DataError(
            f"{type(source).__name__} is no data source: give a Dataset, a DatasetDict, a path or a hub id"
        )
    splits, notes = choose(_load(source), {str(ours): theirs for ours, theirs in source.splits.items()})
    if source.converter is not None:
        convert = _converter(source.converter)
        splits = {name: _converted(name, raw, convert, source.converter) for name, raw in splits.items()}
    return splits, notes


def choose(splits: Mapping[str, Raw], wanted: Mapping[str, str]) -> tuple[dict[str, Raw], list[str]]:
    """Our splits out of a source's own, and notes about what was passed over.

    Args:
        splits: The source's splits by its names.
        wanted: Our name: the source's name, or a slice or sum of them as `datasets` writes it
            (``train[:2000]``, ``train+validation``). A split not named here goes by its own name or a usual
            one (``dev``), unless another one already uses it.
    """
    lengths = {name: len(raw.data) for name, raw in splits.items()}
    chosen: dict[str, Raw] = {}
    used: set[str] = set()
    problems = [
        f"splits: {name!r} is not one of {', '.join(SPLITS)}" for name in sorted(set(wanted) - set(SPLITS))
    ]
    for name in filter(wanted.__contains__, SPLITS):
        try:
            parts = datasets.ReadInstruction.from_spec(wanted[name]).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            near = did_you_mean(wanted[name], splits)
            problems.append(f"splits: {name}: {wanted[name]!r}: {error}; there are {', '.join(splits)}{near}")
            continue
        chosen[name] = _joined([(splits[part.splitname], part.from_, part.to) for part in parts])
        used |= {part.splitname for part in parts}
    if problems:
        raise DataError(*problems)
    for theirs in splits:
        ours = ALIASES.get(theirs, theirs)
        if ours in SPLITS and ours not in chosen and theirs not in used:
            chosen[ours] = splits[theirs]
            used.add(theirs)
    if not used and len(splits) == 1:
        ((theirs, raw),) = splits.items()
        return {"train": raw}, [f"the only split, {theirs!r}, is taken for training"]
    unused = [name for name in splits if name not in used]
    return chosen, [f"splits not used: {', '.join(unused)}"] if unused else []


def _joined(parts: list[tuple[Raw, int, int]]) -> Raw:
    """Slices of a source's splits in a row; a source gives all of them as lists or all as tables."""
    origin = ", ".join(dict.fromkeys(raw.origin for raw, _, _ in parts))
    untyped = all(raw.untyped for raw, _, _ in parts)
    lists = [raw.data[start:end] for raw, start, end in parts if isinstance(raw.data, list)]
    if lists:
        return Raw(origin, [row for rows in lists for row in rows], untyped)
    tables = [raw.data.select(range(start, end)) for raw, start, end in parts]  # type: ignore[union-attr]
    return Raw(origin, tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables))


def _load(source: DataSource) -> dict[str, Raw]:
    """The source's own splits by its names: local text files by `files`, everything else by `datasets`."""
    path = locate(source.path, None) if source.path is not None else None
    by_split = _files_by_split(source, path)
    if by_split is None and path is not None:
        by_split = _local_files(Path(path))
    if by_split and source.data_dir is None:
        local = _expanded(by_split)
        if path == "idx":
            return {
                name: Raw(", ".join(map(str, paths)), images.idx_split(name, paths))
                for name, paths in local.items()
            }
        kind = path if path in ("csv", "tsv", "json", "conll") else None
        if all(_plain(file, kind) for names in local.values() for file in names):
            return _read_files(local, kind)
        given = path if path in _BUILDERS.values() else None
        builder = given or _builder(next(iter(local.values()))[0])
        if builder == "conll":
            raise DataError(
                f"{path or source.data_files}: compressed CoNLL files are not read: unpack them first"
            )
        return _from_library(source, builder, {name: list(map(str, paths)) for name, paths in local.items()})
    if path is None:
        raise DataError("data: neither path nor data_files is given: name a hub id, a folder or files")
    folder = Path(path)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _from_library(source, path, None, load_from_disk=True)
    if _looks_local(path) and not folder.exists():
        raise DataError(_missing(folder))
    return _from_library(source, path, source.data_files)


def _files_by_split(source: DataSource, path: str | None) -> dict[str, list[str]] | None:
    """``data_files`` as lists by split if all are local, else None."""
    if source.data_files is None:
        return None
    given = source.data_files if isinstance(source.data_files, dict) else {"train": source.data_files}
    found = {name: [value] if isinstance(value, str) else list(value) for name, value in given.items()}
    found = {name: [locate(file, None) for file in names] for name, names in found.items()}
    packaged = path is None or path in (*_BUILDERS.values(), "tsv", "idx")
    if path is not None and not packaged and Path(path).is_dir():
        return {name: [str(Path(path, file)) for file in names] for name, names in found.items()}
    remote = any("://" in file for names in found.values() for file in names)
    return found if packaged and not remote else None


def _local_files(path: Path) -> dict[str, list[str]] | None:
    """A single data file as the split train; a folder of ``train.jsonl``, ``dev.jsonl``, ... by name."""
    if path.is_file():
        return {"train": [str(path)]}
    if not path.is_dir():
        return None
    found = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _BUILDERS]
    named = {file.stem: [str(file)] for file in found if ALIASES.get(file.stem, file.stem) in SPLITS}
    return named if len(named) == len(found) else None


def _expanded(by_split: Mapping[str, list[str]]) -> dict[str, list[Path]]:
    problems: list[str] = []
    expanded: dict[str, list[Path]] = {}
    for name, names in by_split.items():
        for file in names:
            path = Path(file).expanduser()
            matches = [path] if path.is_file() else [Path(match) for match in sorted(glob.glob(str(path)))]
            expanded.setdefault(name, []).extend(matches)
            if not matches:
                problems.append(f"data_files: {name}: {_missing(path)}")
    if problems:
        raise DataError(*problems)
    return expanded


def _missing(path: Path) -> str:
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    return f"{path} does not exist{where}{did_you_mean(path.name, siblings)}"


def _plain(path: Path, kind: str | None) -> bool:
    """Whether `files.read_rows` reads it: text, not compressed, of a known kind."""
    return path.suffix.lower() in files.KINDS or (kind is not None and path.suffix.lower() not in _COMPRESSED)


def _builder(path: Path) -> str:
    suffix = (path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path).suffix.lower()
    if suffix not in _BUILDERS:
        raise DataError(
            f"{path}: the ending {suffix!r} tells no format: it should be {', '.join(_BUILDERS)}, "
            "or say path: json (csv, parquet, text) beside data_files"
        )
    return _BUILDERS[suffix]


def _read_files(local: Mapping[str, list[Path]], kind: str | None) -> dict[str, Raw]:
    splits: dict[str, Raw] = {}
    problems: list[str] = []
    for name, paths in local.items():
        rows: list[files.Row] = []
        for path in paths:
            try:
                rows += files.read_rows(path, kind)
            except DataError as error:
                problems += error.problems
        kinds = {kind or files.KINDS[path.suffix.lower()] for path in paths}
        splits[name] = Raw(", ".join(map(str, paths)), rows, untyped=bool(kinds & {"csv", "tsv"}))
    if problems:
        raise DataError(*problems)
    return splits


def _from_library(
    source: DataSource, path: str, data_files: Any, *, load_from_disk: bool = False
) -> dict[str, Raw]:
    options = {
        "name": source.name,
        "data_files": data_files,
        "data_dir": source.data_dir,
        "revision": source.revision,
    }
    if path in ("csv", "tsv"):  # compressed or remote; pandas would otherwise read "None" and "NA" as missing
        options |= {"sep": "\t" if path == "tsv" else ",", "keep_default_na": False, "na_values": [""]}
        path = "csv"
    try:
        with quiet():
            if load_from_disk:
                loaded = datasets.load_from_disk(path)
            else:
                loaded = datasets.load_dataset(path, **{k: v for k, v in options.items() if v is not None})
    except Exception as error:  # builders run third-party code: whatever it raises becomes our one error
        raise DataError(_explained(error, path, data_files, source.revision)) from error
    origin = path if data_files is None else f"{path} {data_files}"
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {name: Raw(origin, data) for name, data in splits.items()}


def _explained(error: Exception, path: str, data_files: Any, revision: str | None) -> str:
    cause: BaseException = error
    while isinstance(error, datasets.exceptions.DatasetBuildError) and cause.__cause__ is not None:
        cause = cause.__cause__
    detail = f"{type(cause).__name__}: {cause}"
    if path in _BUILDERS.values() or Path(path).exists():
        return f"{path}{'' if data_files is None else f' {data_files}'} cannot be loaded: {detail}"
    what = f"data set {path!r} (revision {revision or 'main'})"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"{what} is not on the hub, or is private: check its name, or run 'hf auth login'. {detail}"
    if isinstance(error, ConnectionError) or "httpx" in type(error).__module__:
        return (
            f"{what} cannot be reached on the Hugging Face hub and is not in the cache: connect to the "
            f"network (HF_HUB_OFFLINE unset), or name local files with data_files. {detail}"
        )
    return f"{what} cannot be loaded: {detail}"


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or Path(path).suffix.lower() in (*_BUILDERS, *_COMPRESSED)


def _converter(name: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"converter: {name!r} cannot be imported ({error}): write package.module:function"
        ) from error
    if not callable(found):
        raise DataError(f"converter: {name!r} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _converted(name: str, raw: Raw, convert: Callable[[Iterable[Any]], Iterable[Any]], label: str) -> Raw:
    try:
        rows = [dict(row) for row in convert(raw.data)]
    except Exception as error:  # the converter is the user's code
        raise DataError(
            f"{raw.origin}: the converter {label!r} failed on split {name!r}: {type(error).__name__}: {error}"
        ) from error
    return Raw(f"{raw.origin} by {label}", rows)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets` and `huggingface_hub`; both are put back."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    # where the environment decides, the libraries refuse to be told otherwise
    bars = [
        library
        for library, decided in (
            (datasets, datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS),
            (huggingface_hub.utils, huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS),
        )
        if decided is None and not library.are_progress_bars_disabled()
    ]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for library in bars:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in bars:
            library.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

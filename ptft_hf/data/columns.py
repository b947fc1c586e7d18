"""From a source's columns to the family's: renamed, of one type in all splits, without useless rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets

from ptft_hf.data import files, images
from ptft_hf.data.sources import SPLITS, Raw
from ptft_hf.errors import DataError, did_you_mean

Tables = dict[str, datasets.Dataset]

_FEATURES = {
    "booleans": datasets.Value("bool"),
    "integers": datasets.Value("int64"),
    "numbers": datasets.Value("float64"),
    "strings": datasets.Value("string"),
    "lists of integers": datasets.List(datasets.Value("int64")),
    "lists of strings": datasets.List(datasets.Value("string")),
    "empty lists": datasets.List(datasets.Value("string")),
    "lists of objects": None,  # Arrow's own type: annotations may have other fields beside the family's
}
_NOT_ONE_TYPE = (
    ValueError,
    TypeError,
    NotImplementedError,
    OverflowError,
)  # Arrow's errors are subclasses of these
_NAMES = {bool: "booleans", int: "integers", float: "numbers", str: "strings", list: "lists", dict: "objects"}


class Schema(NamedTuple):
    """Which columns a family wants, and what this source calls them."""

    columns: Mapping[str, str]  # family's name: source's name, as the user wrote it
    required: tuple[str, ...]  # with the label
    optional: tuple[str, ...]
    label: str | None
    values: tuple[str, ...] = ()  # of the optional ones, what is no text

    @classmethod
    def of(
        cls,
        columns: Mapping[str, str],
        required: Sequence[str],
        optional: Sequence[str],
        label: str | None,
        values: Sequence[str] = (),
    ) -> Schema:
        needed = [*required] if label is None or label in required else [*required, label]
        others = tuple(name for name in optional if name not in needed)
        return cls(columns, tuple(needed), others, label, tuple(values))

    def fits(self, present: Iterable[str]) -> bool:
        """Whether a split with these columns has all that are required."""
        return {self.columns.get(name, name) for name in self.required} <= set(present)

    @property
    def texts(self) -> tuple[str, ...]:
        """The required columns without the label."""
        return tuple(name for name in self.required if name != self.label)


def prepare(raw: Mapping[str, Raw], schema: Schema, notes: list[str]) -> Tables:
    """The splits that have labels, clean, in our order; what was dropped is counted in ``notes``.

    Raises:
        DataError: Columns are missing, a split is empty or only train's labels are; labels of several types.
    """
    tables = _pick({name: raw[name] for name in SPLITS if name in raw}, schema, notes)
    tables = {name: _with_text(name, table, schema, notes) for name, table in tables.items()}
    if schema.label is not None:
        tables = _with_labels(tables, raw, schema, notes)
    tables = {name: _without_empty(name, table, schema, notes) for name, table in tables.items()}
    if gone := [name for name, table in tables.items() if not len(table)]:
        raise DataError(
            *(f"{raw[name].origin}: no row of {name} is left ({'; '.join(notes)})" for name in gone)
        )
    return tables


def _pick(raw: Mapping[str, Raw], schema: Schema, notes: list[str]) -> Tables:
    """The family's columns under their names; the faults of all splits together."""
    names, problems = _source_names(raw, schema)
    columns_of_train = set(raw["train"].columns) if "train" in raw else set()
    picked: Tables = {}
    for split, source in raw.items():
        present = source.columns
        if not len(source.data):
            problems.append(f"{source.origin}: split {split!r} has no rows")
        elif split != "train" and schema.label and names[schema.label] in columns_of_train - set(present):
            notes.append(f"{split}: no column {names[schema.label]!r}: the split is treated as missing")
        elif missing := [theirs for theirs in names.values() if theirs not in present]:
            problems += [
                f"{source.origin}: split {split!r} has no column {theirs!r}{did_you_mean(theirs, present)}; "
                f"it has {', '.join(map(repr, present))}. Say which one it is under columns"
                for theirs in missing
            ]
        else:
            picked[split] = _renamed(source, split, names, problems)
    if problems:
        raise DataError(*problems)
    return picked


def _source_names(raw: Mapping[str, Raw], schema: Schema) -> tuple[dict[str, str], list[str]]:
    """Family's name: source's name, with the optional columns that any split has; and the map's faults."""
    known = (*schema.required, *schema.optional)
    anywhere = {column for source in raw.values() for column in source.columns}
    wanted = [name for name in known if name not in schema.optional or name in {*schema.columns, *anywhere}]
    names = {name: schema.columns.get(name, name) for name in wanted}
    problems = [
        f"columns: the task has no {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
        for name in schema.columns
        if name not in known
    ]
    first: dict[str, str] = {}
    for name, theirs in names.items():
        if first.setdefault(theirs, name) != name:
            problems.append(f"columns: {first[theirs]!r} and {name!r} are both taken from {theirs!r}")
    return names, problems


def _renamed(source: Raw, split: str, names: Mapping[str, str], problems: list[str]) -> datasets.Dataset:
    if isinstance(source.data, list):
        columns = {ours: [row.get(theirs) for row in source.data] for ours, theirs in names.items()}
        try:
            return images.undecoded(datasets.Dataset.from_dict(columns))
        except _NOT_ONE_TYPE:
            where = f"{source.origin}: split {split!r}"
            problems += [
                f"{where}, column {names[ours]!r} {fault}"
                for ours in columns
                if (fault := _fault(columns[ours]))
            ]
            return datasets.Dataset.from_dict({})
    table = images.undecoded(source.data.with_format(None).select_columns(list(names.values())))
    table = table.rename_columns({theirs: ours for ours, theirs in names.items() if ours != theirs})
    for name, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            values = [feature.names[v] if v is not None and v >= 0 else None for v in table[name][:]]
            table = _replaced(table, name, values, _FEATURES["strings"])
        elif isinstance(inner := getattr(feature, "feature", None), datasets.ClassLabel):
            lists = [_list_names(value, inner.names) for value in table[name][:]]
            table = _replaced(table, name, lists, _FEATURES["lists of strings"])
    return table


def _list_names(value: list[int | None] | None, names: Sequence[str]) -> list[str] | None:
    if value is None or any(item is None or item < 0 for item in value):
        return None
    return [names[item] for item in value if item is not None]


def _fault(values: list[Any]) -> str | None:
    """Why Arrow cannot store a column: the first row of each type, or its own words if there is only one."""
    try:
        datasets.Dataset.from_dict({"column": values})
    except _NOT_ONE_TYPE as error:
        first: dict[str, str] = {}
        for row, value in enumerate(values, 1):
            if value is not None:
                kind = _NAMES.get(type(value), type(value).__name__)
                first.setdefault(kind, f"{kind} ({files.short(value)} in row {row})")
        return f"mixes {' and '.join(first.values())}" if len(first) > 1 else f"cannot be stored: {error}"
    return None


def _with_text(split: str, table: datasets.Dataset, schema: Schema, notes: list[str]) -> datasets.Dataset:
    """Numbers in text columns written out; None in the optional ones ''."""
    for name, feature in table.features.items():
        if name in (schema.label, *schema.values) or not isinstance(feature, datasets.Value):
            continue
        text = feature.dtype in ("string", "large_string", "null")
        values = table[name][:]
        if not text:
            notes.append(f"{split}: column {name!r} holds {feature.dtype}, taken as text")
        if not text or (name in schema.optional and None in values):
            blank = "" if name in schema.optional else None
            values = [blank if value is None else str(value) for value in values]
            table = _replaced(table, name, values, _FEATURES["strings"])
    return table


def _with_labels(tables: Tables, raw: Mapping[str, Raw], schema: Schema, notes: list[str]) -> Tables:
    """Labels of one type everywhere, rows without one dropped, splits without any left out."""
    label = str(schema.label)
    values = {name: table[label][:] for name, table in tables.items()}
    untyped = [name for name in values if raw[name].untyped]
    values |= zip(untyped, files.typed([values[name] for name in untyped]), strict=True)
    values = {
        name: [None if _is_missing(value) else value for value in column] for name, column in values.items()
    }
    if "train" in values and not any(value is not None for value in values["train"]):
        theirs = schema.columns.get(label, label)
        raise DataError(f"{raw['train'].origin}: no row of train has a label in column {theirs!r}")
    unlabelled = [name for name, column in values.items() if not any(value is not None for value in column)]
    for name in unlabelled:
        column = values.pop(name)
        notes.append(f"{name}: none of its {len(column):,} rows has a label: the split is treated as missing")
    if not values:
        return {}
    values = _whole_numbers(values)
    kind = _common_kind({name: _kinds(column) for name, column in values.items()}, raw, label)
    labelled: Tables = {}
    for name, column in values.items():
        keep = [row for row, value in enumerate(column) if value is not None]
        if len(keep) < len(column):
            notes.append(
                f"{name}: {len(column) - len(keep):,} of {len(column):,} rows have no label: dropped"
            )
        labelled[name] = _kept(_replaced(tables[name], label, column, _FEATURES[kind]), keep)
    return labelled


def _is_missing(value: Any) -> bool:
    return (
        value is None or (isinstance(value, float) and math.isnan(value)) or (value == "" or value == [None])
    )


def _whole_numbers(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Undo pandas, which turns a column of integers with gaps into floats."""
    floats = [name for name, column in values.items() if any(isinstance(value, float) for value in column)]
    rest = [
        value
        for name, column in values.items()
        if name not in floats
        for value in column
        if value is not None
    ]
    gaps = all(
        None in values[name] and all(v is None or float(v).is_integer() for v in values[name])
        for name in floats
    )
    if not floats or not gaps or not all(type(value) is int for value in rest):
        return values
    return {name: [None if v is None else int(v) for v in column] for name, column in values.items()}


def _kinds(column: Iterable[Any]) -> dict[str, Any]:
    """The kinds of labels in a column, each with its first value."""
    kinds: dict[str, Any] = {}
    for value in column:
        if isinstance(value, list):
            inner = {_NAMES.get(type(item), type(item).__name__) for item in value}
            kind = f"lists of {' and '.join(sorted(inner))}" if inner else "empty lists"
        else:
            kind = _NAMES.get(type(value), type(value).__name__)
        if value is not None:
            kinds.setdefault(kind, value)
    return kinds


def _common_kind(kinds: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Raw], label: str) -> str:
    """The one kind of label that all splits have; integers beside numbers are numbers."""
    found = {kind for split in kinds.values() for kind in split}
    if found == {"integers", "numbers"}:
        return "numbers"
    if len(found) > 1:
        found.discard("empty lists")
    if len(found) == 1 and found <= _FEATURES.keys():
        return found.pop()
    allowed = "strings, integers, booleans, numbers, or lists of strings, of integers or of objects"
    raise DataError(
        *(
            f"{raw[split].origin}: the labels of {split} are {kind}, such as {files.short(example)}; "
            f"{label!r} must be of one kind in all splits: {allowed}"
            for split, examples in kinds.items()
            for kind, example in examples.items()
        )
    )


def _without_empty(split: str, table: datasets.Dataset, schema: Schema, notes: list[str]) -> datasets.Dataset:
    """Rows with an empty text: dropped from train, kept as "" elsewhere, where all are to be answered."""
    pictures = [name for name in schema.texts if images.is_image(table.features[name])]
    for name in pictures:
        keep = [row for row, there in enumerate(images.present(table, name)) if there]
        if len(keep) < len(table):
            notes.append(f"{split}: {len(table) - len(keep):,} of {len(table):,} rows have no {name}: dropped")
            table = _kept(table, keep)
    columns = {name: table[name][:] for name in schema.texts if name not in pictures}
    empty = {row for values in columns.values() for row, value in enumerate(values) if is_empty(value)}
    if not empty:
        return table
    what = f"{split}: {len(empty):,} of {len(table):,} rows have an empty {' or '.join(columns)}"
    if split == "train":
        notes.append(f"{what}: dropped")
        return _kept(table, [row for row in range(len(table)) if row not in empty])
    notes.append(f"{what}: kept")
    for name, values in columns.items():
        if None in values:
            blank: Callable[[], Any] = str if isinstance(table.features[name], datasets.Value) else list
            filled = [blank() if value is None else value for value in values]
            feature = _FEATURES["strings"] if blank is str else table.features[name]
            table = _replaced(table, name, filled, feature)
    return table


def is_empty(value: Any) -> bool:
    """None, no tokens or messages, or nothing but white space."""
    return value is None or (not value.strip() if isinstance(value, str) else value == [])


def _replaced(table: datasets.Dataset, name: str, values: Sequence[Any], feature: Any) -> datasets.Dataset:
    order = table.column_names
    if order == [name]:  # a table without columns has no rows, to which one could be added
        return datasets.Dataset.from_dict({name: list(values)}, features=datasets.Features({name: feature}))
    return table.remove_columns(name).add_column(name, list(values), feature=feature).select_columns(order)


def _kept(table: datasets.Dataset, rows: list[int]) -> datasets.Dataset:
    return table if len(rows) == len(table) else table.select(rows)

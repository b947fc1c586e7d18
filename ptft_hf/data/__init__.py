"""From a data source to three clean splits with the family's column names, and what is wrong between them.

``load_splits`` reads, renames and cleans; ``check_leakage`` looks for the same text in two splits;
``fingerprint`` identifies rows. Whatever is dropped, guessed or made up is counted in ``Splits.notes``, which
the caller shows.

The rooms behind it, each importing only those before: ``files`` (csv and json with line numbers), ``sources``
(hub, folders, memory), ``columns`` (renaming and cleaning), ``images``, ``splitting``, ``subsets``, ``duplicates``,
``cleaning`` (of running text); ``converters`` for recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np

from ptft_hf.data import duplicates, images, splitting, subsets
from ptft_hf.data.cleaning import clean
from ptft_hf.data.columns import Schema, Tables, prepare
from ptft_hf.data.converters import aclsum_roles, aclsum_roles_multilabel, aclsum_summaries, scitldr
from ptft_hf.data.sources import SPLITS, Raw, Source, open_source, quiet
from ptft_hf.errors import DataError
from ptft_hf.recipes import Cleaning

__all__ = [
    "Splits",
    "aclsum_roles",
    "aclsum_roles_multilabel",
    "aclsum_summaries",
    "check_leakage",
    "clean",
    "clean_splits",
    "fingerprint",
    "load_split",
    "load_splits",
    "scitldr",
    "take",
]

HELD_OUT_FRACTION = 0.1  # of train, for each of validation and test that is missing
TEST_SEED = 0  # of the part of test that `take` keeps

Policy = Literal["warn", "drop", "error"]


class Splits(NamedTuple):
    """Three splits with the same columns: the family's names, nothing else."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    notes: list[str]  # what was dropped, guessed or made up, counted; one sentence each


def load_splits(
    source: Source,
    *,
    columns: Mapping[str, str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    seed: int,
    label_column: str | None = "label",
    otherwise: Sequence[Sequence[str]] = (),
    group_column: str | None = None,
    values: Sequence[str] = (),
) -> Splits:
    """Load, rename and clean the three splits of a data set.

    Args:
        source: A ``DataSource``, a ``datasets.Dataset`` (all of it is train) or ``DatasetDict``, or the path
            of a file (csv, tsv, json, jsonl, parquet by its ending; ``.gz`` too), of a folder (of split
            files, or written by ``save_to_disk``), or a hub id.
        columns: Family's name: the source's name, where the two differ.
        required: The family's columns that must be there; besides the label, what a row must not have empty.
        optional: The family's columns that are taken if they are there; None in them becomes ``""``.
        seed: For cutting a missing validation or test split from train.
        label_column: The family's name of the label column, always required; None if the family has none.
        otherwise: The columns of other layouts, of which the first that the source has is taken where it lacks what
            is ``required``. The last column of each is the label, unless the family has none.
        group_column: Rows with the same value in it stay together where a split is cut from train: the documents of
            running text. Not heeded if there are fewer than three values.
        values: Those of ``optional`` that hold no text, and keep their type: numbers, booleans.

    Returns:
        `Splits`. A missing validation or test split, or one without any label, is cut from train: 10 % of its
        texts, stratified by label where labels are strings, integers or booleans with enough rows, and never
        with a duplicate text on both sides. Rows of train with an empty text are dropped, those of the other
        splits kept. Rows without label (None, NaN, "", the -1 of a ClassLabel) are dropped. ClassLabels
        become their names; other labels keep their type, which must be one type in all splits. Labels in csv
        files are typed by what they spell in all splits together; all other csv values are text.

    Raises:
        DataError: Files missing or broken (with their lines), columns missing, splits empty, labels of
            several types, too few rows to cut a split from; all faults of one stage together.
        RecipeError: A ``package:`` path of a package that is not installed.
    """
    with quiet():
        raw, notes = open_source(source)
        if "train" not in raw:
            raise DataError(
                f"there is no split 'train', only {', '.join(raw) or 'none'}: name it under data.splits"
            )
        schema = _schema(raw["train"], columns, required, optional, label_column, otherwise, values)
        tables = prepare(raw, schema, notes)
        tables = _with_cuts(tables, schema, seed, notes, group_column)
    return Splits(tables["train"], tables["validation"], tables["test"], notes)


def load_split(
    source: Source,
    split: str = "test",
    *,
    columns: Mapping[str, str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    label_column: str | None = "label",
    otherwise: Sequence[Sequence[str]] = (),
    values: Sequence[str] = (),
) -> tuple[datasets.Dataset, list[str]]:
    """One split and the notes about it, cleaned as `load_splits` does; for evaluation.

    Nothing is cut from train: a source with one split only (a file, a ``Dataset``) is taken whole, whatever
    that split is called.

    Raises:
        DataError: As `load_splits`; or the split is not there, or has no label.
    """
    with quiet():
        raw, notes = open_source(source)
        if split not in raw and len(raw) == 1:
            raw, notes = {split: next(iter(raw.values()))}, []
        if split not in raw:
            raise DataError(f"there is no split {split!r}, only {', '.join(raw)}: name it under data.splits")
        schema = _schema(raw[split], columns, required, optional, label_column, otherwise, values)
        tables = prepare({split: raw[split]}, schema, notes)
    if split not in tables:
        raise DataError(f"{raw[split].origin}: no row of {split} has a label")
    return tables[split], notes


def _schema(
    raw: Raw,
    columns: Mapping[str, str],
    required: Sequence[str],
    optional: Sequence[str],
    label_column: str | None,
    otherwise: Sequence[Sequence[str]],
    values: Sequence[str],
) -> Schema:
    schema = Schema.of(columns, required, optional, label_column, values)
    if schema.fits(raw.columns):
        return schema
    others = [Schema.of(columns, names, (), label_column and names[-1]) for names in otherwise]
    named = (other for other in others if not set(columns).isdisjoint(other.required))
    return next((other for other in others if other.fits(raw.columns)), next(named, schema))


def check_leakage(
    splits: Splits, text_columns: Sequence[str], label_column: str | None, policy: Policy
) -> Splits:
    """Count the same text within train and in two splits, and act on it.

    Texts are the same exactly, or in all but case, white space, punctuation and Unicode form
    (``duplicates.fold``).

    Args:
        splits: What `load_splits` returned.
        text_columns: The columns that make up a text together; those that the splits do not have are passed
        over. label_column: To tell duplicates with conflicting labels; None where there is none.
        policy: ``warn`` counts them in the notes. ``drop`` also drops from train what stands in validation or
            test and what repeats an earlier row of train, and from validation what stands in test; test is
            never touched. ``error`` raises if a text stands in two splits (repeats within train are no leak,
            and only noted).

    Raises:
        DataError: Policy ``error`` and a text in two splits; policy ``drop`` and nothing is left of a split.
    """
    tables: Tables = {name: getattr(splits, name) for name in SPLITS}
    keys = {name: _keys(name, table, text_columns, label_column) for name, table in tables.items()}
    repeated = duplicates.within(keys["train"])
    pairs = (("train", "validation"), ("train", "test"), ("validation", "test"))
    shared = [duplicates.between(keys[first], keys[second]) for first, second in pairs]
    leaks = [f"leakage: {overlap}" for overlap in shared if overlap.rows]
    notes = [f"duplicates: {repeated}"] if repeated.rows else []
    if policy == "error" and leaks:
        raise DataError(
            *leaks, *notes, "leakage is set to error: repair the data, or set leakage to drop or warn"
        )
    notes = [*notes, *leaks] or ["no text stands twice in train or in two splits"]
    if policy == "drop":
        for name in ("train", "validation"):
            drop = {row for overlap in (repeated, *shared) if overlap.first == name for row in overlap.rows}
            keep = [row for row in range(len(tables[name])) if row not in drop]
            if not keep:
                raise DataError(
                    *notes, f"leakage is set to drop, which would leave no row of {name}: repair the data"
                )
            if drop:
                notes.append(f"{name}: {len(drop):,} duplicates dropped, {len(keep):,} rows left")
                tables[name] = tables[name].select(keep)
    return Splits(tables["train"], tables["validation"], tables["test"], [*splits.notes, *notes])


def clean_splits(splits: Splits, how: Cleaning) -> Splits:
    """Running text in all splits cleaned step by step, what each step changed counted in the notes.

    Raises:
        DataError: Nothing is left of a split.
    """
    notes = [*splits.notes]
    for name in SPLITS:
        table, found = clean(name, getattr(splits, name), how)
        if not len(table):
            raise DataError(*found, f"cleaning leaves no text of {name}: change its steps")
        splits, notes = splits._replace(**{name: table}), [*notes, *found]
    return splits._replace(notes=notes)


def take(splits: Splits, rows: Mapping[str, int], label_column: str | None, seed: int) -> Splits:
    """A part of a split, for learning curves and quick looks: stratified, and nested (`subsets.nested_order`).

    Args:
        splits: What `load_splits` or `check_leakage` returned.
        rows: How many rows to keep, by split; a split that is not named stays whole.
        label_column: To stratify by; None for a random choice.
        seed: Decides which rows of train and validation: with the same seed and data, the same. Those of test do not
            depend on it, since runs with different seeds are compared on the same examples.

    Raises:
        DataError: A split has fewer rows than are asked for.
    """
    problems = [
        f"{name}: {count:,} rows are asked for, and there are {len(getattr(splits, name)):,}"
        for name, count in rows.items()
        if not 0 < count <= len(getattr(splits, name))
    ]
    if problems:
        raise DataError(*problems)
    notes = [*splits.notes]
    for name, count in rows.items():
        table = getattr(splits, name)
        stratified = label_column in table.column_names
        labels = table[label_column][:] if stratified else [0.0] * len(table)
        used = TEST_SEED if name == "test" else seed
        kept = sorted(subsets.nested_order(labels, used)[:count])
        how = "stratified" if stratified else "at random"
        notes.append(f"{name}: {count:,} of {len(table):,} rows are taken ({how}, seed {used})")
        splits = splits._replace(**{name: table.select(kept)})
    return splits._replace(notes=notes)


def fingerprint(dataset: datasets.Dataset) -> str:
    """``"sha256:..."`` of the rows in order, whatever the library's version, format or column order."""
    digest = hashlib.sha256()
    for batch in images.hashed(dataset.with_format(None)).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_encoded)
            digest.update(text.encode("ascii") + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _encoded(value: Any) -> str:
    """What JSON has no type for: bytes, dates."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _keys(
    split: str, table: datasets.Dataset, text_columns: Sequence[str], label_column: str | None
) -> duplicates.Keys:
    names = [name for name in text_columns if name in table.column_names]
    comparable = images.hashed(table.select_columns(names))
    texts = [comparable[name][:] for name in names]
    return duplicates.keys(split, texts, None if label_column is None else table[label_column][:])


def _with_cuts(
    tables: Tables, schema: Schema, seed: int, notes: list[str], group_column: str | None
) -> Tables:
    """The splits that are missing, cut from train."""
    missing = [name for name in ("test", "validation") if name not in tables]
    if not missing:
        return tables
    tables = dict(tables)
    train = tables["train"]
    groups = _keys("train", train, schema.texts, None).folded
    names = list(map(duplicates.flatten, train[group_column][:])) if group_column in train.column_names else []
    whole = len(set(names)) > 2
    groups = names if whole else groups
    labels = train[schema.label][:] if schema.label is not None else None
    classes = None if labels is None or any(isinstance(label, float | list) for label in labels) else labels
    rng = np.random.default_rng(seed)
    rows = np.arange(len(train))
    share = HELD_OUT_FRACTION
    for name in missing:
        found = splitting.cut(
            [groups[row] for row in rows],
            None if classes is None else [classes[row] for row in rows],
            share,
            rng,
        )
        if found is None:
            raise DataError(f"train has {len(train)} rows, too few to cut {name} from: give a {name} split")
        held_out, stratified = found
        tables[name] = train.select(rows[held_out])
        rows = np.delete(rows, held_out)
        share /= 1 - share  # the second cut takes as many rows as the first
        how = "stratified by label" if stratified else f"at random{f', each {group_column} whole' if whole else ''}"
        notes.append(
            f"there is no {name} split: {len(held_out):,} rows of train are held out ({how}, seed {seed})"
        )
    tables["train"] = train.select(rows)
    return tables

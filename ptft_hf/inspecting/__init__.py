"""The label inspector: training data as the model will see it, what of it is trained, and what must not be.

The rooms behind it: ``checks`` (what is refused), ``showing`` (rows on a terminal). A family plugs in by
:class:`ptft_hf.tasks.marks.Inspected`; one of token labels needs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf import models, recipes, report, tasks
from ptft_hf.errors import DataError, RecipeError
from ptft_hf.inspecting.checks import Findings, check, untouched_randomness
from ptft_hf.inspecting.showing import show
from ptft_hf.models.skeleton import skeleton
from ptft_hf.tasks.marks import Segment, of_batch, pieces

__all__ = ["Findings", "Inspection", "check", "inspect", "rows_of", "segments_of", "show"]

WHOLE = 1 << 20
"""More tokens than any text that is shown has."""


class Inspection(NamedTuple):
    """What ``ptft inspect`` prints."""

    title: str
    rows: list[list[Segment]]
    findings: Findings
    """Of the training rows, whatever split is shown."""


def inspect(
    *,
    model: str,
    task: str | Path | recipes.TaskRecipe,
    split: str = "train",
    rows: int = 5,
    seed: int = 42,
    settings: Sequence[str] = (),
) -> Inspection:
    """Read data and tokenizer as a run would, and no weights.

    Args:
        model: Hub id, ``name@revision``, or folder of the checkpoint; or ``config:``, as in :func:`ptft_hf.train`.
        task: Catalogue name or file of a task recipe, or the recipe.
        split: ``train``, ``validation`` or ``test``.
        rows: How many are shown; the longest of the split is the last.
        seed: Of any split that is made.
        settings: As after ``--set``.

    Raises:
        PtftError: What would stop a run before its rows are encoded.
    """
    if split not in ("train", "validation", "test"):
        raise DataError(f"split: {split!r} is none of train, validation, test")
    recipe, _, _ = recipes.load_run(task, "full/default", settings)
    if recipe.data is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe")
    family = tasks.build(recipe)
    begins = recipes.from_nothing(model)
    if begins and (problems := tasks.faults_of_nothing(family, model)):
        raise RecipeError(*problems)
    splits = tasks.load_splits(family, recipe.data, recipe, seed)
    notes = [*splits.notes, *family.look_at(splits)]
    options = recipe.model_options
    if begins:
        tokenizer, bare, begun = _from_nothing(model, family, splits, options)
    else:
        tokenizer = models.load_reader(family.reads, model, **options)
        begun = family.look_at_checkpoint(models.from_pretrained("AutoConfig", model, options), tokenizer)
        bare = skeleton(model, family.auto_class, family.config(), **options)
    notes += begun
    max_length, said = models.fit_inputs(family.reads, tokenizer, bare, recipe.model)
    models.add_tokens(bare, tokenizer, recipe.add_tokens)
    encoded, cut = family.encode(splits.train, tokenizer, max_length)
    found = check(family, encoded, bare, tokenizer, cut, len(splits.train), model)
    raw = getattr(splits, split)
    if split != "train":
        encoded, cut = family.encode(raw, tokenizer, max_length)
    if cut:
        notes.append(models.too_long(split, cut, len(raw), max_length, family.long_inputs))
    return Inspection(
        f"{split}, {len(raw):,} rows, {len(encoded):,} inputs of up to {max(encoded['length'][:]):,} {family.unit}",
        rows_of(family, raw, encoded, tokenizer, rows),
        Findings(found.data, found.model, [*notes, *said, *found.notes]),
    )


def _from_nothing(
    model: str, family: tasks.Task, splits: Any, options: Mapping[str, Any]
) -> tuple[Any, Any, list[str]]:
    """What reads the rows, trained on them as before a run, and the architecture."""
    config = models.config_of(model, {**options, **family.config()})
    reader, notes = family.reader_from_nothing(model, config, splits.train)
    return reader, models.random_model(model, family.auto_class, config, reader, options).model, notes


def rows_of(task: Any, raw: Any, encoded: Any, tokenizer: Any, count: int) -> list[list[Segment]]:
    """The first encoded rows and, as the last of them, the longest, where tails may be cut off."""
    lengths = encoded["length"][:]
    chosen = list(range(min(count, len(lengths))))
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if chosen and longest not in chosen:
        chosen[-1] = longest
    one_to_one = getattr(task, "loses_tails", True) and raw is not None and len(raw) == len(encoded)
    shown = []
    with models.quiet(), untouched_randomness():
        for i in chosen:
            (row,) = encoded.select([i]).to_list()
            tail = _tail(task, raw, i, row, tokenizer) if one_to_one and "input_ids" in row else []
            shown.append([*segments_of(task, row, tokenizer), *tail])
    return shown


def segments_of(task: Any, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
    """An encoded row in marked pieces, by the family or else by its collated batch."""
    if hasattr(task, "segments"):
        found: list[Segment] = task.segments(row, tokenizer)
        return found
    batch = task.collator(tokenizer)([dict(row)])
    marked = of_batch(batch, tokenizer, task.config().get("id2label"), getattr(task, "auto_class", ""))
    if marked is not None:
        return marked
    ids = row["input_ids"]
    return [Segment(f"{row.get('labels')} <- "), *pieces(tokenizer, ids, [("input", "")] * len(ids))]


def _tail(task: Any, raw: Any, number: int, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
    """What of a row's text the model does not read."""
    with report.silence():
        whole = task.encode(raw.select([number]), tokenizer, WHOLE)[0]["input_ids"][0]
    read = row["input_ids"]
    if len(whole) <= len(read):
        return []
    same = next((i for i, (a, b) in enumerate(zip(whole, read, strict=False)) if a != b), len(read))
    text = tokenizer.decode(whole[same:], skip_special_tokens=True).strip()
    return [Segment(f" ... {len(whole) - len(read)} tokens cut: {text}", "cut")]

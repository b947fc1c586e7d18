"""What must hold of encoded training rows, whatever the family: read off their collated batches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ptft_hf.errors import DataError, ModelError
from ptft_hf.tasks.marks import IGNORED, apart, is_read

SAMPLE = 256
"""Rows that are collated and looked into, at equal distances."""
BATCH = 32
GENERATES = "AutoModelForSeq2SeqLM"


class Findings(NamedTuple):
    """What is wrong, by what is to be mended, and what is merely to be said aloud."""

    data: list[str]
    model: list[str]
    notes: list[str]

    def refuse(self) -> None:
        """Raise all that is wrong.

        Raises:
            DataError: Rows or labels are wrong.
            ModelError: Tokenizer, template or masking are wrong.
        """
        if self.data or self.model:
            raise (ModelError if self.model else DataError)(*self.model, *self.data)


def check(task: Any, encoded: Any, model: Any, tokenizer: Any, cut: int, rows: int, reference: str) -> Findings:
    """Everything that the label inspector refuses, looked for in the training rows.

    Args:
        task: The family; see :class:`ptft_hf.tasks.marks.Inspected`.
        encoded: All training rows.
        model: Its configuration names the end tokens; weights are not needed.
        tokenizer: That of the batches.
        cut: How many of the ``rows`` are longer than ``max_length``.
        rows: Training rows before they were encoded.
        reference: The checkpoint, for messages.
    """
    found = Findings([], [], [])
    _classes(task, encoded, found)
    _truncated(task, cut, rows, found)
    if getattr(tokenizer, "all_special_ids", None) is not None:  # an image has no tokens
        if "input_ids" in encoded.column_names:
            _unknown(encoded, tokenizer, reference, found)
        _tokens(task, encoded, end_tokens(model, tokenizer), tokenizer, found)
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which generation stops."""
    known: set[int] = set()
    settings = (tokenizer, model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    for one in settings:
        ids = getattr(one, "eos_token_id", None)
        known |= {ids} if isinstance(ids, int) else set(ids or ())
    return known


# ---- classes and tags ----


def _classes(task: Any, encoded: Any, found: Findings) -> None:
    names = task.config().get("id2label")
    if not names or "labels" not in encoded.column_names:
        return
    column = encoded["labels"][:]
    if isinstance(column[0], int):
        counts = Counter(column)
        if len(counts) == 1:
            found.data.append(
                f"train: all {len(column):,} rows are of the class {names[column[0]]!r}: there is nothing to tell "
                "apart; add rows of another class"
            )
        return
    if not isinstance(column[0], list) or not all(isinstance(x, int) for x in column[0]):
        return
    counts = Counter(x for labels in column for x in labels if x != IGNORED)
    if not counts:
        return  # nothing is trained, which is said elsewhere
    kinds: dict[str, list[int]] = {}
    for i, name in names.items():
        kinds.setdefault(name[2:] if name[:2] in ("B-", "I-") else name, []).append(i)
    for kind, ids in kinds.items():
        bare = [names[i] for i in ids if not counts[i]]
        if len(bare) == len(ids):
            found.data.append(
                f"train: no word carries {' or '.join(map(repr, bare))}: the model would have a label that it never "
                f"sees; add rows with {kind!r}, or take it out of the labels"
            )
        elif bare:
            found.notes.append(f"train: no word carries {', '.join(map(repr, bare))}")


def _truncated(task: Any, cut: int, rows: int, found: Findings) -> None:
    allowed = getattr(task.recipe, "max_truncated", 1.0)
    if getattr(task, "loses_tails", True) and rows and cut / rows > allowed:
        found.data.append(
            f"train: {cut:,} of {rows:,} inputs ({cut / rows:.0%}) lose their end, and max_truncated allows "
            f"{allowed:.0%}; raise model.max_length, shorten the texts, or raise task.max_truncated"
        )


# ---- tokens ----


def _unknown(encoded: Any, tokenizer: Any, reference: str, found: Findings) -> None:
    """Without its files upstream builds some architectures a tokenizer that knows no words, and says nothing."""
    unknown = tokenizer.unk_token_id
    marks = set(tokenizer.all_special_ids) - {unknown}
    ids = {i for row in encoded.select(range(min(100, len(encoded))))["input_ids"] for i in row} - marks
    if ids == {unknown}:
        found.model.append(
            f"{reference}: its tokenizer knows no word of the training texts (all are {tokenizer.unk_token!r}); are "
            "the tokenizer's files (tokenizer.json, vocab.txt, ...) there, and of this language?"
        )


class _Seen:
    """Counts over the batches that were looked into."""

    def __init__(self) -> None:
        self.rows = self.nothing = self.begun_twice = self.padding = self.unlearnt_ends = 0
        self.trained: set[int] = set()


def _tokens(task: Any, encoded: Any, ends: set[int], tokenizer: Any, found: Findings) -> None:
    seen = _Seen()
    for batch in batches(task, encoded, tokenizer):
        _look_into(batch, ends, tokenizer, seen, task.auto_class)
    begin = tokenizer.bos_token or tokenizer.cls_token
    if 2 * seen.begun_twice > seen.rows:
        found.model.append(
            f"inputs begin with {begin!r} twice (in {seen.begun_twice} of {seen.rows} rows looked into): a template "
            "writes it and the tokenizer adds it again; leave it out of one (add_special_tokens=False, or the "
            "template's own)"
        )
    elif seen.begun_twice:
        found.notes.append(f"train: {seen.begun_twice} of {seen.rows} rows looked into begin with {begin!r} twice")
    if seen.nothing == seen.rows:
        found.data.append(
            f"nothing is trained: all labels of the {seen.rows} training rows looked into are {IGNORED}; does the "
            "part that is to be learnt stand within model.max_length, and does the mask find it?"
        )
        return
    if seen.nothing:
        found.notes.append(f"train: in {seen.nothing} of {seen.rows} rows looked into nothing is trained")
    if seen.padding:
        found.model.append(
            f"padding is trained: {seen.padding} labels stand on padding ({tokenizer.pad_token!r}); where padding "
            f"and end token are one, mask labels by the attention mask, with {IGNORED}"
        )
    generates = getattr(task, "trains_end_token", task.auto_class == GENERATES)
    if generates and seen.trained and ends and not seen.trained & ends:
        shown = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends))))
        if seen.unlearnt_ends and tokenizer.pad_token_id in ends:
            found.model.append(
                f"padding is confused with the end token: both are {tokenizer.pad_token!r}, and labels are masked by "
                "its number, so that the model never learns to stop; mask them by the attention mask"
            )
        else:
            found.model.append(
                f"the end token ({shown}) is never trained in the {seen.rows} rows looked into, so the model would "
                "not learn to stop; are all targets cut off, or does the template leave it out?"
            )


def _look_into(batch: Mapping[str, Any], ends: set[int], tokenizer: Any, seen: _Seen, auto_class: str) -> None:
    ids, labels = batch["input_ids"], batch.get("labels")
    read = is_read(batch)
    seen.rows += len(ids)
    marks = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    for row, real in zip(ids, read, strict=True):
        first = row[real][:2].tolist()
        seen.begun_twice += len(first) == 2 and first[0] == first[1] and first[0] in marks
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return
    learnt = labels != IGNORED
    seen.nothing += int((~learnt.any(-1)).sum())
    seen.trained |= set(labels[learnt].unique().tolist())
    if not apart(batch, auto_class):
        seen.padding += int((learnt & ~read).sum())
        # Labels that are shifted already stand one place before their token.
        at_place = bool((labels == ids)[learnt].all())
        own = learnt if at_place else torch.cat([learnt.new_zeros(len(learnt), 1), learnt[:, :-1]], dim=1)
        # An end that follows what is trained; those of prompts are rightly not learnt.
        follows = torch.cat([own.new_zeros(len(own), 1), own[:, :-1]], dim=1)
        seen.unlearnt_ends += int((torch.isin(ids, torch.tensor(sorted(ends))) & read & ~own & follows).sum())
    elif tokenizer.pad_token_id not in ends:
        seen.padding += int((labels == tokenizer.pad_token_id).sum())
    else:  # of several ends in a row all but the first are padding
        same = labels == tokenizer.pad_token_id
        seen.padding += int((same[:, 1:] & same[:, :-1]).sum())


def batches(task: Any, encoded: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Some training rows as the model would get them; random numbers that a collator draws are not missed later."""
    count = min(SAMPLE, len(encoded))
    rows = [i * len(encoded) // count for i in range(count)]
    collate = task.collator(tokenizer)
    with untouched_randomness():
        for start in range(0, count, BATCH):
            yield collate(encoded.select(rows[start : start + BATCH]).to_list())


@contextmanager
def untouched_randomness() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)

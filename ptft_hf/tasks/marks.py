"""An encoded row in marked pieces: what the model reads, what of it is trained, and towards what.

A family says it in its own ``segments(row, tokenizer)``; for families of token labels :func:`of_batch` tells it
from a collated batch, whatever the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

IGNORED = -100
"""The label of tokens that are not trained."""

Mark = Literal["input", "trained", "special", "cut"]
"""What is read only; what is trained; marks of the tokenizer; what was cut off and is not read."""


class Segment(NamedTuple):
    """A piece of a row as a person reads it."""

    text: str
    mark: Mark = "input"
    label: str = ""
    """What is trained *here*, where it is not the text itself: a tag, the word behind a mask."""


class Inspected(Protocol):
    """What a family may say of itself to the label inspector. All of it may be left out."""

    trains_end_token: bool
    """Whether the model must learn to stop, so that the end token must be among what is trained. Default: for
    encoder-decoders that generate."""
    loses_tails: bool
    """Whether what is longer than ``max_length`` is not read to its end. Default: it is not."""

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """An encoded row in pieces. Default: as :func:`of_batch` has it, else the
        inputs behind their labels."""


def pieces(tokenizer: Any, ids: Sequence[int], marks: Sequence[tuple[Mark, str]]) -> list[Segment]:
    """Decoded tokens, neighbours of one mark together; tokens with a label stand alone.

    A piece is what the text grows by: decoded by itself it would lose the space before it.

    Args:
        tokenizer: Decodes; its special tokens are shown as they are written.
        ids: ``[T]``.
        marks: ``[T]``, a mark and a label for each token; special tokens that are not trained become ``special``.
    """
    special = set(tokenizer.all_special_ids)
    kinds: list[tuple[Mark, str]] = [
        ("special", "") if i in special and mark == "input" else (mark, label)
        for i, (mark, label) in zip(ids, marks, strict=True)
    ]
    found: list[Segment] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start] and not kinds[start][1]:
            continue
        text = tokenizer.decode(ids[:end])
        grown = text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[start:end])
        found.append(Segment(grown, *kinds[start]))
        start, before = end, text
    return found


def apart(batch: Mapping[str, Any], auto_class: str = "") -> bool:
    """Whether labels are a decoder's own text, beside the encoder's, and not those of the input's tokens. Their
    shapes do not tell: a target may be as long as its input."""
    written = "decoder_input_ids" in batch or auto_class == "AutoModelForSeq2SeqLM"
    return written or batch["labels"].shape != batch["input_ids"].shape


def of_batch(
    batch: Mapping[str, Any], tokenizer: Any, names: Mapping[int, str] | None, auto_class: str = ""
) -> list[Segment] | None:
    """The only row of a collated batch, by its ``input_ids``, ``attention_mask`` and ``labels``; None if there is
    not a label for each token.

    Labels of as many tokens as the input are told apart by what they say: the next token (a decoder, shifted), the
    token itself (a decoder, not yet shifted), or another one (a masked token). Others are a decoder's own text.

    Args:
        batch: Tensors ``[1, T]``; padding is not shown.
        tokenizer: Decodes.
        names: Of the labels, where they are classes and not tokens.
        auto_class: The family's.
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2 or labels.is_floating_point() or "input_ids" not in batch:
        return None  # a class, a number, or an indicator for each class
    ids, wanted = batch["input_ids"][0].tolist(), labels[0].tolist()
    read = is_read(batch)[0].tolist()
    if apart(batch, auto_class):
        source = [i for i, real in zip(ids, read, strict=True) if real]
        target = [i for i in wanted if i != IGNORED]
        learnt = pieces(tokenizer, target, [("trained", "")] * len(target))
        return [*pieces(tokenizer, source, [("input", "")] * len(source)), Segment(" -> "), *learnt]
    kept = [(i, label) for i, label, real in zip(ids, wanted, read, strict=True) if real]
    ids, wanted = [i for i, _ in kept], [label for _, label in kept]
    if names is not None:
        marks = [_marked(label, names.get(label, str(label))) for label in wanted]
        return pieces(tokenizer, ids, marks)
    if shifted(ids, wanted):
        after = [IGNORED, *wanted]
        ids = ids if after[-1] == IGNORED else [*ids, after[-1]]
        return pieces(tokenizer, ids, [_marked(label, "") for label in after[: len(ids)]])
    same = all(label in (IGNORED, i) for i, label in zip(ids, wanted, strict=True))
    words = {label: "" if same else tokenizer.decode([label]).strip() for label in {*wanted} - {IGNORED}}
    marks = [_marked(label, words.get(label, "")) for label in wanted]
    return pieces(tokenizer, ids, marks)


def is_read(batch: Mapping[str, Any]) -> Any:
    """``[B, T]``: False at padding, as far as the attention mask tells; one of tokens x tokens does not."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else batch["input_ids"] == batch["input_ids"]


def shifted(ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Whether each label is the token that follows its own: ``[T]`` tokens without padding, and their labels."""
    pairs = [(label, follower) for label, follower in zip(labels, ids[1:], strict=False) if label != IGNORED]
    return any(label != IGNORED for label in labels) and all(label == follower for label, follower in pairs)


def _marked(label: int, name: str) -> tuple[Mark, str]:
    return ("input", "") if label == IGNORED else ("trained", name)

"""Converters: from a data set's own nested rows to flat ones, named in a recipe as ``converter:
    package.module:function``.

A converter takes the raw rows of one split and yields rows with plain columns; it may yield more or fewer
rows than it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

ACLSUM_ASPECTS = ("challenge", "approach", "outcome")


def digits(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998; the test part of UCI's optdigits).

    Args:
        rows: Lines of ``digits.csv``: ``{"text": "0,0,5,...,8"}``, 64 values from 0 to 16, row by row of an image
            of 8 x 8, and the digit.

    Yields:
        ``{"image": PIL.Image in grey, 0 to 255, "label": int}``.

    Raises:
        ValueError: A line has not 65 numbers.
    """
    import numpy as np
    from PIL import Image

    for number, row in enumerate(rows, 1):
        values = [int(float(value)) for value in row["text"].split(",")]
        if len(values) != 65:
            raise ValueError(f"line {number}: {len(values)} values, not 64 and a digit")
        pixels = np.array(values[:64]).reshape(8, 8)
        yield {"image": Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)), "label": values[64]}


def aclsum_roles(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sentences of ACLSum papers with one role each.

    ACLSum (Takeshita et al., NAACL 2024) marks the sentences of a paper's abstract, introduction and
    conclusion that state its challenge, approach or outcome. A sentence with several aspects counts as the
    first of these three; one with no aspect is ``"none"``.

    Args:
        rows: Papers: ``sentences`` {section: [text]}, ``highlights`` {aspect: {section: [0 or 1]}}.

    Yields:
        ``{"text": str, "label": "challenge" | "approach" | "outcome" | "none"}``, in reading order.

    Raises:
        ValueError: A section has not one mark per sentence.
    """
    for row in aclsum_roles_multilabel(rows):
        yield {"text": row["text"], "label": next(iter(row["label"]), "none")}


def aclsum_roles_multilabel(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """As `aclsum_roles`, but ``label`` is the list of all the aspects of a sentence, possibly empty."""
    for row in rows:
        for section, sentences in row["sentences"].items():
            marks = {aspect: row["highlights"][aspect].get(section) or [] for aspect in ACLSUM_ASPECTS}
            for aspect, values in marks.items():
                if len(values) != len(sentences or []):
                    raise ValueError(
                        f"paper {row.get('id')!r}, section {section!r}: {len(sentences or [])} sentences "
                        f"but {len(values)} marks for {aspect!r}"
                    )
            for index, text in enumerate(sentences or []):
                yield {"text": text, "label": [aspect for aspect in ACLSUM_ASPECTS if marks[aspect][index]]}


def aclsum_summaries(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Papers of ACLSum with their three summaries, one sentence for each aspect.

    Args:
        rows: Papers: ``sentences`` {section: [text]}, ``summary`` {aspect: text}.

    Yields:
        ``{"document": abstract, introduction and conclusion, "challenge": str, "approach": str, "outcome": str}``.
    """
    for row in rows:
        sections = [" ".join(sentences or []) for sentences in row["sentences"].values()]
        document = "\n\n".join(filter(None, sections))
        yield {"document": document, **{aspect: row["summary"][aspect] for aspect in ACLSUM_ASPECTS}}


def scitldr(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """SciTLDR (Cachola et al. 2020) with its sentences joined; the summary is the list of all that were written.

    Args:
        rows: Papers: ``source`` and ``target``, lists of sentences and of summaries.

    Yields:
        ``{"document": str, "summary": [str]}``.
    """
    for row in rows:
        yield {"document": " ".join(row["source"]), "summary": list(row["target"])}


def alpaca(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Alpaca's and Dolly's rows as conversations of two turns: the instruction with its input, and the answer.

    Args:
        rows: ``instruction``, ``input`` and ``output`` (Alpaca), or ``instruction``, ``context`` and ``response``
            (Dolly); the second may be empty.

    Yields:
        ``{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}``; rows without an answer are passed over.
    """
    for row in rows:
        given = row.get("input", row.get("context"))
        answer = row.get("output", row.get("response"))
        if not answer:
            continue
        asked = "\n\n".join(filter(None, (row["instruction"], given)))
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}

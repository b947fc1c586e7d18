"""Documents and their summaries as the data has them: each a text, or a list of references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptft_hf.tasks import rouge


def references_of(summary: str | Sequence[str]) -> list[str]:
    """A row's references; the first is trained."""
    return [summary] if isinstance(summary, str) else list(summary)


def is_summary(value: Any) -> bool:
    """Whether it is a text, or a list of texts, that are not empty."""
    texts = references_of(value) if isinstance(value, str | list) else []
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def faults(split: str, table: Any) -> list[str]:
    """What is wrong with a split's rows; of each kind the first three."""
    documents = [
        f"{split}: row {row} has a 'document' that is no text; name a converter that makes one of it"
        for row, text in enumerate(table["document"][:], 1)
        if not isinstance(text, str)
    ]
    summaries = [
        f"{split}: row {row} has the 'summary' {str(value)[:60]!r}; expected a text, or a list of texts that are not "
        "empty"
        for row, value in enumerate(table["summary"][:], 1)
        if not is_summary(value)
    ]
    return documents[:3] + summaries[:3]


def described(split: str, table: Any) -> str:
    """How long documents and first references are, in words, and how many rows have several."""
    documents, references = table["document"][:], [references_of(value) for value in table["summary"][:]]
    first = sorted(rouge.words_of(texts[:1]) for texts in references)
    several = sum(len(texts) > 1 for texts in references)
    more = f"; {several:,} have several references" if several else ""
    return (
        f"{split}: documents of {rouge.words_of(documents) / len(documents):.0f} words on average, summaries of "
        f"{sum(first) / len(first):.0f} (one in twenty has more than {first[int(0.95 * (len(first) - 1))]}){more}"
    )

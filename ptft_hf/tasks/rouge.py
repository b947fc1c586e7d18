"""Figures of summaries: ROUGE, and what ROUGE does not see. Computed here, from nothing that is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

VARIANTS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NGRAM = 3
"""Words of the n-grams that are counted as copied or repeated."""
SENTENCE_END = re.compile(r"([.!?][\"')\]]*)\s+(?=[\"'(\[]*[A-Z0-9])")
WORD = re.compile(r"\w+")


@cache
def _scorer() -> Any:
    """Google's ``rouge_score`` with the Porter stemmer, as published figures are computed; English alone, since its
    words are ``[a-z0-9]+``."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(VARIANTS), use_stemmer=True)


def in_sentences(text: str) -> str:
    """A line for each sentence, which rougeLsum compares one by one: after ``.``, ``!`` or ``?`` with white space and
    a capital or a digit behind it, and where there are lines already."""
    return SENTENCE_END.sub(r"\1\n", text)


def rouge(summary: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of :data:`VARIANTS` (Lin 2004), 0 to 1; of several references the best, for each variant by itself
    (the paper's section 2.1)."""
    found = _scorer().score_multi([in_sentences(r) for r in references], in_sentences(summary))
    return {name: float(found[name].fmeasure) for name in VARIANTS}


def ngrams(text: str) -> list[tuple[str, ...]]:
    """Runs of three words, without case."""
    words = WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(NGRAM)), strict=False))


def copied_ngrams(summaries: Sequence[str], documents: Sequence[str]) -> float:
    """The share of all summaries' n-grams that stand in their documents; 0 where there are none."""
    total = copied = 0
    for summary, document in zip(summaries, documents, strict=True):
        own, there = ngrams(summary), set(ngrams(document))
        total, copied = total + len(own), copied + sum(gram in there for gram in own)
    return copied / total if total else 0.0


def repetition(summaries: Sequence[str]) -> float:
    """The share of all summaries' n-grams that stood in the same summary before; 0 where there are none."""
    grams = [ngrams(summary) for summary in summaries]
    total = sum(map(len, grams))
    return sum(len(g) - len(set(g)) for g in grams) / total if total else 0.0


def words_of(texts: Sequence[str]) -> int:
    return sum(len(WORD.findall(text)) for text in texts)


def length_ratio(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Words of all summaries over those of their references, each row's being the mean of its references'."""
    wanted = sum(words_of(texts) / len(texts) for texts in references)
    return words_of(summaries) / wanted if wanted else 0.0


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

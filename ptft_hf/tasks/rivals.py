"""The cheap rivals that a reward model must beat: an answer's length, and its words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

WORD = re.compile(r"\w+")
WORDS = 5_000
"""The most frequent words of the training answers; more would make ``run.json`` long, and tell little."""
STRENGTH = 0.01
"""``C`` of the logistic regression: on QA-Feedback's validation pairs 0.01 and less are better than 0.1 and more."""

Pair = Sequence[str]
"""The better answer and the other one."""


class Rivals(NamedTuple):
    """Both, as they were fitted on training pairs.

    Attributes:
        longer: Whether the longer answer is taken for the better one; else the shorter.
        words: Each word's weight: that of an answer is the sum over its words.
    """

    longer: bool
    words: Mapping[str, float]

    def differences(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """By how much each rival prefers the first answers, ``[N]``: ``length`` and ``bag_of_words``."""
        sign = 1 if self.longer else -1
        scores = [[self._score(answer) for answer in pair] for pair in pairs]
        return {
            "length": np.array([sign * (words_of(first) - words_of(second)) for first, second in pairs], float),
            "bag_of_words": np.array([first - second for first, second in scores]),
        }

    def _score(self, answer: str) -> float:
        return sum(self.words.get(word, 0.0) for word in WORD.findall(answer.lower()))


def words_of(answer: str) -> int:
    """An answer's length."""
    return len(answer.split())


def fit(pairs: Sequence[Pair]) -> Rivals:
    """The direction in which length is right more often, and a logistic regression on the difference of word counts
    (scikit-learn's, without intercept: a pair is the same pair the other way round)."""
    lengths = np.array([[words_of(answer) for answer in pair] for pair in pairs])
    longer = bool(np.sign(lengths[:, 0] - lengths[:, 1]).sum() >= 0)
    counts = [[Counter(WORD.findall(answer.lower())) for answer in pair] for pair in pairs]
    total: Counter[str] = Counter()
    for pair in counts:
        for count in pair:
            total.update(count)
    return Rivals(longer, _weights(counts, [word for word, _ in total.most_common(WORDS)]))


def _weights(counts: Sequence[Sequence[Counter[str]]], words: Sequence[str]) -> dict[str, float]:
    if not words:
        return {}
    from scipy.sparse import csr_array, vstack
    from sklearn.linear_model import LogisticRegression

    place = {word: i for i, word in enumerate(words)}
    cells: dict[tuple[int, int], int] = {}
    for row, pair in enumerate(counts):
        for sign, count in zip((1, -1), pair, strict=True):
            for word, number in count.items():
                if word in place:
                    cells[row, place[word]] = cells.get((row, place[word]), 0) + sign * number
    values, (rows, columns) = list(cells.values()), zip(*cells, strict=True)
    table = csr_array((np.array(values, float), (rows, columns)), (len(counts), len(words)))
    answer = np.repeat([1, 0], len(counts))
    model = LogisticRegression(C=STRENGTH, fit_intercept=False, max_iter=1_000)
    model.fit(vstack([table, -table]).tocsr(), answer)
    return {word: round(float(weight), 5) for word, weight in zip(words, model.coef_[0], strict=True) if weight}

"""A reward model's scores of pairs of answers, judged: accuracy, calibration, the rivals, the answers' length."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ptft_hf import metrics
from ptft_hf.tasks import rivals
from ptft_hf.tasks.rivals import Rivals


class Targets(NamedTuple):
    """What outputs are compared with.

    Attributes:
        labels: ``[N, 2]``: the probability that the first answer is the better one, and the margin; None if unknown.
        answers: The texts of each row's answers.
    """

    labels: np.ndarray | None
    answers: list[list[str]]

    @property
    def decided(self) -> np.ndarray:
        """``[N]``: whether a pair is no tie."""
        assert self.labels is not None
        return np.asarray(self.labels[:, 0] != 0.5)


def differences(outputs: np.ndarray) -> np.ndarray:
    """``[N]``, of scores ``[N, 2]``."""
    scores = outputs.astype(np.float64)
    return np.asarray(scores[:, 0] - scores[:, 1])


def chances(differences: Any) -> Any:
    """That the first answer is the better one, by Bradley and Terry's model."""
    from scipy.special import expit

    return expit(differences)


def accuracy(outputs: np.ndarray, targets: Targets) -> float:
    """The share of pairs whose better answer has the higher score; equal scores count 1/2, ties are left out, and
    without any other pair it is 0."""
    decided = targets.decided
    return metrics.pairwise_accuracy(differences(outputs)[decided]) if decided.any() else 0.0


def outcomes(outputs: np.ndarray, targets: Targets) -> list[float]:
    """1.0 for a pair whose better answer has the higher score, 0.0 for the lower one, 0.5 for equal ones, and for
    ties."""
    scores = (np.sign(differences(outputs)) + 1) / 2
    return [float(score) for score in np.where(targets.decided, scores, 0.5)]


def report(outputs: np.ndarray, targets: Targets, others: Rivals | None) -> dict[str, Any]:
    """The accuracy's 95 % interval (Wilson), and the cheap rivals' accuracy on the same pairs; the calibration error
    of :func:`chances`; how far scores follow the answers' length, in words."""
    decided = targets.decided
    found: dict[str, Any] = {"pairs": int(decided.sum()), "ties": int((~decided).sum())}
    if decided.any():
        chance = chances(differences(outputs)[decided])
        first = np.zeros(len(chance), dtype=np.int64)
        found["accuracy_interval"] = list(metrics.wilson_interval(accuracy(outputs, targets), len(chance)))
        found["calibration_error"] = metrics.expected_calibration_error(first, np.stack([chance, 1 - chance], 1))
        found["rivals"] = _of_rivals(targets, others) if others is not None else {}
    lengths = np.array([[rivals.words_of(answer) for answer in pair] for pair in targets.answers], dtype=float)
    correlation = metrics.regression(lengths.reshape(-1), outputs.reshape(-1))
    found["score_and_length"] = {name: correlation[name] for name in ("pearson", "spearman")}
    return found


def _of_rivals(targets: Targets, others: Rivals) -> dict[str, Any]:
    told = [pair for pair, kept in zip(targets.answers, targets.decided, strict=True) if kept]
    found = {name: metrics.pairwise_accuracy(d) for name, d in others.differences(told).items()}
    return {**found, "length_prefers": "longer" if others.longer else "shorter"}

"""Every metric of the classifiers, computed on this machine, offline, by scikit-learn and scipy.

Shapes: N rows, C labels. Logits are a model's raw scores. Averages ("macro") run over *all* C labels of the
label list, so that a figure does not depend on which labels a split happens to hold. A figure that is
mathematically undefined (the F1 of a label that is neither present nor predicted, the correlation with a
constant) is 0.0, never NaN. Input that cannot be scored is an error, never a wrong number:

* ``DataError``: no rows, shapes that do not fit, labels outside the label list;
* ``ModelError``: logits or predictions that hold NaN or infinity, as after a training run that diverged.

scikit-learn and scipy are imported where they are used: importing this module costs what numpy costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ptft_hf.errors import DataError, ModelError

Numbers = npt.NDArray[Any]

DEFAULT_THRESHOLD = 0.5
"""The probability from which a label of a multi-label task is given: what the sigmoid loss is trained for."""


class LabelReport(TypedDict):
    """How one label fared; ``support`` is the number of rows that truly have it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def classification(labels: Numbers, logits: Numbers, names: Sequence[str]) -> dict[str, float]:
    """Scores of a single-label classifier; the prediction is the label with the highest logit.

    Args:
        labels: [N], indices into ``names``.
        logits: [N, C].
        names: The C labels.

    Returns:
        ``accuracy``; ``macro_f1`` over all C labels; ``weighted_f1`` (weights: the labels' counts); ``mcc``
        (Matthews' correlation, 0.0 where labels or predictions are all the same); ``balanced_accuracy`` (the
        mean recall of the labels that occur in ``labels``, since the recall of the others is undefined).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

    _check_single_label(labels, logits, len(names))
    predictions = logits.argmax(axis=1)
    every, present = list(range(len(names))), np.unique(labels)
    varied = len(present) > 1 and len(np.unique(predictions)) > 1

    def f1(average: str) -> float:
        return float(f1_score(labels, predictions, labels=every, average=average, zero_division=0))

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": f1("macro"),
        "weighted_f1": f1("weighted"),
        "mcc": float(matthews_corrcoef(labels, predictions)) if varied else 0.0,
        "balanced_accuracy": float(recall_score(labels, predictions, labels=present, average="macro")),
    }


def classification_report(labels: Numbers, predictions: Numbers, names: Sequence[str]) -> list[LabelReport]:
    """Precision, recall, F1 and support of each label, in the order of ``names``.

    Args:
        labels: [N] indices into ``names``, or, for a multi-label task, [N, C] of 0 and 1.
        predictions: The same shape as ``labels``.
        names: The C labels.
    """
    from sklearn.metrics import precision_recall_fscore_support

    _check_predictions(labels, predictions, len(names), labels.ndim)
    columns = precision_recall_fscore_support(
        labels, predictions, labels=_label_indices(labels, len(names)), average=None, zero_division=0
    )
    return [
        LabelReport(label=name, precision=float(p), recall=float(r), f1=float(f), support=int(n))
        for name, p, r, f, n in zip(names, *columns, strict=True)
    ]


def confusion(labels: Numbers, predictions: Numbers, n: int) -> list[list[int]]:
    """Confusion matrix [n, n]: row = the true label, column = the predicted one, entry = number of rows.

    Args:
        labels: [N], from 0 to n - 1.
        predictions: [N], from 0 to n - 1.
        n: The number of labels.
    """
    from sklearn.metrics import confusion_matrix

    _check_predictions(labels, predictions, n, dimensions=1)
    matrix: list[list[int]] = confusion_matrix(labels, predictions, labels=list(range(n))).tolist()
    return matrix


def multi_label(
    labels: Numbers, logits: Numbers, names: Sequence[str], thresholds: Numbers | float = DEFAULT_THRESHOLD
) -> dict[str, float]:
    """Scores of a multi-label classifier; a label is given where its probability reaches its threshold.

    Args:
        labels: [N, C] of 0 and 1.
        logits: [N, C]; the probabilities are their sigmoid.
        names: The C labels.
        thresholds: [C] probabilities, or one for all labels.

    Returns:
        ``accuracy`` (the share of rows with *every* label right), ``micro_f1``, ``macro_f1`` and
        ``weighted_f1``. By label: ``classification_report(labels, multi_label_predictions(...), names)``.
    """
    from sklearn.metrics import accuracy_score, f1_score

    _check_multi_label(labels, logits, len(names))
    predictions, every = multi_label_predictions(logits, thresholds), _label_indices(labels, len(names))

    def f1(average: str) -> float:
        return float(f1_score(labels, predictions, labels=every, average=average, zero_division=0))

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "micro_f1": f1("micro"),
        "macro_f1": f1("macro"),
        "weighted_f1": f1("weighted"),
    }


def _label_indices(labels: Numbers, n: int) -> list[int]:
    """What scikit-learn calls our n labels: it reads [N, 1] as classes 0 and 1, so a lone label is its 1."""
    return [1] if labels.ndim == 2 and n == 1 else list(range(n))


def multi_label_predictions(logits: Numbers, thresholds: Numbers | float = DEFAULT_THRESHOLD) -> Numbers:
    """[N, C] of 0 and 1: whether the sigmoid of each logit [N, C] reaches its threshold.

    Args:
        logits: [N, C].
        thresholds: [C] probabilities, or one for all labels.
    """
    from scipy.special import expit

    limits = np.asarray(thresholds, dtype=np.float64)
    if limits.ndim and limits.shape != logits.shape[1:]:
        raise DataError(f"thresholds: shape {limits.shape} does not fit logits of shape {logits.shape}")
    predictions: Numbers = (expit(logits.astype(np.float64)) >= limits).astype(np.int64)
    return predictions


def best_thresholds(labels: Numbers, logits: Numbers) -> npt.NDArray[np.float64]:
    """Per label, the probability threshold with the highest F1; choose it on validation, never on test.

    A threshold lies midway between two neighbouring probabilities, so that rounding does not tip a row.
    0.5 is kept where no threshold is better, and where a label has no positive row to learn from.

    Args:
        labels: [N, C] of 0 and 1.
        logits: [N, C].

    Returns:
        [C] thresholds, each between 0 and 1, for ``multi_label``.
    """
    from scipy.special import expit

    _check_multi_label(labels, logits, logits.shape[-1])
    probabilities = expit(logits.astype(np.float64))
    return np.array([_best_threshold(y, p) for y, p in zip(labels.T, probabilities.T, strict=True)])


def _best_threshold(labels: Numbers, probabilities: Numbers) -> float:
    """The best threshold of one label: labels [N] of 0 and 1, probabilities [N]."""
    from sklearn.metrics import f1_score, precision_recall_curve

    if not labels.any():
        return DEFAULT_THRESHOLD
    precision, recall, scores = precision_recall_curve(labels, probabilities)
    precision, recall = precision[:-1], recall[:-1]  # the last point predicts nothing and has no score
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(f1.argmax())
    default = f1_score(labels, probabilities >= DEFAULT_THRESHOLD, zero_division=0)
    if f1[best] <= default + 1e-12:
        return DEFAULT_THRESHOLD
    below = scores[best - 1] if best else 0.0
    return float((below + scores[best]) / 2)


def regression(labels: Numbers, predictions: Numbers) -> dict[str, float]:
    """Scores of a regression.

    Args:
        labels: [N].
        predictions: [N].

    Returns:
        ``pearson`` and ``spearman`` (0.0 where either side is constant or N is 1), ``mse``, ``mae``.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    n = len(labels)
    _raise_if(
        DataError, _shape_problems("labels", labels, (n,)), _shape_problems("predictions", predictions, (n,))
    )
    _raise_if(DataError, _finite_problems("labels", labels))
    _raise_if(ModelError, _finite_problems("predictions", predictions))
    y, x = labels.astype(np.float64), predictions.astype(np.float64)
    return {
        "pearson": _correlation(pearsonr, y, x),
        "spearman": _correlation(spearmanr, y, x),
        "mse": float(mean_squared_error(y, x)),
        "mae": float(mean_absolute_error(y, x)),
    }


def _correlation(correlate: Callable[[Numbers, Numbers], Any], y: Numbers, x: Numbers) -> float:
    return float(correlate(y, x).statistic) if np.ptp(y) > 0 and np.ptp(x) > 0 else 0.0


def temperature(labels: Numbers, logits: Numbers) -> float:
    """The number to divide logits by so that their probabilities are best calibrated; fit it on validation.

    It minimises the negative log-likelihood (Guo et al. 2017, "On Calibration of Modern Neural Networks")
    over the logarithm of the temperature, between 1/20 and 20: where every row is right, the likelihood has
    no maximum and would ask for a temperature of 0. Only the probabilities change, not the predictions.

    Args:
        labels: [N], from 0 to C - 1.
        logits: [N, C].
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    _check_single_label(labels, logits, logits.shape[-1])
    rows, scores = np.arange(len(labels)), logits.astype(np.float64)

    def negative_log_likelihood(log_temperature: float) -> float:
        log_probabilities = log_softmax(scores / np.exp(log_temperature), axis=1)
        return -float(log_probabilities[rows, labels].mean())

    bound = np.log(20.0)
    fit = minimize_scalar(negative_log_likelihood, bounds=(-bound, bound), method="bounded")
    return float(np.exp(fit.x))


def expected_calibration_error(labels: Numbers, probabilities: Numbers, bins: int = 15) -> float:
    """The mean gap between confidence (the highest probability of a row) and accuracy, weighted by bin.

    Args:
        labels: [N], from 0 to C - 1.
        probabilities: [N, C], each row summing to 1.
        bins: Number of bins of equal width, each open below and closed above; 15 as in Guo et al. 2017.
    """
    _check_single_label(labels, probabilities, probabilities.shape[-1], "probabilities")
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    of_bin = np.digitize(confidence, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)
    gaps = np.bincount(of_bin, weights=confidence - right)  # per bin: its rows x its gap
    return float(np.abs(gaps).sum() / len(labels))


def pairwise_accuracy(differences: Numbers) -> float:
    """The share of pairs that are told right; equal scores count one half.

    Args:
        differences: [N], score of the better one minus that of the other.
    """
    _raise_if(DataError, _shape_problems("differences", differences, (len(differences),)))
    _raise_if(ModelError, _finite_problems("differences", differences))
    return float((np.sign(differences) + 1).mean() / 2)


def wilson_interval(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of Wilson (1927, "Probable inference, the law of succession, and statistical inference") for a
    share of n trials; unlike the usual plus or minus it stays between 0 and 1, and has a width where all are right.

    Args:
        share: Of the trials that succeeded.
        n: At least one.
        level: The chance that such intervals hold the true share.
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return float(max(0.0, (middle - half) / scale)), float(min(1.0, (middle + half) / scale))


# -- what can be scored at all -----------------------------------------------------------------------------


def _check_single_label(labels: Numbers, scores: Numbers, n: int, what: str = "logits") -> None:
    """Labels [N], scores [N, n]."""
    _raise_if(
        DataError,
        _shape_problems("labels", labels, (len(labels),)),
        _shape_problems(what, scores, (len(labels), n)),
        _label_problems("labels", labels, n),
    )
    _raise_if(ModelError, _finite_problems(what, scores))


def _check_multi_label(labels: Numbers, logits: Numbers, n: int) -> None:
    """Labels [N, n], logits [N, n]."""
    _raise_if(
        DataError,
        _shape_problems("labels", labels, (len(labels), n)),
        _shape_problems("logits", logits, (len(labels), n)),
        _label_problems("labels", labels, n),
    )
    _raise_if(ModelError, _finite_problems("logits", logits))


def _check_predictions(labels: Numbers, predictions: Numbers, n: int, dimensions: int) -> None:
    """Labels and predictions, both [N] (one dimension) or [N, n] (two)."""
    shape = (len(labels), n)[:dimensions]
    _raise_if(
        DataError,
        _shape_problems("labels", labels, shape),
        _shape_problems("predictions", predictions, shape),
        _label_problems("labels", labels, n),
        _label_problems("predictions", predictions, n),
    )


def _shape_problems(what: str, values: Numbers, expected: tuple[int, ...]) -> list[str]:
    if len(values) == 0:
        return [f"{what}: there is no row to score"]
    return [] if values.shape == expected else [f"{what}: shape {values.shape}, expected {expected}"]


def _label_problems(what: str, values: Numbers, n: int) -> list[str]:
    """Values of [N] must be indices below n; values of [N, n] must be 0 or 1."""
    top = n if values.ndim == 1 else 2
    wrong = values[~np.isin(values, np.arange(top))]
    if wrong.size == 0:
        return []
    return [f"{what}: {wrong.size} of {values.size} are none of 0 to {top - 1} (the first is {wrong[0]})"]


def _finite_problems(what: str, values: Numbers) -> list[str]:
    bad = np.asarray((~np.isfinite(values)).reshape(len(values), -1).any(axis=1))
    if not bad.any():
        return []
    hint = "" if what == "labels" else "; if training diverged, try a lower learning rate"
    return [f"{what}: NaN or infinity in {bad.sum()} of {len(bad)} rows (first: row {bad.argmax()}){hint}"]


def _raise_if(error: type[DataError] | type[ModelError], *problems: list[str]) -> None:
    found = [problem for group in problems for problem in group]
    if found:
        raise error(*found)

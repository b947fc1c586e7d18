"""The metrics against sums worked by hand, and against scikit-learn and scipy where those do the same job."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ptft_hf import metrics
from ptft_hf.errors import DataError, ModelError

NAMES = ["neg", "neutral", "pos"]


def logits_of(predictions: list[int], n: int) -> np.ndarray:
    """[N, n] logits whose highest entry is the given prediction."""
    return np.eye(n)[predictions] * 2.0 - 1.0


def test_importing_the_module_does_not_import_scikit_learn_or_scipy() -> None:
    code = "import sys, ptft_hf.metrics; print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# -- single label ------------------------------------------------------------------------------------------


def test_classification_by_hand() -> None:
    # labels      0 0 0 0 1 1      0: precision 3/4, recall 3/4, F1 3/4
    # predictions 0 0 0 1 1 0      1: precision 1/2, recall 1/2, F1 1/2
    result = metrics.classification(
        np.array([0, 0, 0, 0, 1, 1]), logits_of([0, 0, 0, 1, 1, 0], 2), ["a", "b"]
    )
    assert result == pytest.approx(
        {
            "accuracy": 4 / 6,
            "macro_f1": (3 / 4 + 1 / 2) / 2,
            "weighted_f1": (4 * 3 / 4 + 2 * 1 / 2) / 6,
            # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)), with 1 as the positive label
            "mcc": (1 * 3 - 1 * 1) / np.sqrt(2 * 2 * 4 * 4),
            "balanced_accuracy": (3 / 4 + 1 / 2) / 2,
        }
    )


def test_macro_f1_counts_the_labels_that_a_split_does_not_hold() -> None:
    result = metrics.classification(np.array([0, 2, 2]), logits_of([0, 2, 2], 3), NAMES)
    assert result["accuracy"] == result["weighted_f1"] == result["balanced_accuracy"] == 1.0
    assert result["macro_f1"] == pytest.approx(2 / 3)  # "neutral" neither occurs nor is predicted: F1 0.0


@pytest.mark.parametrize(
    ("labels", "predictions"), [([1, 1], [1, 1]), ([1, 1], [1, 0]), ([0, 1], [1, 1]), ([2], [2])]
)
def test_mcc_is_zero_not_nan_where_one_side_is_all_the_same(
    labels: list[int], predictions: list[int]
) -> None:
    result = metrics.classification(np.array(labels), logits_of(predictions, 3), NAMES)
    assert result["mcc"] == 0.0
    assert np.isfinite(list(result.values())).all()


def test_classification_agrees_with_scikit_learn_on_random_rows() -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef

    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 5, 300), rng.normal(size=(300, 5))
    result, predictions = metrics.classification(labels, logits, list("abcde")), logits.argmax(1)
    assert result["accuracy"] == pytest.approx((labels == predictions).mean())
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert result["mcc"] == pytest.approx(matthews_corrcoef(labels, predictions))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))


def test_report_and_confusion_by_hand() -> None:
    labels, predictions = np.array([0, 0, 2, 2, 2]), np.array([0, 2, 2, 2, 0])
    assert metrics.confusion(labels, predictions, 3) == [[1, 0, 1], [0, 0, 0], [1, 0, 2]]
    neg, neutral, pos = metrics.classification_report(labels, predictions, NAMES)
    assert neg == {"label": "neg", "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    assert neutral == {"label": "neutral", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert pos == pytest.approx(
        {"label": "pos", "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )


def test_confusion_keeps_its_shape_with_one_label_in_use() -> None:
    assert metrics.confusion(np.array([1, 1]), np.array([1, 1]), 2) == [[0, 0], [0, 2]]


# -- multi-label -------------------------------------------------------------------------------------------

MULTI_LABELS = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
MULTI_LOGITS = np.array([[2.0, -1.0], [1.0, -1.0], [1.0, -3.0], [-2.0, 3.0]])


def test_multi_label_by_hand() -> None:
    # predictions at 0.5: [1 0] [1 0] [1 0] [0 1]; label a: TP 2 FP 1 FN 0; label b: TP 1 FP 0 FN 1
    result = metrics.multi_label(MULTI_LABELS, MULTI_LOGITS, ["a", "b"])
    f1_a, f1_b = 2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1)
    assert result == pytest.approx(
        {
            "accuracy": 2 / 4,  # the first and the last row have every label right
            "micro_f1": 2 * 3 / (2 * 3 + 1 + 1),
            "macro_f1": (f1_a + f1_b) / 2,
            "weighted_f1": (2 * f1_a + 2 * f1_b) / 4,
        }
    )


def test_multi_label_thresholds_are_per_label_and_inclusive() -> None:
    zero = np.zeros((1, 2))  # probability 0.5 exactly
    assert metrics.multi_label_predictions(zero).tolist() == [[1, 1]]
    assert metrics.multi_label_predictions(zero, np.array([0.4, 0.6])).tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"thresholds: shape \(3,\) does not fit logits of shape \(1, 2\)"):
        metrics.multi_label_predictions(zero, np.full(3, 0.5))


def test_multi_label_takes_the_float_labels_that_the_sigmoid_loss_needs() -> None:
    as_float = metrics.multi_label(MULTI_LABELS.astype(np.float32), MULTI_LOGITS, ["a", "b"])
    assert as_float == metrics.multi_label(MULTI_LABELS, MULTI_LOGITS, ["a", "b"])


def test_a_lone_label_is_scored_as_itself_not_as_its_absence() -> None:
    # scikit-learn reads [N, 1] as a binary problem, and its "macro" F1 averages in the rows without the label
    labels, logits = np.array([[1], [1], [0], [0]]), np.array([[3.0], [-3.0], [-3.0], [-3.0]])
    result = metrics.multi_label(labels, logits, ["a"])
    assert result["micro_f1"] == result["macro_f1"] == result["weighted_f1"] == pytest.approx(2 / 3)
    (report,) = metrics.classification_report(labels, metrics.multi_label_predictions(logits), ["a"])
    assert report == pytest.approx({"label": "a", "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})


def test_report_of_a_multi_label_task() -> None:
    report = metrics.classification_report(
        MULTI_LABELS, metrics.multi_label_predictions(MULTI_LOGITS), ["a", "b"]
    )
    assert [(row["label"], row["support"]) for row in report] == [("a", 2), ("b", 2)]
    assert [row["precision"] for row in report] == pytest.approx([2 / 3, 1.0])
    assert [row["recall"] for row in report] == pytest.approx([1.0, 1 / 2])


def test_best_thresholds_by_hand() -> None:
    # label a: 0.5 is wrong on the third row only, which shares its logit with the second: keep 0.5
    # label b: probabilities .27+ .27+ .05- .95+: midway between .05 and .27 every row is right
    sigmoid = 1 / (1 + np.exp(-MULTI_LOGITS))
    thresholds = metrics.best_thresholds(MULTI_LABELS, MULTI_LOGITS)
    assert thresholds[0] == 0.5
    labels_b = np.array([[0, 1], [1, 1], [0, 0], [0, 1]])
    assert metrics.best_thresholds(labels_b, MULTI_LOGITS)[1] == pytest.approx(
        (sigmoid[2, 1] + sigmoid[0, 1]) / 2
    )


def test_best_thresholds_are_never_worse_than_a_half_and_as_good_as_a_full_search() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(1)
    labels = (rng.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(int)
    logits = rng.normal(size=(200, 4)) - 2.0 + labels
    thresholds = metrics.best_thresholds(labels, logits)
    assert thresholds[3] == 0.5  # no positive row to learn from
    probabilities = 1 / (1 + np.exp(-logits))
    for j in range(3):
        searched = max(f1_score(labels[:, j], probabilities[:, j] >= t) for t in probabilities[:, j])
        assert f1_score(labels[:, j], probabilities[:, j] >= thresholds[j]) == pytest.approx(searched)
    tuned = metrics.multi_label(labels, logits, list("abcd"), thresholds)
    assert tuned["macro_f1"] > metrics.multi_label(labels, logits, list("abcd"))["macro_f1"]


# -- regression --------------------------------------------------------------------------------------------


def test_regression_by_hand() -> None:
    # deviations of the labels -1 0 1, of the predictions -1 2 -1 (times 1): covariance 0, ranks 1.5 3 1.5
    result = metrics.regression(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 1.0]))
    assert result == pytest.approx({"pearson": 0.0, "spearman": 0.0, "mse": 8 / 3, "mae": 4 / 3}, abs=1e-12)
    monotone = metrics.regression(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 9.0]))
    assert monotone["spearman"] == pytest.approx(1.0)
    # deviations -1 0 1 and -3 -2 5: covariance 8, squares 2 and 38
    assert monotone["pearson"] == pytest.approx(8 / np.sqrt(2 * 38))


@pytest.mark.parametrize(
    ("labels", "predictions"), [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1], [2])]
)
def test_correlation_with_a_constant_is_zero_not_nan(labels: list[float], predictions: list[float]) -> None:
    result = metrics.regression(np.array(labels, dtype=np.float32), np.array(predictions, dtype=np.float32))
    assert result["pearson"] == result["spearman"] == 0.0
    assert np.isfinite(list(result.values())).all()


# -- calibration -------------------------------------------------------------------------------------------


def test_temperature_by_hand() -> None:
    # Logits +-z with 3 of 4 rows right: best where sigmoid(2z/T) = 3/4, that is 2z/T = ln 3.
    z = 5.0
    logits = np.array([[z, -z]] * 4)
    assert metrics.temperature(np.array([0, 0, 0, 1]), logits) == pytest.approx(2 * z / np.log(3), rel=1e-4)


def test_temperature_agrees_with_scikit_learn_and_lowers_the_loss() -> None:
    from scipy.special import softmax
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 500)
    features = rng.normal(size=(500, 3)) + np.eye(3)[labels]
    model = LogisticRegression().fit(features, labels)
    model.coef_ *= 4.0  # overconfident
    logits = model.decision_function(features)

    found = metrics.temperature(labels, logits)
    assert 2.0 < found < 8.0
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(features, labels)
    ours = softmax(logits / found, axis=1)
    assert np.allclose(calibrated.predict_proba(features), ours, atol=2e-3)
    assert log_loss(labels, ours) < log_loss(labels, softmax(logits, axis=1))
    before = metrics.expected_calibration_error(labels, softmax(logits, axis=1))
    assert metrics.expected_calibration_error(labels, ours) < before / 2


def test_temperature_is_bounded_where_every_row_is_right() -> None:
    found = metrics.temperature(np.array([0, 1]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert found == pytest.approx(1 / 20, rel=1e-3)


def test_expected_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.45, 0.55]])
    labels = np.array([0, 1, 0, 1])
    # one bin (0.5, 1]: confidence 2.85 / 4, accuracy 3/4
    assert metrics.expected_calibration_error(labels, probabilities, bins=2) == pytest.approx(
        3 / 4 - 2.85 / 4
    )
    # four bins: (0.5, 0.75] holds 0.6 and 0.55, both right; (0.75, 1] holds 0.9 right and 0.8 wrong
    expected = (abs(1.15 - 2) + abs(1.7 - 1)) / 4
    assert metrics.expected_calibration_error(labels, probabilities, bins=4) == pytest.approx(expected)


def test_expected_calibration_error_of_certainty_is_its_error_rate() -> None:
    certain = np.array([[1.0, 0.0]] * 4)
    assert metrics.expected_calibration_error(np.array([0, 0, 0, 1]), certain) == pytest.approx(1 / 4)


# -- what cannot be scored ---------------------------------------------------------------------------------


def test_all_faults_of_one_input_are_named_together() -> None:
    with pytest.raises(DataError) as error:
        metrics.classification(np.array([0, 3, -1]), np.zeros((2, 3)), NAMES)
    assert error.value.problems == (
        "logits: shape (2, 3), expected (3, 3)",
        "labels: 2 of 3 are none of 0 to 2 (the first is 3)",
    )


def test_a_model_that_diverged_is_named_not_scored() -> None:
    logits = np.zeros((3, 3))
    logits[1, 2] = np.nan
    with pytest.raises(ModelError, match=r"logits: NaN or infinity in 1 of 3 rows \(first: row 1\)"):
        metrics.classification(np.array([0, 1, 2]), logits, NAMES)
    with pytest.raises(ModelError, match="predictions: NaN or infinity in 1 of 2 rows"):
        metrics.regression(np.array([1.0, 2.0]), np.array([np.inf, 1.0]))


def test_other_input_that_cannot_be_scored() -> None:
    nothing = np.zeros(0, dtype=int)
    with pytest.raises(DataError, match="no row to score"):
        metrics.classification(nothing, np.zeros((0, 3)), NAMES)
    with pytest.raises(DataError, match=r"predictions: shape \(3, 1\), expected \(3,\)"):
        metrics.regression(np.zeros(3), np.zeros((3, 1)))  # numpy would broadcast this to 3 x 3
    with pytest.raises(DataError, match="labels: NaN or infinity in 1 of 2 rows"):
        metrics.regression(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))
    with pytest.raises(DataError, match="labels: 1 of 4 are none of 0 to 1"):
        metrics.multi_label(np.array([[0, 2], [1, 0]]), np.zeros((2, 2)), ["a", "b"])
    with pytest.raises(DataError, match="predictions: 1 of 2 are none of 0 to 1"):
        metrics.confusion(np.array([0, 1]), np.array([0, 2]), 2)

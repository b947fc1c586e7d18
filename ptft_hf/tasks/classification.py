"""What classifiers of texts and of images share: labels, losses, metrics, thresholds, calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_hf import forward, metrics
from ptft_hf.errors import DataError, RecipeError
from ptft_hf.recipes import ClassificationRecipe
from ptft_hf.tasks import TaskDefaults, losses
from ptft_hf.tasks.labels import MULTI, REGRESSION, SINGLE, flat, infer, label_order, wrong_kind


class Classification(TaskDefaults):
    """One label, several labels or a number for each row, in the column ``label``: a string, integer or boolean
    (single-label), a list of these (multi-label), or a float (regression).

    A family adds its columns, ``encode``, ``collator``, ``segments``, ``input_row`` and ``usage``.
    """

    optional: Sequence[str] = ()
    label_column = "label"
    otherwise = ()

    def __init__(self, recipe: ClassificationRecipe) -> None:
        self.recipe = recipe
        self.problem_type = recipe.problem_type or SINGLE
        self.labels: list[str] = []
        self.weights: torch.Tensor | None = None
        self.thresholds: list[float] | None = None
        self.temperature = 1.0

    @property
    def best_metric(self) -> str:
        return "pearson" if self.problem_type == REGRESSION else "macro_f1"

    @property
    def smooths_labels(self) -> bool:
        return self.problem_type != REGRESSION and self.recipe.loss != "focal"

    # ---- before training ----

    def look_at(self, splits: Any) -> list[str]:
        """Learn problem type, labels and class weights.

        Raises:
            DataError: Labels of mixed kinds, only one class, or labels that the training split lacks.
            RecipeError: ``class_weights`` or ``loss`` do not fit the labels.
        """
        columns = {name: getattr(splits, name)["label"] for name in ("train", "validation", "test")}
        self.problem_type = self.recipe.problem_type or infer(columns["train"])
        self._check_options()
        problems = [
            p for name, values in columns.items() for p in wrong_kind(name, values, self.problem_type)
        ]
        if problems:
            raise DataError(*problems)
        if self.problem_type == REGRESSION:
            for name, values in columns.items():
                if infinite := sum(not math.isfinite(value) for value in values):
                    problems.append(f"{name}: {infinite} labels are infinite (inf); take these rows out")
            if problems:
                raise DataError(*problems)
            low, high = min(columns["train"]), max(columns["train"])
            if low == high:
                raise DataError(f"every training row has the same label {low!r}: there is nothing to learn")
            return [f"regression: training targets from {low:g} to {high:g}"]
        counts = Counter(flat(columns["train"]))
        self.labels = [str(label) for label in sorted(counts, key=label_order)]
        known = set(self.labels)
        for name in ("validation", "test"):
            unseen = Counter(str(x) for x in flat(columns[name]) if str(x) not in known)
            problems += [
                f"{name}: label {label!r} ({n} rows) is not in the training split, so no model could learn it; "
                "add such rows to train or take them out"
                for label, n in sorted(unseen.items())
            ]
        if len(self.labels) < (2 if self.problem_type == SINGLE else 1):
            problems.append(f"train has only one class, {self.labels}: there is nothing to learn")
        if problems:
            raise DataError(*problems)
        by_name = {str(label): n for label, n in counts.items()}
        self.weights = self._class_weights(by_name, len(columns["train"]))
        return [self._describe(by_name, len(columns["train"]))]

    def _check_options(self) -> None:
        recipe, problems = self.recipe, []
        if self.problem_type == REGRESSION:
            for name in ("class_weights", "oversample", "calibrate", "tune_thresholds"):
                if getattr(recipe, name):
                    problems.append(f"{recipe.name}: {name}: regression has no classes; leave it out")
            if recipe.loss != "cross_entropy":
                problems.append(f"{recipe.name}: loss: {recipe.loss!r} needs classes, but this is regression")
        if self.problem_type == MULTI and recipe.oversample:
            problems.append(f"{recipe.name}: oversample: needs one class a row; use class_weights: balanced")
        if self.problem_type == MULTI and recipe.calibrate:
            problems.append(f"{recipe.name}: calibrate: is for single-label; use tune_thresholds: true")
        if self.problem_type == SINGLE and recipe.tune_thresholds:
            problems.append(f"{recipe.name}: tune_thresholds: is for multi-label tasks; leave it out")
        if problems:
            raise RecipeError(*problems)

    def _class_weights(self, counts: Mapping[str, int], rows: int) -> torch.Tensor | None:
        wanted = self.recipe.class_weights
        if wanted is None:
            return None
        if wanted == "balanced":
            if self.problem_type == MULTI:  # BCE's pos_weight: negatives per positive
                # A label of every row has no negatives; it keeps a small weight, or it would not be learnt.
                return torch.tensor([max(rows - counts[c], 1) / counts[c] for c in self.labels])
            return torch.tensor([rows / (len(self.labels) * counts[c]) for c in self.labels])
        assert isinstance(wanted, Mapping)
        given = {str(name): weight for name, weight in wanted.items()}
        wrong = [f"class_weights: no label {n!r}" for n in sorted(given.keys() - set(self.labels))]
        wrong += [f"class_weights: label {n!r} has none" for n in sorted(set(self.labels) - given.keys())]
        wrong += [f"class_weights: {n}: {w!r} is not above 0" for n, w in given.items() if not w > 0]
        if wrong:
            raise RecipeError(*(f"{self.recipe.name}: {w}; the labels are {self.labels}" for w in wrong))
        return torch.tensor([float(given[c]) for c in self.labels])

    def _describe(self, counts: Mapping[str, int], rows: int) -> str:
        most = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {n} ({n / rows:.0%})" for name, n in most[:8])
        rest = f", and {len(most) - 8} more down to {most[-1][0]} {most[-1][1]}" if len(most) > 8 else ""
        return f"{len(self.labels)} labels in {rows:,} training rows: {shown}{rest}"

    def config(self) -> dict[str, Any]:
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        }

    # ---- rows to batches ----

    def collator(self, tokenizer: Any) -> Any:
        raise NotImplementedError("each family has its own")

    def answer(self, row: Mapping[str, Any]) -> str:
        """An encoded row's label for a person."""
        value = row["labels"]
        if self.problem_type == SINGLE:
            return str(self.labels[value])
        if self.problem_type == MULTI:
            return ", ".join(name for name, hot in zip(self.labels, value, strict=True) if hot) or "none"
        return str(value)

    def encode_label(self, value: Any, index: Mapping[str, int]) -> Any:
        if self.problem_type == REGRESSION:
            return float(value)
        if self.problem_type == SINGLE:
            return index[str(value)]
        hot = [0.0] * len(index)
        for label in value:
            hot[index[str(label)]] = 1.0
        return hot

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        """Chance of each row to be drawn, when rare classes are oversampled: 1 / size of its class."""
        if not self.recipe.oversample:
            return None
        labels = encoded["labels"][:]
        counts = Counter(labels)
        return [1.0 / counts[label] for label in labels]

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of labels; with class weights of single-label tasks, the sum of the labels' weights."""
        if self.problem_type == SINGLE and self.weights is not None:
            return self.weights.to(labels.device)[labels].sum()
        return torch.tensor(float(labels.numel()), device=labels.device)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the rows' losses, in float32.

        Cross-entropy; with ``loss: focal`` each term times ``(1 - p)**focal_gamma`` (Lin et al. 2017);
        binary cross-entropy a label for multi-label; squared error for regression.

        Args:
            logits: ``[N, C]``, or ``[N, 1]`` for regression.
            labels: Ids ``[N]``, multi-hot ``[N, C]``, or targets ``[N]``.
            label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        """
        weights = None if self.weights is None else self.weights.to(logits.device)
        gamma = self.recipe.focal_gamma if self.recipe.loss == "focal" else 0.0
        if self.problem_type == SINGLE:
            return losses.cross_entropy(logits, labels, weights, label_smoothing, gamma)
        logits = logits.float()
        if self.problem_type == REGRESSION:
            return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        targets = labels * (1 - label_smoothing) + label_smoothing / 2
        terms = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        wrong = torch.where(labels > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
        return (terms * wrong**gamma).sum() if gamma else terms.sum()

    # ---- after the model ----

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> np.ndarray:
        """Logits ``[N, C]``."""
        return forward.logits_of(model, encoded, self.collator(tokenizer), batch_size, progress)

    def targets(self, encoded: Any) -> np.ndarray | None:
        """Ids ``[N]``, multi-hot ``[N, C]`` or numbers ``[N]``."""
        return np.array(encoded["labels"][:]) if "labels" in encoded.column_names else None

    def mean_loss(self, outputs: np.ndarray, encoded: Any) -> float:
        logits, labels = torch.from_numpy(outputs), torch.from_numpy(np.array(encoded["labels"][:]))
        return (self.loss(logits, labels) / self.loss_weight(labels)).item()

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        if self.problem_type == REGRESSION:
            return metrics.regression(labels, logits[:, 0])
        if self.problem_type == MULTI:
            return metrics.multi_label(labels, logits, self.labels, self._thresholds())
        return metrics.classification(labels, logits, self.labels)

    def report(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Precision, recall and F1 of each class; for single-label tasks also the confusion matrix
        (rows: true, columns: predicted, both in the order of ``labels``) and the calibration error."""
        if self.problem_type == REGRESSION:
            return {}
        if self.problem_type == MULTI:
            predicted = metrics.multi_label_predictions(logits, self._thresholds())
            return {"per_class": metrics.classification_report(labels, predicted, self.labels)}
        predicted = logits.argmax(-1)
        return {
            "per_class": metrics.classification_report(labels, predicted, self.labels),
            "confusion": metrics.confusion(labels, predicted, len(self.labels)),
            "calibration_error": metrics.expected_calibration_error(labels, self._probabilities(logits)),
        }

    def outcomes(self, logits: np.ndarray, labels: np.ndarray) -> list[float]:
        """1.0 for a row with its label, or with all its labels, right, else 0.0; for regression minus the squared
        error."""
        if self.problem_type == REGRESSION:
            scores = -((logits[:, 0].astype(np.float64) - labels) ** 2)
        elif self.problem_type == MULTI:
            scores = (metrics.multi_label_predictions(logits, self._thresholds()) == labels).all(axis=1)
        else:
            scores = logits.argmax(axis=1) == labels
        return [float(score) for score in scores]

    def after_training(self, logits: np.ndarray, labels: np.ndarray) -> list[str]:
        """Choose thresholds (multi-label) or a temperature (single-label) on the validation set, if asked."""
        if self.recipe.tune_thresholds:
            self.thresholds = [round(float(t), 6) for t in metrics.best_thresholds(labels, logits)]
            return [
                "thresholds chosen on the validation set: "
                + ", ".join(f"{n} {t:.2f}" for n, t in zip(self.labels, self.thresholds, strict=True))
            ]
        if self.recipe.calibrate:
            before = metrics.expected_calibration_error(labels, self._probabilities(logits))
            self.temperature = float(metrics.temperature(labels, logits))
            after = metrics.expected_calibration_error(labels, self._probabilities(logits))
            return [
                f"temperature {self.temperature:.3f} chosen on the validation set "
                f"(calibration error {before:.3f} -> {after:.3f})"
            ]
        return []

    def predictions(self, logits: np.ndarray, labels: Any = None) -> list[dict[str, Any]]:
        """``{"label": ..., "scores": {label: probability}}`` for each row; for regression ``{"label": x}``."""
        if self.problem_type == REGRESSION:
            return [{"label": float(x)} for x in logits[:, 0]]
        probabilities = self._probabilities(logits)
        scores = [dict(zip(self.labels, map(float, row), strict=True)) for row in probabilities]
        if self.problem_type == SINGLE:
            return [
                {"label": self.labels[row.argmax()], "scores": s}
                for row, s in zip(probabilities, scores, strict=True)
            ]
        chosen = probabilities >= self._thresholds()
        return [
            {"label": [n for n, c in zip(self.labels, row, strict=True) if c], "scores": s}
            for row, s in zip(chosen, scores, strict=True)
        ]

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """The same labels, or numbers that differ by no more than rounding."""
        a, b = one["label"], other["label"]
        return math.isclose(a, b) if isinstance(a, float) else a == b

    def unknown_labels(self, rows: Any) -> list[str]:
        return sorted({str(x) for x in flat(rows["label"])} - set(self.labels)) if self.labels else []

    def _thresholds(self) -> np.ndarray:
        return np.array(self.thresholds or [0.5] * len(self.labels))

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        """``[N, C]``, in float64: softmax of the tempered logits, or a sigmoid for each label."""
        values = np.asarray(logits, dtype=np.float64) / self.temperature
        if self.problem_type == MULTI:
            return 1 / (1 + np.exp(-values))
        values = np.exp(values - values.max(-1, keepdims=True))
        probabilities: np.ndarray = values / values.sum(-1, keepdims=True)
        return probabilities

    def state(self) -> dict[str, Any]:
        return {
            "problem_type": self.problem_type,
            "labels": self.labels,
            "thresholds": self.thresholds,
            "temperature": self.temperature,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.problem_type, self.labels = state["problem_type"], list(state["labels"])
        self.thresholds, self.temperature = state["thresholds"], state["temperature"]

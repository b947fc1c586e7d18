"""A finished run as one plain model elsewhere: safetensors or ONNX, compared with the run before it counts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_hf import card, checkpoints, inference, models, onnx_models, report
from ptft_hf.errors import CheckpointError, DataError, ModelError, OutputError
from ptft_hf.forward import BATCH_SIZE, longest_first
from ptft_hf.inference import TrainedModel

FORMATS = ("safetensors", "onnx")
ONNX_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
PROBE_ROWS = 16
ROUNDING = 1e-3
"""How far logits may differ, of the largest one."""
METRIC = 0.01
"""How far the metric may differ, or else by one row's answer."""


def export(
    path: str | Path,
    output_dir: str | Path,
    *,
    to: str = "safetensors",
    model: str | None = None,
    base: str = "full_precision",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a run's model without adapter and without ``ptft_hf``, with its tokenizer, chat template and generation
    settings, after it has been compared with the run's own.

    Args:
        path: The output folder of a run, of an adapter that can be merged or of a whole model.
        output_dir: A new folder.
        to: ``safetensors``: a folder for ``from_pretrained``, and for :func:`ptft_hf.load`. ``onnx``: ``model.onnx``
            for onnxruntime, with any number of rows and tokens (extra ``onnx``).
        model: Where the base is now, if it has moved.
        base: Of an adapter on a quantized base, as in :meth:`TrainedModel.merge`.
        trust_remote_code: As in :func:`ptft_hf.load`.

    Returns:
        ``{"examples", "probe_examples", "max_logit_difference", "largest_logit", "metric"}``: logits are compared on
        the longest examples, and ``metric`` (``name``, ``run`` and ``exported``) on all; it is None if the run's data
        is not to be had any more.

    Raises:
        OutputError: The folder exists and is not empty, or ``to`` is no format.
        ModelError: A package is missing, or the exporter cannot convert the architecture.
        CheckpointError: The method cannot be merged, or the exported model is another one.
    """
    folder = Path(output_dir)
    if to not in FORMATS:
        raise OutputError(f"to: {to!r} is none of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not empty; choose another folder")
    if to == "onnx":
        onnx_models.check_packages()
    trained = inference.load(path, model=model, trust_remote_code=trust_remote_code)
    if to == "onnx" and (trained.task.auto_class not in ONNX_CLASSES or trained.task.sequences > 1):
        raise ModelError(f"onnx: for classifiers and taggers, not for {trained.run['task']['family']}")
    adapted = models.adapter_kind(trained.model) is not None
    whole = trained.merge(base) if adapted else trained
    judge = Judge(trained)
    reference = trained.model
    if models.quantized_layers(trained.model):
        reference = trained.on_base(base)
        judge.say_distance(reference, base)
    expected = judge.answers(reference)
    write = _safetensors if to == "safetensors" else _onnx
    with _staged(folder) as staging:
        exported = write(whole, judge, staging, folder)
        found = judge.compare(expected, judge.answers(exported))
        (staging / "export.json").write_text(
            json.dumps({"format": to, "compared": found, "run": whole.run}, indent=1), encoding="utf-8"
        )
        if to == "onnx":
            text = card.onnx_card(whole.run, str(folder), found)
            (staging / "README.md").write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        checkpoints.publish(staging, folder)
    return found


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, gone afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}{checkpoints.STAGING}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _safetensors(whole: TrainedModel, judge: Judge, staging: Path, folder: Path) -> Any:
    """The model as it is loaded back."""
    whole.save(staging)
    run = {**whole.run, "output_dir": str(folder)}
    (staging / "README.md").write_text(card.model_card(run, None), encoding="utf-8")
    (staging / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    return inference.load(staging, verify=False, trust_remote_code=True).model  # the run itself was loaded so


def _onnx(whole: TrainedModel, judge: Judge, staging: Path, folder: Path) -> Any:
    staging.mkdir()
    model = copy.deepcopy(whole.model).cpu()
    with models.quiet():
        model.config.save_pretrained(staging)
        whole.tokenizer.save_pretrained(staging)
        if model.can_generate():
            model.generation_config.save_pretrained(staging)
    onnx_models.write(model, judge.example(), staging)
    return onnx_models.OnnxModel(staging)


class Answers(NamedTuple):
    """What a model says: logits on the probe batches, and metrics on all rows, if there are labels."""

    logits: list[torch.Tensor]
    metrics: dict[str, float] | None


class Judge:
    """The rows on which a run and its export are compared: the run's validation rows, or two sample texts."""

    def __init__(self, trained: TrainedModel) -> None:
        import datasets

        self.trained = trained
        try:
            rows = trained._rows(None, None, "validation")
            self.labelled = True
        except DataError as error:
            report.say(f"- compared on two sample texts and on no metric, without the run's own data: {error}")
            usage = trained.task.usage(trained.run["data"]["columns"], trained.run["model"]["max_length"])
            rows = datasets.Dataset.from_list([trained._row(i, text) for i, text in enumerate(usage.inputs)])
            self.labelled = False
        self.encoded = trained._encoded(rows)
        collate = trained.task.collator(trained.tokenizer)
        longest = self.encoded.select(longest_first(self.encoded, PROBE_ROWS)[0]).to_list()
        # And one row alone: another number of rows, and of tokens.
        self.probe = [collate(longest), collate(self.encoded.select([0]).to_list())]

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs of a few rows of unlike length."""
        return {name: value[:4] for name, value in self.probe[0].items() if name != "labels"}

    def answers(self, model: Any) -> Answers:
        task, tokenizer = self.trained.task, self.trained.tokenizer
        logits = checkpoints.logits_on(model, self.probe)
        if not self.labelled:
            return Answers(logits, None)
        outputs = task.outputs(model, self.encoded, tokenizer, BATCH_SIZE, progress=True)
        return Answers(logits, task.metrics(outputs, task.targets(self.encoded)))

    def compare(self, run: Answers, exported: Answers) -> dict[str, Any]:
        """How far the exported model is from the run's.

        Raises:
            CheckpointError: Further than rounding explains.
        """
        pairs = list(zip(run.logits, exported.logits, strict=True))
        largest = max(one.abs().max().item() for one, _ in pairs)
        difference = max((a - b).abs().nan_to_num(torch.inf).max().item() for a, b in pairs)
        found: dict[str, Any] = {
            "examples": len(self.encoded),
            "probe_examples": sum(len(logits) for logits in run.logits),
            "max_logit_difference": difference,
            "largest_logit": largest,
            "metric": None,
        }
        gap = 0.0
        if run.metrics is not None and exported.metrics is not None:
            name = self.trained.task.best_metric
            found["metric"] = {"name": name, "run": run.metrics[name], "exported": exported.metrics[name]}
            gap = abs(run.metrics[name] - exported.metrics[name])
        if not (difference <= ROUNDING * max(1.0, largest) and gap <= max(METRIC, 1 / len(self.encoded))):
            raise CheckpointError(
                f"{self.trained.path}: the exported model is another one: its logits differ by {difference:.3g}, its "
                f"{self.trained.task.best_metric} by {gap:.3g}; nothing was written"
            )
        return found

    def say_distance(self, reference: Any, base: str) -> None:
        """Of a quantized base: how far the one that is exported is from the one that was trained on."""
        one, other = (checkpoints.logits_on(m, self.probe) for m in (self.trained.model, reference))
        difference = max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
        report.say(
            f"- exported on its {base} base: against the quantized model that was trained, logits differ by at most "
            f"{difference:.2g}"
        )

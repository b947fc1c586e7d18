"""A trained model in use: load, predict, evaluate, merge, save."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ptft_hf import adapters, card, checkpoints, data, models, recipes, report, tasks
from ptft_hf.errors import CheckpointError, DataError, ModelError, OutputError
from ptft_hf.forward import BATCH_SIZE


class TrainedModel:
    """What :func:`ptft_hf.train` and :func:`ptft_hf.load` give: a model, its tokenizer and its task.

    Attributes:
        model: A ``transformers`` model, a ``peft.PeftModel`` or our ``BottleneckModel``, in evaluation mode and
            float32.
        tokenizer: Its tokenizer; of a model of images its image processor.
        task: The task family with labels and thresholds.
        run: The content of ``run.json``: recipes, settings, data, metrics.
        path: The folder it was loaded from.
    """

    def __init__(self, model: Any, tokenizer: Any, task: tasks.Task, run: dict[str, Any], path: Path) -> None:
        self.model, self.tokenizer, self.task, self.run, self.path = model, tokenizer, task, run, path

    def predict(
        self, texts: Sequence[Any], *, batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> list[dict[str, Any]]:
        """The model's answer to each text.

        Args:
            texts: Strings, or mappings with the family's columns (such as ``text`` and ``text_pair``); for images
                their paths, ``PIL.Image`` objects or arrays.
            batch_size: Texts of like length that run together; results keep the order of ``texts``.
            progress: Show a bar.

        Returns:
            For each text what the family's ``predictions`` gives; for classification ``{"label": ...,
            "scores": {label: probability}}``.

        Raises:
            DataError: An element is neither a string nor a mapping with the columns.
        """
        import datasets

        rows = [self._row(i, text) for i, text in enumerate(texts)]
        if not rows:
            return []
        encoded = self._encoded(datasets.Dataset.from_list(rows))
        outputs = self.task.outputs(self.model, encoded, self.tokenizer, batch_size, progress)
        return self.task.predictions(outputs, self.task.targets(encoded))

    def _row(self, index: int, text: Any) -> dict[str, Any]:
        try:
            return self.task.input_row(text, self.run["data"]["columns"])
        except DataError as error:
            raise DataError(*(f"input {index + 1}: {problem}" for problem in error.problems)) from error

    def evaluate(
        self,
        source: Any = None,
        *,
        task: str | Path | None = None,
        split: str = "test",
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Metrics on labelled data.

        Args:
            source: A file, folder, hub id, ``Dataset`` or ``DatasetDict``; by default the run's own data.
            task: A task recipe that names the data instead.
            split: ``train``, ``validation`` or ``test``; a single file or ``Dataset`` is that split.
            batch_size: Rows that run together.
            progress: Show a bar.

        Returns:
            The metrics, and under ``report`` the figures of each class.

        Raises:
            DataError: The data cannot be read, lacks columns, or has labels the model was not trained on.
        """
        if split not in ("train", "validation", "test"):
            raise DataError(f"split: {split!r} is none of train, validation, test")
        rows = self._rows(source, task, split)
        if unknown := self.task.unknown_labels(rows):
            raise DataError(
                f"{split}: labels {unknown[:10]} are unknown to this model; it knows {sorted(self.task.labels)}"
            )
        encoded = self._encoded(rows)
        outputs = self.task.outputs(self.model, encoded, self.tokenizer, batch_size, progress)
        targets = self.task.targets(encoded)
        return {**self.task.metrics(outputs, targets), "report": self.task.report(outputs, targets)}

    def _rows(self, source: Any, task: str | Path | None, split: str) -> Any:
        recipe = self.task.recipe if task is None else recipes.load_task(str(task))
        if source is not None:
            rows, notes = tasks.load_split(self.task, source, recipe, split)
            for note in notes:
                report.say(f"- {note}")
            return rows
        if recipe.data is None:
            raise DataError("this run's data was given in Python and is not kept; name data to evaluate on")
        splits = tasks.load_splits(self.task, recipe.data, recipe, self.run["seed"])
        rows = getattr(splits, split)
        if task is None and data.fingerprint(rows) != self.run["data"][split]["fingerprint"]:
            report.say(f"- the {split} data is not what it was when this model was trained", style="yellow")
        return rows

    def _encoded(self, rows: Any) -> Any:
        return self.task.encode(rows, self.tokenizer, self.run["model"]["max_length"])[0]

    def merge(self, base: str = "full_precision") -> TrainedModel:
        """The adapter's update added into a copy of the base: a plain ``transformers`` model.

        Args:
            base: Of an adapter that was trained on a quantized base: ``full_precision`` is the checkpoint as it
                was before; ``dequantized`` holds the values that the quantized weights stand for. Adding to the
                quantized weights themselves would round the update away.

        Raises:
            CheckpointError: This is no adapter, or the method cannot be merged.
            ModelError: ``base`` is neither.
        """
        check_base(base)
        if models.adapter_kind(self.model) is None:
            raise CheckpointError(f"{self.path}: this is no adapter but a whole model already")
        import copy

        from ptft_hf.adapters import peft_models

        quantized = bool(models.quantized_layers(self.model))
        model = self.on_base(base) if quantized else copy.deepcopy(self.model)
        try:
            with models.quiet():
                merged = peft_models.merge(model)
        except (AttributeError, ValueError, NotImplementedError) as error:
            method = self.run["adapter"].get("peft_type", self.run["adapter"]["family"])
            raise CheckpointError(f"{self.path}: {method} cannot be merged on this model: {error}") from error
        facts = {**self.run["model"], "quantization": None}
        run = {**self.run, "model": facts, "merged_from": str(self.path)}
        return TrainedModel(merged.eval(), self.tokenizer, self.task, run, self.path)

    def on_base(self, base: str) -> Any:
        """The adapter, not merged, on the full-precision form of its quantized base; see :meth:`merge`.

        Raises:
            ModelError: ``base`` is neither ``full_precision`` nor ``dequantized``.
        """
        check_base(base)
        run = {**self.run, "model": {**self.run["model"], "quantization": None}}
        model = load_weights(self.path, run, None, self.task, verify=False)
        if base == "dequantized":
            models.dequantize_into(self.model, model)
        return model.to(next(self.model.parameters()).device).eval()

    def save(self, output_dir: str | Path) -> Path:
        """Write the model with its tokenizer, card and ``run.json`` into a new folder.

        Raises:
            OutputError: The folder exists and is not empty.
        """
        import json

        folder = Path(output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: exists and is not empty; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.parent / f".{folder.name}{checkpoints.STAGING}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with models.quiet():
                checkpoints.save_model(self.model, self.tokenizer, staging)
            for name in ("curves.png", "metrics.jsonl"):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, staging / name)
            run = {**self.run, "output_dir": str(folder)}
            text = card.model_card(run, models.adapter_kind(self.model))
            checkpoints.write_text(staging / "README.md", text)
            checkpoints.write_text(staging / "run.json", json.dumps(run, indent=1))
            if folder.exists():
                folder.rmdir()
            checkpoints.publish(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder


def load(
    path: str | Path,
    *,
    model: str | None = None,
    dtype: Any = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> TrainedModel:
    """Load a finished run; no flags and no data are needed.

    Args:
        path: The output folder of a run.
        model: Where the base model of an adapter is now, if it has moved.
        dtype: Computes in this type; float32 by default, whatever the training used.
        verify: Check every file against the manifest, and the base against its fingerprint.
        trust_remote_code: Let a run that was trained with the option of this name run the Python code that came with
            its checkpoint.

    Raises:
        CheckpointError: The run has no task, as a policy's; files are missing or changed, the base is another one
            than was trained on, or the run needs code that is not trusted.
        ModelError: The base is not where it was, or ``dtype`` is none.
    """
    folder, dtype = Path(path), models.as_dtype(dtype or "float32")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    run = checkpoints.read_json(folder / "run.json")
    if "task_state" not in run:
        raise CheckpointError(card.without_task(folder, run))
    if verify and (problems := checkpoints.damage(folder)):
        raise CheckpointError(*problems)
    checkpoints.check_code(folder, run, trust_remote_code)
    task = tasks.build(recipes.task_from_dict(run["task"]))
    task.restore(run["task_state"])
    loaded = load_weights(folder, run, model, task, verify)
    models.in_dtype(loaded, dtype)
    if torch.cuda.is_available():
        loaded.to("cuda")
    tokenizer = models.load_reader(task.reads, str(folder), **options_of_whole(run["model"]))
    if model is not None:
        run["model"] = relocated(run["model"], model)
    return TrainedModel(loaded.eval(), tokenizer, task, run, folder)


def load_weights(
    folder: Path, run: Mapping[str, Any], base: str | None, task: tasks.Task, verify: bool
) -> Any:
    """The model of a run folder, by the same calls that the model card shows; a LoRA head stays in float32."""
    kind = recipes.saved_adapter_kind(folder)
    if kind is None:
        if base is not None:
            raise CheckpointError(f"{folder}: a whole model, without a base that could have moved to {base}")
        options = options_of_whole(run["model"])
        whole = models.load_model(str(folder), task.auto_class, config={}, **options)
        if whole.new:
            raise CheckpointError(f"{folder}: these weights were not saved: {sorted(whole.new)}")
        return whole.model
    facts = run["model"] if base is None else relocated(run["model"], base)
    reference, config = facts["reference"], models.head_config(folder, facts["options"])
    try:
        loaded = models.load_model(
            reference,
            task.auto_class,
            config=config,
            quantization=facts.get("quantization"),
            **facts["options"],
        )
    except ModelError as error:
        moved = "if the base of this adapter has moved, say where it is (--model; model= in Python)"
        raise ModelError(*error.problems, moved) if base is None else error from error
    if verify and loaded.fingerprint != facts["fingerprint"]:
        raise CheckpointError(
            f"{reference}: not the base that this adapter was trained on (its weights' fingerprint is "
            f"{loaded.fingerprint[:23]}..., not {facts['fingerprint'][:23]}...); pass the right one as model"
        )
    if facts.get("added_tokens"):
        models.give_rows(loaded.model, **facts["added_tokens"])
    with models.reading(str(folder)):
        if (folder / "generation_config.json").is_file():
            loaded.model.generation_config = loaded.model.generation_config.from_pretrained(folder)
        loaded_adapter = adapters.load(models.in_dtype(loaded.model, torch.float32), folder)
        return models.in_dtype(loaded_adapter, torch.float32)


def relocated(facts: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What ``run.json`` says of an adapter's base, when that is at another place now."""
    given = {name: value for name, value in facts["options"].items() if name != "revision"}
    source, options = models.located(base, given)
    return {**facts, "reference": base, "source": source, "options": options}


def check_base(base: str) -> None:
    if base not in ("full_precision", "dequantized"):
        raise ModelError(f"base: {base!r} is neither full_precision nor dequantized")


def options_of_whole(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The base's options that a model saved with all its weights still needs."""
    return {name: facts["options"][name] for name in card.WITH_WHOLE_MODELS if name in facts["options"]}


def compare(one: TrainedModel, other: TrainedModel, texts: Sequence[Any]) -> dict[str, float]:
    """How far two models are apart on some texts: the largest difference of logits, and how many answers differ.

    Returns:
        ``{"examples", "max_logit_difference", "largest_logit", "label_changes"}``.
    """
    import datasets

    rows = datasets.Dataset.from_list([one._row(i, text) for i, text in enumerate(texts)])
    encoded, collate = one._encoded(rows), one.task.collator(one.tokenizer)
    difference = largest = 0.0
    for start in range(0, len(encoded), BATCH_SIZE):
        batch = collate(encoded.select(range(start, min(start + BATCH_SIZE, len(encoded)))).to_list())
        first, second = (checkpoints.logits_on(m.model, [batch])[0] for m in (one, other))
        difference = max(difference, (first - second).abs().nan_to_num(torch.inf).max().item())
        largest = max(largest, first.abs().max().item())
    answers = zip(one.predict(texts), other.predict(texts), strict=True)
    return {
        "examples": len(rows),
        "max_logit_difference": difference,
        "largest_logit": largest,
        "label_changes": sum(not one.task.same(a, b) for a, b in answers),
    }


def evaluate(
    path: str | Path, source: Any = None, *, trust_remote_code: bool = False, **options: Any
) -> dict[str, Any]:
    """``load(path).evaluate(source, **options)``; see :meth:`TrainedModel.evaluate`."""
    return load(path, trust_remote_code=trust_remote_code).evaluate(source, **options)


def merge(
    path: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    base: str = "full_precision",
    trust_remote_code: bool = False,
) -> tuple[TrainedModel, dict[str, Any]]:
    """Merge an adapter into its base, compare the two on validation data, then write the merged model.

    Args:
        path: The output folder of a PEFT run.
        output_dir: A new folder.
        model: Where the base is now, if it has moved.
        base: As in :meth:`TrainedModel.merge`.
        trust_remote_code: As in :func:`load`.

    Returns:
        The merged model as loaded back from ``output_dir``, and the comparison. Of an adapter on a quantized
        base it holds, under ``from_quantized``, how far each base leads from the model that was trained.

    Raises:
        CheckpointError: The merged model's logits are further from the adapter's on the same base than float32
            rounding explains (1e-3 of the largest logit).
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not empty; choose another folder")
    trained = load(path, model=model, trust_remote_code=trust_remote_code)
    merged, texts, distances = trained.merge(base), _validation_texts(trained), {}
    same = trained
    if models.quantized_layers(trained.model):
        same = _with_model(trained, trained.on_base(base))
        for other in ("full_precision", "dequantized"):
            found = same if other == base else _with_model(trained, trained.on_base(other))
            distances[other] = compare(trained, found, texts)
            report.say(
                f"- against the quantized model that was trained, on its {other} base: logits differ by at most "
                f"{distances[other]['max_logit_difference']:.2g}, {distances[other]['label_changes']} labels change"
            )
    comparison: dict[str, Any] = compare(same, merged, texts)
    if not comparison["max_logit_difference"] <= 1e-3 * max(1.0, comparison["largest_logit"]):
        raise CheckpointError(
            f"{path}: merged and adapter differ by {comparison['max_logit_difference']:.3g} in their logits; "
            "nothing was written"
        )
    comparison |= {"from_quantized": distances} if distances else {}
    merged.run["merge"] = comparison
    merged.save(folder)
    return load(folder, trust_remote_code=trust_remote_code), comparison


def _with_model(trained: TrainedModel, model: Any) -> TrainedModel:
    return TrainedModel(model, trained.tokenizer, trained.task, trained.run, trained.path)


def _validation_texts(trained: TrainedModel) -> list[Any]:
    """Some of the run's own texts; two that fit any task where its data is not to be had any more."""
    columns = trained.run["data"]["columns"]
    try:
        rows = trained._rows(None, None, "validation")
    except DataError as error:
        report.say(f"- compared on two sample texts, without the run's own data: {error}")
        usage = trained.task.usage(columns, trained.run["model"]["max_length"])
        return list(usage.samples or usage.inputs)
    return [{name: row[name] for name in columns} for row in rows.select(range(min(len(rows), 256)))]

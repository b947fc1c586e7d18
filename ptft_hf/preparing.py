"""Before the first step: what was asked, what it needs, and the sums that a person wants to see. Writes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ptft_hf import adapters, checkpoints, data, inspecting, models, recipes, report, settings, tasks
from ptft_hf.adapters import adapterhub
from ptft_hf.adapters.earlier import check_earlier
from ptft_hf.errors import DataError, RecipeError, did_you_mean
from ptft_hf.forward import BATCH_SIZE
from ptft_hf.models import plain_model


class Plan(NamedTuple):
    """What a run was asked to do, checked before any data or weights are read."""

    model: str
    task: recipes.TaskRecipe
    adapter: recipes.AdapterRecipe
    config: Any
    given: dict[str, Any]


class Ready(NamedTuple):
    """Everything a run needs, loaded and checked, before anything is written."""

    task: tasks.Task
    splits: data.Splits
    encoded: dict[str, Any]
    model: Any
    tokenizer: Any
    head: tuple[str, ...]
    facts: dict[str, Any]
    notes: list[str]
    method: adapters.Adapter


# ---- what was asked ----


def make_plan(model: str, task: Any, adapter: Any, given: Mapping[str, Any] | Sequence[str]) -> Plan:
    """Recipes with all overrides laid over them.

    Raises:
        RecipeError: Every fault of task, adapter and settings.
    """
    pairs = [f"{k}={json.dumps(v)}" for k, v in given.items()] if isinstance(given, Mapping) else list(given)
    config, earlier = None, None
    kind = recipes.saved_adapter_kind(adapter)
    if kind is not None:
        earlier = Path(adapter)
        if kind == "adapterhub":
            adapter = adapterhub.recipe_of_folder(earlier)
        else:
            adapter = recipes.adapter_from_dict(checkpoints.read_json(earlier / "run.json")["adapter"])
    elif not isinstance(adapter, str | Path | recipes.AdapterRecipe):
        config, adapter = adapter, adapters.recipe_of_config(adapter)
    the_task, the_adapter, overrides = recipes.load_run(task, adapter, pairs)
    return Plan(
        absolute(str(model)),
        the_task,
        the_adapter,
        earlier or config,
        recipes.resolve_training({}, the_task.training, the_adapter.training, overrides.training),
    )


def absolute(model: str) -> str:
    """A reference whose folder, if it is one, is found from anywhere."""
    prefix = recipes.CONFIG if recipes.from_nothing(model) else ""
    folder = Path(model.removeprefix(prefix))
    if prefix and str(folder) in ("", "."):
        raise RecipeError("model: config: what? Write a model type (config:bert), a folder or a hub id")
    # A folder that bears a model type's name does not hide it.
    is_folder = folder.is_dir() and not (prefix and not (folder / "config.json").is_file())
    return f"{prefix}{folder.resolve()}" if is_folder else model


# ---- what is needed ----


def prepare(
    plan: Plan,
    source: Any,
    seed: int,
    rows: Mapping[str, int] = MappingProxyType({}),
    loader: Any = models,
) -> Ready:
    """Data, model and method, in this order, each checked before the next is loaded. Writes nothing.

    ``rows`` takes a part of the splits that it names, see :func:`ptft_hf.data.take`; ``loader`` has the functions
    ``load_model`` and ``random_model``, those of :mod:`ptft_hf.models` or others in their place.
    """
    import transformers

    recipe = plan.task
    with models.quiet():
        settings.check_recipe_types(plan.given, plan.adapter)
    if not 0 <= seed < 2**32:
        raise RecipeError(f"seed: {seed} is not a number from 0 to 2**32 - 1")
    source = recipe.data if source is None else source
    if source is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe, or pass data in Python")
    task = tasks.build(recipe)
    splits = tasks.load_splits(task, source, recipe, seed)
    splits = data.take(splits, rows, task.label_column, seed)
    notes = [*splits.notes, *task.look_at(splits)]

    transformers.set_seed(seed)
    options = recipe.model_options
    loaded, tokenizer, begun = begin_from(plan, task, splits, options, loader)
    max_length, said = models.fit_inputs(
        task.reads, tokenizer, loaded.model, recipe.model, adapters.virtual_tokens(plan.adapter)
    )
    notes += [*begun, *said]
    added = models.add_tokens(loaded.model, tokenizer, recipe.add_tokens)
    if added:
        notes.append(f"{len(added['ids'])} tokens added; their embeddings begin at the mean of all others")
    method = adapters.build(plan.adapter, plan.config)
    source, given = models.located(plan.model, options)
    facts = {
        "reference": plan.model,
        "source": source,
        "auto_class": task.auto_class,
        "max_length": max_length,
        "dtype": str(models.as_dtype(options.get("dtype", "float32"))).removeprefix("torch."),
        "options": {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in given.items()},
        "quantization": plan.adapter.quantization,
        "added_tokens": added,
        "fingerprint": loaded.fingerprint,
        "new_parameters": sorted(loaded.new),
        "head": list(loaded.head),
    }
    if recipes.from_nothing(plan.model) and task.reads == "text":
        facts["tokenizer"] = models.tokenizer_fingerprint(tokenizer)
    if plan.adapter.head_learning_rate is not None and not loaded.head:
        raise RecipeError(
            f"{plan.adapter.name}: head_learning_rate: {type(loaded.model).__name__} has no new head: all of it is "
            "pretrained; leave it out"
        )
    check_earlier(plan.config, plan.adapter, loaded.model.config, facts)
    with models.quiet():
        attached = method.attach(loaded.model, loaded.head, task.peft_task_type)
    task.check_model(attached, tokenizer, max_length)

    encoded, cuts = {}, {}
    for name in ("train", "validation", "test"):
        rows_ = getattr(splits, name)
        encoded[name], cuts[name] = task.encode(rows_, tokenizer, max_length)
        if cuts[name]:
            notes.append(models.too_long(name, cuts[name], len(rows_), max_length, task.long_inputs))
    found = inspecting.check(
        task, encoded["train"], loaded.model, tokenizer, cuts["train"], len(splits.train), plan.model
    )
    found.refuse()
    notes += found.notes
    return Ready(task, splits, encoded, attached, tokenizer, loaded.head, facts, notes, method)


def begin_from(
    plan: Plan, task: tasks.Task, splits: data.Splits, options: Mapping[str, Any], loader: Any = models
) -> tuple[models.LoadedModel, Any, list[str]]:
    """The model and its tokenizer, from a checkpoint or from nothing, and what is to be said of them."""
    if recipes.from_nothing(plan.model):
        return begin_from_nothing(plan, task, splits, options, loader)
    tokenizer = models.load_reader(task.reads, plan.model, **options)
    notes = task.look_at_checkpoint(models.from_pretrained("AutoConfig", plan.model, options), tokenizer)
    loaded = loader.load_model(
        plan.model, task.auto_class, config=task.config(), quantization=plan.adapter.quantization, **options
    )
    return loaded, tokenizer, notes


def begin_from_nothing(
    plan: Plan, task: tasks.Task, splits: data.Splits, options: Mapping[str, Any], loader: Any = models
) -> tuple[models.LoadedModel, Any, list[str]]:
    """Random weights, and a tokenizer that is trained on the training texts or taken from somewhere.

    Raises:
        RecipeError: Something else than pre-training in full is to begin from nothing.
        ModelError: They cannot be had.
    """
    problems = tasks.faults_of_nothing(task, plan.model)
    if not isinstance(plan.adapter, recipes.FullRecipe):
        problems.append(
            f"adapter: {plan.adapter.name} changes a part of what a model has learnt, and {plan.model} has random "
            "weights: use full/default"
        )
    if problems:
        raise RecipeError(*problems)
    config = models.config_of(plan.model, {**options, **task.config()})
    reader, notes = task.reader_from_nothing(plan.model, config, splits.train)
    loaded = loader.random_model(plan.model, task.auto_class, config, reader, options)
    return loaded, reader, ["the weights are random: nothing is pretrained", *notes]


def training_arguments(plan: Plan, ready: Ready, folder: Path, seed: int) -> Any:
    """Upstream's ``TrainingArguments`` from recipes, command line and defaults."""
    chosen = settings.complete(plan.given, ready.method.learning_rate, ready.task.best_metric)
    if chosen.get("bf16") and not runs_in_bf16(ready):
        if plan.given.get("bf16"):
            raise RecipeError(
                f"training.bf16: {type(plain_model(ready.model)).__name__} fails under autocast; leave it out"
            )
        chosen["bf16"] = False
        ready.notes.append("this architecture fails under bf16 autocast: training in float32")
    if ready.facts["dtype"] in ("bfloat16", "float16") and not (chosen.get("bf16") or chosen.get("fp16")):
        raise RecipeError(
            f"model.dtype: a {ready.facts['dtype']} base under a float32 head needs autocast: set "
            "bf16=true, or load the base in float32"
        )
    if plan.adapter.gradual_unfreezing and chosen["num_train_epochs"] < 2:
        raise RecipeError("gradual_unfreezing: needs at least 2 epochs, to have something to unfreeze")
    arguments = settings.training_arguments(chosen, folder / "checkpoints", seed)
    check_metric(ready, arguments.metric_for_best_model)
    if plan.adapter.gradual_unfreezing and arguments.world_size > 1:
        raise RecipeError(
            "gradual_unfreezing: DistributedDataParallel cannot change what is trained; use one process"
        )
    return arguments


def first_rows(ready: Ready) -> Any:
    return ready.encoded["train"].select(range(min(2, len(ready.encoded["train"]))))


def runs_in_bf16(ready: Ready) -> bool:
    """Whether the model's forward pass works under bfloat16 autocast (DeBERTa's does not: its mask value
    overflows)."""
    batch = ready.task.collator(ready.tokenizer)(first_rows(ready).to_list())
    device = next(ready.model.parameters()).device
    try:
        with torch.autocast(device.type, torch.bfloat16):
            checkpoints.logits_on(ready.model, [batch])
    except RuntimeError:
        return False
    return True


def check_metric(ready: Ready, metric: str | None) -> None:
    """Upstream looks for the metric after the first evaluation.

    Raises:
        RecipeError: The task does not compute it.
    """
    name = str(metric).removeprefix("eval_")
    if metric is None or name in (ready.task.best_metric, "loss"):
        return
    rows = first_rows(ready)
    outputs = ready.task.outputs(ready.model, rows, ready.tokenizer, BATCH_SIZE)
    known = ready.task.metrics(outputs, ready.task.targets(rows))
    if name not in known:
        raise RecipeError(
            f"training.metric_for_best_model: {metric!r} is not computed here{did_you_mean(name, known)}; choose "
            f"among {', '.join(dict.fromkeys(['loss', *known]))}"
        )


# ---- what a person sees ----


def describe(plan: Plan, ready: Ready, arguments: Any, trainer: Any, attention: Any = None) -> None:
    """Said before the first step: rows, labels, trained parameters by module, the longest batch, examples."""
    trainable, total = models.count_parameters(ready.model)
    groups: Counter[str] = Counter()
    for name, parameter in ready.model.named_parameters():
        if parameter.requires_grad:
            groups[module_kind(name)] += parameter.numel()
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    rows, longest = len(ready.encoded["train"]), max(ready.encoded["train"]["length"][:])
    steps = len(trainer.get_train_dataloader()) // arguments.gradient_accumulation_steps
    precision = (
        "bf16 autocast" if arguments.bf16 else "fp16 autocast" if arguments.fp16 else ready.facts["dtype"]
    )
    report.before_training(
        ready.notes,
        {
            "model": f"{plan.model} ({type(plain_model(ready.model)).__name__})",
            "method": f"{plan.adapter.name}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
            "rows": ", ".join(f"{name} {len(rows):,}" for name, rows in ready.encoded.items()),
            "batch": f"{batch} rows, the longest {min(batch, rows) * ready.task.sequences} x {longest} "
            f"{ready.task.unit}",
            "steps": f"{steps * arguments.num_train_epochs:.0f} in {arguments.num_train_epochs:g} epochs, "
            f"learning rate {arguments.learning_rate:g}, {precision}, "
            f"{attention or f'{plain_model(ready.model).config._attn_implementation} attention'}",
        },
        dict(groups.most_common(12)),
    )
    shown = inspecting.rows_of(
        ready.task, ready.splits.train, ready.encoded["train"], ready.tokenizer, EXAMPLES
    )
    inspecting.show(report.messages, shown, limit=160, title="the first training rows as the model reads them")


EXAMPLES = 3
PEFT_PARTS = ("default", "modules_to_save", "original_module")


def module_kind(name: str) -> str:
    """A parameter's module without layer numbers, so that the layers are summed."""
    parts = name.removeprefix("base_model.model.").split(".")[:-1]
    kept = [p for p in parts if not (p.isdigit() or p in PEFT_PARTS or p.startswith("lora_"))]
    return ".".join(kept[-3:])

"""What a run will take, before it is begun: memory, time and disk, and what to change if that is too much.

:func:`plan` reads the data, the tokenizer and a checkpoint's configuration, and no weights; :func:`before_run` is the
same from inside a run. The rooms behind them, each importing only those before: ``counting`` (tensors without
values), ``skeletons`` (a run's model of such), ``batches`` (which ones a run sees), ``sums`` (the run's own steps on
them), ``machine`` (free memory, speed), ``memory`` and ``timing`` (arithmetic), ``forecasts`` (the result),
``probing`` (the largest batch, tried), ``showing``. That of PPO is in :mod:`ptft_hf.rlhf.forecasting`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ptft_hf import models, recipes, report
from ptft_hf.allocator import give_back_freed_memory
from ptft_hf.errors import ModelError, PtftError, RecipeError
from ptft_hf.inspecting.checks import untouched_randomness
from ptft_hf.planning import machine, memory, probing, skeletons, timing
from ptft_hf.planning.counting import Counter
from ptft_hf.planning.forecasts import Advice, Forecast, forecast, with_probe
from ptft_hf.planning.sums import Sums, count_run
from ptft_hf.preparing import Plan, Ready, make_plan, prepare, training_arguments

__all__ = ["Advice", "Forecast", "before_run", "plan"]


def plan(
    *,
    model: str,
    task: str | Path | recipes.TaskRecipe,
    adapter: Any,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    probe: bool = False,
    memory: str | int | None = None,
    gflops: float | None = None,
) -> Forecast:
    """Forecast what a run with these arguments will take. No weights are loaded, and nothing is written.

    Every step is counted on the run's own largest batch, by its own sampler, with tensors that have no values, so
    that it holds for any architecture and method. The baseline is that of this process.

    Args:
        model: As in :func:`ptft_hf.train`, like the next five.
        task: Catalogue name or file of a task recipe, or the recipe.
        adapter: Catalogue name or file of an adapter recipe, the recipe, a ``PeftConfig``, or an adapter's folder.
        data: Used instead of the recipe's ``data``.
        seed: Of the order of rows, and of any split that is made.
        settings: As after ``--set``.
        probe: Load the weights in a process of its own, take some steps with the largest and a usual batch, and
            correct peak and time by what they took.
        memory: Bytes that the process may hold, or a text such as ``16GiB``; by default what is free.
        gflops: Speed of products of matrices in the run's precision, 10^9 operations a second, where the run is to be
            on another machine; by default measured here.

    Raises:
        RecipeError: Every fault of task, adapter and settings, or a probe of data that was given in Python.
        ModelError: The model cannot be built or run without its weights.
        PtftError: What would stop the run before its first step.
    """
    limit = machine.parse_size(memory) if isinstance(memory, str) else memory
    if gflops is not None and not gflops > 0:
        raise RecipeError(f"gflops: {gflops:g} is no speed; it must be above 0")
    if probe and data is not None:
        raise RecipeError("probe: needs data that a process of its own can read; name it in the task recipe")
    asked = make_plan(model, task, adapter, settings)
    if data is not None:
        asked = asked._replace(task=asked.task.model_copy(update={"data": None}))
    ready, arguments, sums = count(asked, data, seed)
    found = _forecast(sums, arguments, baseline(0), asked, limit, gflops)
    if probe:
        order = probing.order(model, asked, adapter, seed, sums, arguments)
        found = with_probe(found, sums, probing.run(order))
    if not found.fits:
        with untouched_randomness():
            found = dataclasses.replace(found, advice=tuple(_advice(asked, ready, arguments, seed, found)))
    return found


def count(asked: Plan, data: Any, seed: int) -> tuple[Ready, Any, Sums]:
    """What a run has ready, its model without weights; its ``TrainingArguments``; and what was counted of it.

    Raises:
        ModelError: The model cannot be built or run without its weights.
        PtftError: What would stop the run before its first step.
    """
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, untouched_randomness():
        try:
            with counter:
                ready = prepare(asked, data, seed, loader=skeletons)
                arguments = training_arguments(asked, ready, Path(folder), seed)
            return ready, arguments, count_run(counter, asked, ready, arguments, Path(folder))
        except PtftError:
            raise
        except Exception as error:
            raise not_counted(f"{asked.model} with {asked.adapter.name}", error) from error


def before_run(asked: Plan, ready: Ready, arguments: Any) -> Forecast | None:
    """The forecast of a run whose weights are loaded, made on a model without; None, and why is said, if it cannot
    be had. It never stops the run, draws no random number and touches nothing of the run's."""
    if arguments.fsdp or arguments.deepspeed:
        report.say("- no forecast of memory and time: of models in several parts there is none")
        return None
    try:
        started = time.perf_counter()
        counter = Counter()
        with tempfile.TemporaryDirectory() as folder, untouched_randomness():
            with counter:
                bare = skeletons.shadow(asked, ready)
            sums = count_run(counter, asked, bare, arguments, Path(folder))
        sums = sums._replace(products=machine.new_kernels(sums.products))
        found = _forecast(sums, arguments, baseline(sums.weights), asked, None, None)
        took = f"counted in {time.perf_counter() - started:.1f} s"
        return dataclasses.replace(found, notes=(*found.notes, took))
    except Exception as error:
        report.say(f"- no forecast of memory and time: {said(error)}", style="yellow")
        return None


def not_counted(what: str, error: Exception) -> ModelError:
    """That something cannot be run without its weights, and why."""
    return ModelError(
        f"{what}: cannot be run without its weights, so that there is no forecast ({said(error)}); a run of two "
        "steps on the longest rows would tell"
    )


def said(error: Exception) -> str:
    """An unforeseen error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def baseline(weights: int) -> int:
    """Bytes of this process, or of a device, without a model of so many bytes in it, and without what earlier runs
    have freed."""
    give_back_freed_memory()
    return 0 if torch.cuda.is_available() else max(0, machine.resident() - weights)


def _forecast(
    sums: Sums, arguments: Any, before: int, asked: Plan, limit: int | None, gflops: float | None
) -> Forecast:
    device = arguments.device
    speed = machine.speed(torch.bfloat16 if sums.half else torch.float32, device)
    if gflops is not None:
        speed = speed._replace(flops=gflops * 1e9)
    notes = []
    if arguments.world_size > 1:
        notes.append("of one process; what several exchange is not counted")
    if arguments.torch_compile:
        notes.append("as without torch_compile")
    if device.type != "cpu":
        notes.append("the allowances for this device are not fitted to measurements")
    return dataclasses.replace(
        forecast(
            sums,
            arguments,
            before,
            calibration=memory.calibration_of(device.type, sums.half),
            line=timing.of_counts(sums, speed),
            reads=reading(asked),
            limit=machine.available() if limit is None else limit,
        ),
        notes=tuple(notes),
    )


def reading(asked: Plan) -> int:
    """Bytes of the checkpoint that are there beside the model's own while it is loaded: a quantized one's in full
    precision."""
    if asked.adapter.quantization is None:
        return 0
    options = asked.task.model_options
    item = models.as_dtype(options.get("dtype", "float32")).itemsize
    shapes = skeletons.stored_shapes(asked.model, options).values()
    return sum(item * int(torch.Size(shape).numel()) for shape in shapes)


# ---- what to change ----


def _advice(asked: Plan, ready: Ready, arguments: Any, seed: int, found: Forecast) -> Iterator[Advice]:
    """Changes of the run, one by one and together, each counted."""
    assert found.limit is not None
    together: dict[str, Any] = {}
    adapter = asked.adapter
    for words, settings, other in _changes(asked, ready, arguments, found):
        together |= settings
        adapter = other or adapter
        if (peak := _peak_of(asked, ready, seed, settings, other or asked.adapter, found)) is not None:
            yield Advice(words, peak, peak <= found.limit)
    peak = _peak_of(asked, ready, seed, together, adapter, found)
    if peak is not None:
        yield Advice("all of these together", peak, peak <= found.limit)


CHECKPOINTING = "activation_checkpointing"
"""What the newest transformers call it; before, ``gradient_checkpointing``."""


def _changes(
    asked: Plan, ready: Ready, arguments: Any, found: Forecast
) -> Iterator[tuple[str, dict[str, Any], recipes.AdapterRecipe | None]]:
    batch, micro = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if batch > 1:
        above = sum(found.stages["training"].get(kind, 0) for kind in ("activations", "logits", memory.ALLOCATOR))
        room = max(0, (found.limit or 0) - (found.peak - above))
        parts = next((k for k in (2, 4, 8, 16, 32, 64) if batch % k == 0 and above / k <= room), batch)
        settings = {"per_device_train_batch_size": batch // parts, "gradient_accumulation_steps": micro * parts}
        yield " ".join(f"--set {name}={value}" for name, value in settings.items()), settings, None
    name = CHECKPOINTING if hasattr(arguments, CHECKPOINTING) else f"gradient_{CHECKPOINTING.partition('_')[2]}"
    if models.plain_model(ready.model).supports_gradient_checkpointing and not getattr(arguments, name):
        yield f"--set {name}=true (more time)", {name: True}, None
    if asked.adapter.trains_weights:
        yield "--adapter lora/r16_all_linear", {}, recipes.load_adapter("lora/r16_all_linear")
    if asked.adapter.quantization is None and not recipes.from_nothing(asked.model):
        yield "--adapter lora/qlora_nf4 (a base in four bits)", {}, recipes.load_adapter("lora/qlora_nf4")


def _peak_of(
    asked: Plan,
    ready: Ready,
    seed: int,
    settings: Mapping[str, Any],
    adapter: recipes.AdapterRecipe,
    found: Forecast,
) -> int | None:
    """The peak, proof included, of the run so changed; None if it cannot be had."""
    given = {**asked.given, **settings}
    config = asked.config if adapter is asked.adapter else None
    changed = asked._replace(adapter=adapter, given=given, config=config)
    counter = Counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            with counter:
                bare = skeletons.shadow(changed, ready)
                arguments = training_arguments(changed, bare, Path(folder), seed)
            sums = count_run(counter, changed, bare, arguments, Path(folder))
    except Exception:  # not every architecture has every method: no advice, then
        return None
    before = found.stages["loading"][memory.BASELINE]
    return forecast(sums, arguments, before, reads=reading(changed)).peak_in_all

"""A run's own Trainer, model and largest batches, run on a :class:`Counter`: what each part of it would hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_hf import building, forward, frozen, models
from ptft_hf.frozen.probing import only_stack
from ptft_hf.models import checkpointing
from ptft_hf.models.caching import STEPS
from ptft_hf.models.decoding import rows_at_once
from ptft_hf.planning.batches import Batch, Schedule, longest_evaluated, schedule
from ptft_hf.planning.counting import GRADIENTS, OPTIMIZER, Counted, Counter, size_of
from ptft_hf.preparing import Plan, Ready
from ptft_hf.tasks import figures
from ptft_hf.tasks.summarization import Summarization

HALF_BYTES, FLOAT_BYTES = 2, 4
PROVEN = 16
"""Rows of a proof, as in :data:`ptft_hf.training.PROBE_ROWS`, which stands above this."""
LIKE = 1.1
"""A later batch of up to so many times the first one's tokens takes as many times its memory; a larger one is
counted."""
SMALL = 0.7
"""A batch of so small a part of the largest one takes less, whatever its attention keeps: up to 128 tokens that is a
third of the rest (MiniLM)."""
SCATTERED = 0.4
"""The part of what was freed that lies in holes with activation checkpointing: small objects of autograd's stay where
large pieces were, so that these do not become one again (in the forward pass of a Llama in float32 the heap grew by
548 MB, of which it held 51). From that run's peak; it holds for three others in bfloat16 within 8 %."""


class Sums(NamedTuple):
    """Bytes and operations of a run's parts; each ``Counted`` includes the weights.

    Attributes:
        weights: All that is held once the model is built.
        gradients: Of everything that is trained.
        optimizer: Its state.
        first: The first step's largest batch, forwards and backwards.
        later: The largest of all further steps, in proportion; None if there are none.
        short: The largest batch for which attention keeps its whole matrix, where longer ones do not.
        stepping: The optimizer's own first step, gradients included.
        evaluation: The longest validation rows between epochs.
        written: Keys, values and logits while texts are written in an evaluation; 0 if none are.
        cache: Activations of frozen layers that are kept.
        frozen_layers: How many these are.
        saved: Of a checkpoint, without the optimizer.
        parameters: Of the model in float32, as it is proven.
        compared: Logits on which the saved and the trained model are compared, all copies of them.
        reads_best: Whether the best checkpoint is read at the end.
        half: Whether products are of half precision.
        products: Half-precision products of matrices, each shape of each for itself, in training and evaluation.
        schedule: The batches.
    """

    weights: int
    gradients: int
    optimizer: int
    first: Counted
    later: Counted | None
    short: Counted | None
    stepping: Counted
    evaluation: Counted
    written: int
    cache: int
    frozen_layers: int
    saved: int
    parameters: int
    compared: int
    reads_best: bool
    half: bool
    products: int
    schedule: Schedule

    @property
    def holes(self) -> int:
        """The most that a step leaves (:attr:`ptft_hf.planning.counting.Counted.holes`): the heap does not shrink."""
        return max(one.holes for one in (self.first, self.later, self.short) if one is not None)


def count_run(counter: Counter, plan: Plan, ready: Ready, arguments: Any, folder: Path) -> Sums:
    """The sums of a run.

    Args:
        counter: Inside which the model was built.
        plan: What was asked.
        ready: What the run has ready, its model without weights (:func:`ptft_hf.planning.skeletons.shadow`).
        arguments: The run's ``TrainingArguments``.
        folder: An empty one; nothing is written.
    """
    from ptft_hf.trainer import Trainer

    with counter, models.quiet(), torch.random.fork_rng():
        attention = building.choose_attention(plan, ready, arguments)
        trainer = building.build_trainer(Trainer, plan, ready, arguments, folder)
        counter.forget_kinds()
        return _Run(counter, trainer, ready, 0 if attention is None else attention.short).sums()


class _Run:
    """A Trainer whose model has no weights; up to ``short`` tokens its attention keeps its whole matrix."""

    def __init__(self, counter: Counter, trainer: Any, ready: Ready, short: int) -> None:
        self.counter, self.trainer, self.ready, self.short = counter, trainer, ready, short
        args = trainer.args
        if checkpointing.is_on(args):
            checkpointing.enable(trainer.model, args)
        plain = args.world_size == 1 and not args.torch_compile  # what is added otherwise cannot be counted
        self.model = trainer.accelerator.prepare_model(trainer.model) if plain else trainer.model
        words = models.plain_model(self.model).get_output_embeddings()
        counter.vocabulary = 0 if words is None else words.weight.shape[0]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: counter.call(GRADIENTS, p.grad))
        if hasattr(trainer.data_collator, "begin_epoch"):
            trainer.data_collator.begin_epoch(args.seed, 0)
        self.frozen: list[tuple[int, int] | None] = []

    def sums(self) -> Sums:
        trainer, counter = self.trainer, self.counter
        trainer.lazy = trainer.can_be_lazy()
        weights, plan = counter.live, schedule(trainer)
        hooks = [layer.register_forward_hook(self._see) for layer in only_stack(self.model) or ()]
        first = self.passes(plan.first)
        for hook in hooks:
            hook.remove()
        gradients = size_of(p.grad for p in self.trained if p.grad is not None)
        stepping, optimizer = self.step()
        later = None if plan.later is None else first.scaled(plan.later.size / plan.first.size)
        if plan.later is not None and plan.later.size > LIKE * plan.first.size:
            later = self.passes(plan.later)
        short = None
        if self.short and plan.first.width > self.short and (some := plan.largest_up_to(self.short)) is not None:
            short = self.passes(some) if some.size > SMALL * plan.first.size else None
        layers, cache = self.cached()
        self.model.zero_grad(set_to_none=True)
        evaluation = self.evaluated(trainer.eval_dataset, trainer.args.eval_batch_size)
        half = trainer.args.bf16 or trainer.args.fp16
        written = self.written(trainer.eval_dataset, HALF_BYTES if half else FLOAT_BYTES)
        whole = models.adapter_kind(self.model) is None
        return Sums(
            weights,
            gradients,
            optimizer,
            first,
            later,
            short,
            stepping,
            evaluation,
            written,
            cache,
            layers,
            size_of(self.model.parameters() if whole else self.trained),
            sum(p.numel() * (FLOAT_BYTES if p.is_floating_point() else 1) for p in self.model.parameters()),
            self.compared(),
            bool(trainer.args.load_best_model_at_end),
            bool(half),
            len(first.products) * plan.shapes + len(evaluation.products) * self.evaluated_shapes(),
            plan,
        )

    def passes(self, batch: Batch) -> Counted:
        """A forward and backward pass, the first one of an optimizer step."""
        trainer = self.trainer
        rows = trainer.data_collator(trainer.train_dataset.select(batch.rows).to_list())
        self.model.zero_grad(set_to_none=True)
        with self.counter.counting() as counted:
            trainer.training_step(self.model, rows, self.ready.task.loss_weight(rows["labels"]))
            found = counted()
        return found._replace(holes=round(SCATTERED * found.freed)) if checkpointing.is_on(trainer.args) else found

    def step(self) -> tuple[Counted, int]:
        """The optimizer's first step, and the bytes of its state."""
        trainer, counter = self.trainer, self.counter
        optimizer = trainer.create_optimizer()
        before = counter.kinds.get(OPTIMIZER, 0)
        with counter.counting(OPTIMIZER) as counted:
            optimizer.step()
            result = counted()
        state = counter.kinds.get(OPTIMIZER, 0) - before
        self.model.zero_grad(set_to_none=True)
        optimizer.state.clear()
        trainer.optimizer = None
        return result, state

    # ---- what lies below everything that is trained ----

    def _see(self, layer: Any, args: Any, result: Any) -> None:
        """Size and bytes of a number of each frozen layer's result; None from the first one on that is trained."""
        hidden = result[0] if isinstance(result, tuple) else result
        if not (self.frozen and self.frozen[-1] is None):
            self.frozen.append(None if hidden.requires_grad else (hidden.shape[-1], hidden.element_size()))

    def cached(self) -> tuple[int, int]:
        """Layers whose activations are kept, and bytes of these, if the cache's own trial finds that exact."""
        trainer = self.trainer
        states = [state for state in self.frozen if state is not None]
        if not states or not frozen.worthwhile(trainer) or trainer.recipe.trunk_dropout:
            return 0, 0
        tables = [trainer.train_dataset, *([trainer.eval_dataset] if trainer.args.eval_strategy != "no" else [])]
        tokens = sum(sum(table["length"][:]) for table in tables)
        width, item = states[-1]
        size = tokens * width * item
        return (len(states), size) if size <= trainer.recipe.frozen_cache_gb * 1e9 else (0, 0)

    # ---- evaluation ----

    def evaluated(self, rows: Any, batch_size: int) -> Counted:
        """A forward pass over the longest rows and what is computed of its logits."""
        task, trainer, counter = self.ready.task, self.trainer, self.counter
        model = self.model
        if counter.vocabulary:
            batch_size = forward.fitting(model, batch_size, max(1, *rows["length"][:], 1))
        some = rows.select(longest_evaluated(rows, batch_size)).to_list()
        batch = figures.where_labelled(model, task.collator(self.ready.tokenizer)(some))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), trainer.compute_loss_context_manager(), counter.counting() as counted:
            outputs = model.eval()(**trainer._prepare_inputs(inputs))
            if counter.vocabulary and "labels" in batch:
                figures.token_figures(outputs, batch["labels"])
            else:
                _ = [logits.float() for logits in forward.logits_of_heads(outputs)]
            return counted()

    def evaluated_shapes(self) -> int:
        """How many of the batches between epochs are unlike all others in shape."""
        args, rows = self.trainer.args, self.trainer.eval_dataset
        if args.eval_strategy == "no":
            return 0
        lengths, size = sorted(rows["length"][:], reverse=True), args.eval_batch_size
        return len({(len(lengths[i : i + size]), lengths[i]) for i in range(0, len(lengths), size)})

    def compared(self) -> int:
        """Bytes of the logits of a proof's rows, made by either model; only a language model's count."""
        rows, model = self.ready.encoded["validation"], self.model
        longest = max(1, *rows["length"][:], 1)
        count = min(len(rows), forward.fitting(model, PROVEN, longest))
        if models.plain_model(model).config.is_encoder_decoder and "labels" in rows.column_names:
            longest = max((len(labels) for labels in rows["labels"][:] if isinstance(labels, list)), default=1)
        return int(2 * count * longest * self.counter.vocabulary * FLOAT_BYTES)

    def written(self, rows: Any, item: int) -> int:
        """Bytes of keys, values, logits and packed weights while the longest rows' texts are written."""
        task, model = self.ready.task, models.plain_model(self.model)
        if not isinstance(task, Summarization) or self.trainer.args.eval_strategy == "no":
            return 0
        new, beams = task.fields["max_new_tokens"], task.fields.get("num_beams", 1)
        longest = max(rows["prompt_length"][:], default=1)
        kept, count = key_value_size(model.config, item), self.trainer.args.eval_batch_size
        positions = longest + new
        if not model.config.is_encoder_decoder:
            positions += STEPS  # room for more
            if beams == 1 and not torch.cuda.is_available():
                count = rows_at_once(count, kept * (longest + new))
        dtype = torch.bfloat16 if item == HALF_BYTES else None
        packed = 0 if torch.cuda.is_available() else models.packed_bytes(self.model, dtype)
        return packed + min(count, len(rows)) * beams * (positions * kept + 3 * FLOAT_BYTES * self.counter.vocabulary)


def key_value_size(config: Any, item: int) -> int:
    """Bytes of keys and values of one position, in all layers.

    Args:
        config: A model's.
        item: Bytes of a number.
    """
    text = config.get_text_config(decoder=True)

    def first(*names: str) -> int | None:
        return next((int(v) for name in names if isinstance(v := getattr(text, name, None), int)), None)

    layers = first("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer") or 1
    heads = first("decoder_attention_heads", "num_attention_heads", "num_heads", "n_head") or 1
    width = first("hidden_size", "d_model", "n_embd") or 1
    size = first("head_dim", "d_kv") or math.ceil(width / heads)
    return 2 * layers * (first("num_key_value_heads") or heads) * size * item


def kinds_of(counted: Counted, optimizer: int) -> Mapping[str, int]:
    """Bytes of each kind at a peak, with an optimizer's state."""
    return {**counted.kinds, OPTIMIZER: counted.kinds.get(OPTIMIZER, 0) + optimizer}

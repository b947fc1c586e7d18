"""``transformers.Trainer`` where it is right, and the few places where it is not.

Losses are summed and divided by what was counted over the whole accumulated, cross-process batch; a
checkpoint appears whole or not at all; the order of the rows depends on the seed and the epoch alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from ptft_hf import checkpoints, forward, frozen
from ptft_hf.adapters import Adapter
from ptft_hf.adapters.states import STATE, load_state, save_state
from ptft_hf.atomic import AtomicCheckpoints
from ptft_hf.by_recipe import ByRecipe, without_dropout
from ptft_hf.callbacks import Clock
from ptft_hf.errors import RecipeError
from ptft_hf.models import adapter_kind
from ptft_hf.models.lm_heads import LazyLogits, states_kept
from ptft_hf.resuming import RunningState, check_best
from ptft_hf.sampling import EpochSampler
from ptft_hf.tasks import Task, figures


class Trainer(AtomicCheckpoints, ByRecipe, transformers.Trainer):
    """Trains ``model`` on encoded rows of ``task``.

    Args:
        task: Gives loss, metrics and batches.
        method: Gives learning rates by depth, and what it needs of its own.
        head: Names of the modules above the trunk.
        **arguments: ``transformers.Trainer``'s own.

    Raises:
        RecipeError: ``label_smoothing_factor``, where the task's loss has none, or ``fsdp``, where it would do
            nothing.
    """

    def __init__(self, *, task: Task, method: Adapter, head: Sequence[str], **arguments: Any) -> None:
        self.task = task
        self.method, self.recipe = method, method.recipe
        self.head = tuple(head)
        self.clock = Clock()
        settings = arguments["args"]
        if settings.label_smoothing_factor and not task.smooths_labels:
            raise RecipeError(
                f"training.label_smoothing_factor: has no effect on the loss of {task.recipe.name}; leave it out"
            )
        if settings.fsdp and (settings.world_size == 1 or settings.device.type == "cpu"):
            raise RecipeError(
                "training.fsdp: needs several processes, each with an accelerator of its own; here accelerate would "
                "silently run plain data parallelism instead, so leave it out"
            )
        with warnings.catch_warnings():
            # Upstream's own loss smooths no multi-hot labels; the task's does.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(
                compute_loss_func=self._loss,
                **arguments,
            )
        self.layers_computed_once = 0
        self.lazy = False
        self.lazy_logits: list[LazyLogits] = []
        self.running = RunningState(self)
        for callback in (self.clock, self.running):
            self.add_callback(callback)
        self.model_accepts_loss_kwargs = False
        self.model: Any = self.model
        # Gradual unfreezing changes from epoch to epoch what is trained.
        self.trained = frozenset(name for name, p in self.model.named_parameters() if p.requires_grad)
        self.quiet = [] if self.recipe.trunk_dropout else without_dropout(self.model, method.own_modules())
        # Running means move in training mode, also where the weights are frozen; an adapter does not even save them.
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        frozen = [m for m in norms if not any(p.requires_grad for p in m.parameters())]
        self.quiet += [norm for norm in frozen if norm not in self.quiet]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with what the method wants to hold meanwhile."""
        autocast = self.args.bf16 or self.args.fp16
        self.lazy = self.can_be_lazy()
        with self.method.while_training(self.model, autocast=autocast), frozen.kept(self) as layers:
            self.layers_computed_once = layers
            return super().train(*args, **kwargs)

    # ---- loss ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Batches of one optimizer step, and what their summed loss is to be divided by."""
        batches = list(islice(epoch_iterator, num_batches))
        if batches and self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = self._without_repeats(batches[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Upstream counts labels other than -100, which knows neither class weights nor targets of -100.0."""
        if not batch_samples:
            return None
        weights = [self.task.loss_weight(batch["labels"]).to(device) for batch in batch_samples]
        total = torch.stack(weights).sum(0)
        return self.accelerator.gather(total[None]).sum(0) if self.args.world_size > 1 else total

    def _without_repeats(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A process's part of an epoch's last batch, without the rows of the epoch's begin with which accelerate
        fills it up. A process without any row keeps one, and no label of it: all processes must take the step."""
        dataset: Any = self.train_dataset
        size = len(batch["labels"])
        rest = len(dataset) % (self._train_batch_size * self.args.world_size)
        own = min(max(rest - self.args.process_index * size, 0), size) if rest else size
        rows = {name: value[: max(own, 1) * self.task.sequences] for name, value in batch.items()}
        return rows | {"labels": batch["labels"][:own]}

    def _loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        heads: list[Any] = list(forward.logits_of_heads(outputs))
        if self.lazy_logits:
            heads[0] = self.lazy_logits.pop()
        heads = [logits[: len(labels) * self.task.sequences] for logits in heads]
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = self.task.loss_weight(labels) if num_items_in_batch is None else num_items_in_batch
        # An objective of several terms has a sum and a count for each.
        terms = self.task.loss(heads[0] if len(heads) == 1 else heads, labels, smoothing) / total
        return terms.sum()  # type: ignore[no-any-return]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.quieten()
        if not self.lazy:
            return super().compute_loss(model, figures.where_labelled(self.model, inputs), *args, **kwargs)
        with states_kept(self.model) as self.lazy_logits:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def can_be_lazy(self) -> bool:
        """Whether logits need be computed where labels are alone, and some at a time."""
        if not self.task.loss_from_states or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        rows: Any = self.train_dataset
        batch = self._prepare_inputs(self.data_collator(rows.select([0]).to_list()))
        return not self.args.torch_compile and figures.can_be_lazy(self.model, batch)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Upstream's pads rows of unlike length together under ``group_by_length`` (40 % more tokens, measured),
        and its loss depends on batches and processes. Here each process takes its share of the sorted rows."""
        rows, tokenizer = dataloader.dataset, self.processing_class
        with self.compute_loss_context_manager():  # training's precision
            outputs = forward.shared_outputs(
                self.task, self.model, rows, tokenizer, self.args.eval_batch_size, progress=True
            )
        targets = self.task.targets(rows)
        metrics = {"loss": self.task.mean_loss(outputs, rows), **self.task.metrics(outputs, targets)}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=outputs, label_ids=targets, metrics=named, num_samples=len(rows))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: upstream walks over all parameters at every step for it."""
        return 0

    # ---- rows ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        weights = self.task.sampling_weights(rows)
        strategy = self.args.train_sampling_strategy
        if strategy == "batch_rebalance" or (strategy == "sequential" and weights is None):
            return super()._get_train_sampler(train_dataset)
        lengths = rows["length"][:] if strategy == "group_by_length" else None
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSampler(len(rows), batch, self.args.seed, lengths=lengths, weights=weights)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(str(output_dir or self.args.output_dir))
        checkpoints.save_model(model, self.processing_class, folder, state_dict)
        if adapter_kind(model) is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            save_state(model, self.trained, folder)  # sharded models are upstream's to save and load

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        self.running.gather()
        super()._save_checkpoint(model, trial)
        self.clock.aside += time.perf_counter() - started

    def _load_best_model(self) -> None:
        path = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        check_best(path)
        self.state.best_model_checkpoint = str(path)
        if not self._load_state(path, self.model):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_state(Path(resume_from_checkpoint), self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_state(self, folder: Path, model: Any) -> bool:
        """Whether the checkpoint has an adapter's own state, which is then in the model."""
        if not (folder / STATE).is_file():
            return False
        load_state(self.accelerator.unwrap_model(model, keep_torch_compile=False), folder)
        return True

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        # A collator that draws (masked words) draws anew in each epoch.
        if hasattr(self.data_collator, "begin_epoch"):
            self.data_collator.begin_epoch(self.args.seed, epoch)
        # A run that was killed after early stopping had ended it is resumed with nothing left to train.
        if not self.control.should_training_stop:
            super()._run_epoch(model, epoch, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = super()._evaluate(*args, **kwargs)
        self.clock.aside += time.perf_counter() - started
        return result

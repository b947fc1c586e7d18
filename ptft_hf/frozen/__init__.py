"""What nothing that is trained can change, computed once: the activations of a frozen trunk's lower layers.

Each row is known by what the model reads of it. Before the first step its hidden state above the last layer that
lies below all trained weights is computed and kept; from then on those layers answer with it, and the model's own
forward pass goes on from there, with its masks and positions as ever.

The rooms behind it: ``layers`` (what is kept, and layers that answer with it), ``probing`` (whether that is exact).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ptft_hf import forward, report
from ptft_hf.frozen.layers import Batch, FrozenLayers, NotExact, Rows, keys_of, real_of
from ptft_hf.frozen.probing import frozen_layers

__all__ = ["Part", "kept"]


class Part(NamedTuple):
    """Rows that are kept, in the batches in which a run would compute them first.

    A batch's shape decides the last bits of its rows' activations, so that the same rows in the same batches are
    what makes a resumed run, or a second one, equal to the last bit.
    """

    training: bool
    """Whether these are the rows of training, or those of evaluations between epochs."""
    rows: Any
    batches: Sequence[Any]
    """Row numbers of each."""
    collate: Callable[..., Any]
    """Makes them, as the run does."""


@contextmanager
def kept(trainer: Any) -> Iterator[int]:
    """Train inside: on what is kept of the frozen layers, whose number is given, if there are any and it is exact.

    The rows of training are computed in the first epoch's batches, those of evaluations in their own. So what
    differs from a run without the cache is that later epochs have other batches, and with them other last bits.
    """
    started = time.perf_counter()
    layers, size = None, 0
    try:
        if worthwhile(trainer):
            with trainer.accelerator.autocast(), torch.random.fork_rng():
                layers = frozen_layers(in_training(trainer), *probes(trainer))
                if layers is not None:
                    parts = parts_of(trainer)
                    size = room_for(layers, parts, trainer.recipe.frozen_cache_gb * 1e9, trainer.task.sequences)
                    fill(layers, trainer, parts[0])
                    trainer.clock.before = time.perf_counter() - started  # evaluations are no part of it
                    for part in parts[1:]:
                        fill(layers, trainer, part)
    except NotExact as reason:
        layers, trainer.clock.before = None, 0.0
        report.say(f"- the frozen layers are computed anew in every epoch: {reason}")
    if layers is None:
        yield 0
        return
    report.say(
        f"- {layers.frozen} of {len(layers.layers)} layers are frozen, with all below: their activations are "
        f"computed once and kept ({size / 1e6:,.0f} MB)"
    )
    with layers.in_place():
        yield layers.frozen


def worthwhile(trainer: Any) -> bool:
    """Whether a run may use a cache, and sees its rows more than once."""
    args, recipe = trainer.args, trainer.recipe
    passes = args.num_train_epochs
    if args.max_steps > 0:
        passes = args.max_steps * trainer.get_total_train_batch_size(args) / len(trainer.train_dataset)
    changed = (
        args.neftune_noise_alpha,
        args.torch_compile,
        args.use_liger_kernel,
        args.gradient_checkpointing,  # which trades time for memory; this is the opposite
        getattr(args, "activation_checkpointing", False),
        recipe.gradual_unfreezing,  # what is trained changes
        args.world_size > 1,  # each process would compute all rows
    )
    return passes >= 2 and recipe.frozen_cache_gb > 0 and not any(changed)


def in_training(trainer: Any, training: bool = True) -> Any:
    """The trainer's model as a step, or an evaluation, has it."""
    trainer.model.train(training)
    if training:
        trainer.quieten()
    return trainer.model


def probes(trainer: Any) -> tuple[list[Batch], list[Batch]]:
    """The longest and the shortest training row, and the shortest alone; collated twice."""
    rows = trainer.train_dataset
    order = sorted(range(len(rows)), key=rows["length"][:].__getitem__)
    both = rows.select([order[-1], order[0]]).to_list()
    one, other = (
        [trainer._prepare_inputs(trainer.data_collator(some)) for some in (both, both[1:])] for _ in range(2)
    )
    return one, other


def parts_of(trainer: Any) -> list[Part]:
    """What a run sees more than once."""
    args, rows = trainer.args, trainer.train_dataset
    by_batch = args.train_sampling_strategy == "batch_rebalance"  # upstream's, which gives no row numbers
    first = [] if by_batch else list(trainer._get_train_sampler())
    order = [*first, *sorted(set(range(len(rows))) - set(first))]  # those that oversampling did not draw
    size = args.train_batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    parts = [Part(True, rows, batches, trainer.data_collator)]
    if args.eval_strategy != "no":
        evaluated = trainer.eval_dataset
        collate = trainer.task.collator(trainer.processing_class)  # training's pads to other lengths
        parts.append(Part(False, evaluated, forward.longest_first(evaluated, args.eval_batch_size), collate))
    return parts


def room_for(layers: FrozenLayers, parts: Sequence[Part], limit: float, sequences: int = 1) -> int:
    """Begin with nothing kept of these parts; the bytes that all will take, each row with up to so many sequences.

    Raises:
        NotExact: More than ``limit``.
    """
    sample = layers.kept[True].values
    assert sample is not None
    tokens = [sequences * sum(part.rows["length"][:]) for part in parts]
    size = int(sum(tokens) * sample.shape[1] * sample.element_size())
    if size > limit:
        raise NotExact(
            f"keeping them would take {size / 1e9:,.2f} GB, and {limit / 1e9:g} are allowed "
            "(adapter.frozen_cache_gb)"
        )
    layers.kept = {part.training: Rows(count) for part, count in zip(parts, tokens, strict=True)}
    return size


def fill(layers: FrozenLayers, trainer: Any, part: Part) -> None:
    """Compute and keep the activations of a part's rows."""
    in_training(trainer, part.training)
    bar = report.bar(len(part.batches), "Frozen layers", "batch", stays=False)
    with layers.in_place(), bar:
        for batch in part.batches:
            inputs = trainer._prepare_inputs(part.collate(part.rows.select(batch).to_list()))
            hidden = layers.compute(inputs)
            layers.kept[part.training].put(keys_of(inputs), real_of(inputs).cpu(), hidden)
            bar.update()

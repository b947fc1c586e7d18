"""What nothing that is trained can change, computed once: the activations of a frozen trunk's lower layers.

Each row is known by what the model reads of it. Before the first step its hidden state above the last layer that
lies below all trained weights is computed and kept; from then on those layers answer with it, and the model's own
forward pass goes on from there, with its masks and positions as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ptft_hf import forward, report
from ptft_hf.models import stacks_of

Batch = Mapping[str, Any]
Key = tuple[bytes, ...]


class NotExact(Exception):
    """Why the activations cannot be kept; said aloud, never raised to a user."""


class _Reached(Exception):
    """Ends a forward pass at the last frozen layer: what lies above need not be computed."""


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


class Rows:
    """Hidden states of many rows, without padding, in one tensor ``[1 + tokens, H]`` whose first line is zero."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.values: torch.Tensor | None = None
        self.places: dict[Key, np.ndarray] = {}
        self.used = 1

    def put(self, keys: Sequence[Key], mask: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep what is not kept already of a batch's hidden states ``[B, T, H]``."""
        if self.values is None:
            self.values = torch.zeros(1 + self.tokens, hidden.shape[-1], dtype=hidden.dtype)
        for key, real, states in zip(keys, mask, hidden.cpu(), strict=True):
            if key not in self.places:
                place = np.arange(self.used, self.used + int(real.sum()))
                self.values[place] = states[real]
                self.places[key] = place
                self.used += len(place)

    def get(self, keys: Sequence[Key], mask: torch.Tensor) -> torch.Tensor | None:
        """Hidden states ``[B, T, H]``, zero where there is padding; None if a row of the batch is not kept."""
        places = [self.places[key] for key in keys if key in self.places]
        if self.values is None or len(places) < len(keys):
            return None
        lines = np.zeros(mask.shape, dtype=np.int64)
        lines[mask.numpy()] = np.concatenate(places)
        return self.values[torch.from_numpy(lines)]


class FrozenLayers:
    """The layers of one stack, the lowest of which answer from what is kept.

    Args:
        model: The model that is trained.
        layers: All layers of its only stack, bottom first.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.frozen = 0
        """How many of the layers lie below everything that is trained."""
        self.embeddings: nn.Module | None = None
        """What computes the lowest layer's input, if that is one module."""
        self.kept: dict[bool, Rows] = {}
        self.answer: torch.Tensor | None = None
        self.filling = False
        self.beside: tuple[None, ...] | None = None
        """What the layers return beside the hidden state; None if that is all, and not in a tuple."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, a forward pass over rows that are kept skips the frozen layers."""
        hooks = [
            self.model.register_forward_pre_hook(self._look_up, with_kwargs=True),
            self.model.register_forward_hook(self._forget),
        ]
        skipped = self.layers[: self.frozen]
        last = skipped[-1]
        skipped = [*skipped, *([self.embeddings] if self.embeddings is not None else [])]
        own = [vars(layer).get("forward") for layer in skipped]
        for layer in skipped:
            layer.forward = self._instead_of(layer, layer is last)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, before in zip(skipped, own, strict=True):
                del layer.forward  # the instance's; the class's is seen again
                if before is not None:
                    layer.forward = before

    def _look_up(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.answer = None
        kept = self.kept.get(model.training)
        if kept is not None and not self.filling:
            answer = kept.get(keys_of(inputs), real_of(inputs).cpu())
            device = inputs["attention_mask"].device
            self.answer = None if answer is None else answer.to(device, non_blocking=True)

    def _forget(self, *_: Any) -> None:
        self.answer = None

    def _instead_of(self, module: nn.Module, last: bool) -> Callable[..., Any]:
        compute = module.forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            if self.answer is not None:
                if self.beside is None or module is self.embeddings:
                    return self.answer
                return (self.answer, *self.beside)
            result = compute(*args, **kwargs)
            if last and self.filling:
                raise _Reached(result)
            return result

        return answer

    def compute(self, batch: Batch) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` above the last frozen layer, as the model computes them."""
        self.filling = True
        try:
            with torch.no_grad():
                self.model(**{name: value for name, value in batch.items() if name != "labels"})
        except _Reached as reached:
            found = reached.args[0]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
        finally:
            self.filling = False
        raise NotExact("the last frozen layer is not always run")


def keys_of(batch: Batch) -> list[Key]:
    """What the model reads of each row, without padding: the bytes of its inputs."""
    real = real_of(batch).cpu().numpy()
    columns = [batch[name].cpu().numpy() for name in sorted(batch) if name != "labels"]
    return [
        tuple((c[i][mask] if c.shape == real.shape else c[i]).tobytes() for c in columns)
        for i, mask in enumerate(real)
    ]


def real_of(batch: Batch) -> torch.Tensor:
    """``[B, T]``: true where a token is no padding."""
    return batch["attention_mask"].bool()  # type: ignore[no-any-return]


# ---- whether it is exact ----


def frozen_layers(model: nn.Module, probe: Sequence[Batch], again: Sequence[Batch]) -> FrozenLayers | None:
    """The model's frozen layers, after all that the cache rests on has been tried out on a few rows.

    Args:
        model: In the mode in which it is trained, with gradients on for whatever is trained in any epoch.
        probe: A batch of rows of unlike length, and one of its last row alone.
        again: The same, collated anew.

    Returns:
        None if there are none: something in or below the lowest layer is trained.

    Raises:
        NotExact: There are, but the activations are not to be had from a cache.
    """
    stack = _stack(model)
    if stack is None:
        return None
    layers = FrozenLayers(model, stack)
    whole, alone = probe
    if "attention_mask" not in whole:
        raise NotExact("the model's inputs have no attention mask")
    outputs, logits = _watch(layers, whole)
    if not layers.frozen:
        return None
    if keys_of(whole) != keys_of(again[0]):
        raise NotExact("a row's inputs are drawn anew each time")
    hidden, shape = outputs[layers.frozen - 1], whole["attention_mask"].shape
    if hidden.dim() != 3 or hidden.shape[:2] != shape:
        raise NotExact("its layers' hidden states do not stand in the order of the inputs")
    _check_rows(layers, whole, alone, hidden)
    layers.kept = {mode: Rows(int(real_of(whole).sum())) for mode in (True, False)}
    for kept in layers.kept.values():
        kept.put(keys_of(whole), real_of(whole).cpu(), hidden.detach())
    with layers.in_place():
        _, answered = _run(layers.model, whole)
    if logits.shape[:2] == shape:  # of tokens: those of padding are nobody's
        logits, answered = logits[real_of(whole)], answered[real_of(whole)]
    if not torch.equal(logits, answered):
        raise NotExact("what lies above the frozen layers reads more than their hidden state")
    return layers


def _stack(model: nn.Module) -> list[nn.Module] | None:
    """The layers of the model's only stack."""
    stacks = stacks_of(model)
    if len(stacks) != 1:
        return None
    lists = [
        m for m in model.get_submodule(stacks[0][0]).children() if isinstance(m, nn.ModuleList) and len(m)
    ]
    return list(lists[0]) if len(lists) == 1 else None


def _watch(layers: FrozenLayers, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden state after each layer, and logits; counts the layers that no trained weight lies in or below.

    Raises:
        NotExact: Those draw random numbers (dropout), or hand on more than a hidden state.
    """
    found: list[Any] = []
    states: list[list[torch.Tensor]] = []

    def see(module: nn.Module, args: Any, result: Any) -> None:
        found.append(result)
        states.append(_random_states())

    before: list[tuple[nn.Module, Any]] = []

    def enter(layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        state = args[0] if args else kwargs.get("hidden_states")
        makers = [module for module, result in before if result is state]
        layers.embeddings = makers[-1] if makers else None  # the outermost, which ends last
        before.clear()

    inside = {id(m) for layer in layers.layers for m in layer.modules()}
    hooks = [layer.register_forward_hook(see) for layer in layers.layers]
    hooks += [
        module.register_forward_hook(lambda module, _, result: before.append((module, result)))
        for module in layers.model.modules()
        if id(module) not in inside
    ]
    hooks.append(layers.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
    try:
        start, logits = _run(layers.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != len(layers.layers):  # ALBERT runs one layer many times
        return [], logits
    hidden = [result[0] if isinstance(result, tuple) else result for result in found]
    if not all(isinstance(state, torch.Tensor) for state in hidden):
        return [], logits
    for state in hidden:
        if state.requires_grad:
            break
        layers.frozen += 1
    if not layers.frozen:
        return [], logits
    last = found[layers.frozen - 1]
    layers.beside = last[1:] if isinstance(last, tuple) else None
    if any(isinstance(result, tuple) and any(x is not None for x in result[1:]) for result in found):
        raise NotExact("its layers hand on more than a hidden state")
    if any(not torch.equal(a, b) for a, b in zip(start, states[layers.frozen - 1], strict=True)):
        raise NotExact("the frozen layers draw random numbers (dropout)")
    return hidden, logits


def _run(model: nn.Module, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The state of the random generators before a forward pass, the same at each call; and its logits."""
    devices = [batch["attention_mask"].device] if batch["attention_mask"].device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        start = _random_states()
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    return start, forward.first_logits(outputs).detach()


def _random_states() -> list[torch.Tensor]:
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_device]


def _check_rows(layers: FrozenLayers, whole: Batch, alone: Batch, hidden: torch.Tensor) -> None:
    """The last row is the same alone, but for rounding: it depends neither on its neighbours nor on padding."""
    with layers.in_place():
        single = layers.compute(alone)[0][real_of(alone)[0]].float()
    within = hidden[-1][real_of(whole)[-1]].detach().float()
    rounding = 1e-4 if not torch.is_autocast_enabled(hidden.device.type) else 5e-2
    if not (single - within).abs().max() <= rounding * within.abs().max():
        raise NotExact("a row's activations depend on its neighbours in the batch")


# ---- a run ----


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
                    size = room_for(layers, parts, trainer.recipe.frozen_cache_gb * 1e9)
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


def room_for(layers: FrozenLayers, parts: Sequence[Part], limit: float) -> int:
    """Begin with nothing kept of these parts; the bytes that all will take.

    Raises:
        NotExact: More than ``limit``.
    """
    sample = layers.kept[True].values
    assert sample is not None
    tokens = [sum(part.rows["length"][:]) for part in parts]
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

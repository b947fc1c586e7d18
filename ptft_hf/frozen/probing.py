"""Whether it is exact to keep a frozen layer's activations: tried out on a few rows, before any is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptft_hf import forward
from ptft_hf.frozen.layers import Batch, FrozenLayers, NotExact, Rows, keys_of, real_of
from ptft_hf.models import stacks_of


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
    stack = only_stack(model)
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


def only_stack(model: nn.Module) -> list[nn.Module] | None:
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
        single = layers.compute(alone)[-1][real_of(alone)[-1]].float()
    within = hidden[-1][real_of(whole)[-1]].detach().float()
    rounding = 1e-4 if not torch.is_autocast_enabled(hidden.device.type) else 5e-2
    if not (single - within).abs().max() <= rounding * within.abs().max():
        raise NotExact("a row's activations depend on its neighbours in the batch")

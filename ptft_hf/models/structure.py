"""What a model is made of: trunk and head, the stacks of layers, and how deep each parameter lies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ptft_hf.errors import ModelError


def adapter_kind(model: Any) -> Literal["peft", "bottleneck", "prefix"] | None:
    """Whether a model is an adapter beside its base, and whose: PEFT's or one of our own. Of an adapter, what was
    trained is saved; of a whole model (None), everything."""
    return getattr(model, "adapter_kind", None) or ("peft" if hasattr(model, "peft_config") else None)


def plain_model(model: Any) -> Any:
    """The ``transformers`` model inside an adapter model, or the model itself."""
    return model.get_base_model() if adapter_kind(model) else model


def takes_positions(model: Any) -> bool:
    """Whether an adapter's prompt stands at positions of its own before a text's (PEFT's prompt and p-tuning)."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and bool(config.is_prompt_learning)


def trunk_of(model: nn.Module) -> nn.Module:
    """The pretrained body below the task head (transformers' ``base_model``); the model itself if it has none."""
    trunk = getattr(model, "base_model", model)
    return trunk if isinstance(trunk, nn.Module) else model


def unfreeze(model: Any) -> Any:
    """Have all weights of a transformers model trained, but those that its architecture fixes: sinusoids of positions
    (Pegasus, Marian, Whisper), which ``from_pretrained`` leaves unfrozen although no gradient reaches them."""
    with torch.device("meta"):
        as_made = type(model)(copy.deepcopy(model.config))
    fixed = {name for name, parameter in as_made.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in fixed)
    return model


def head_modules(model: nn.Module, new: frozenset[str]) -> tuple[str, ...]:
    """The topmost modules that hold nothing but head: what lies outside the trunk, or is wholly new.

    PEFT guesses heads by name ("classifier", "score") and so loses others on save (BART, T5, XLNet, XLM,
    DeBERTa). Here a head is what it is: every parameter that the checkpoint did not have. What a language model has
    above its trunk is pretrained, and a head only where it is new. A new bias of tied output embeddings belongs to
    no module that could be saved: it is zero, until it is trained in full.

    Raises:
        ModelError: A new parameter stands beside pretrained ones in one module, so that no module can be
            saved for it.
    """
    trunk_parameters = {id(p) for p in trunk_of(model).parameters()}
    words = getattr(model, "get_output_embeddings", lambda: None)()
    outside = trunk_of(model) is not model and words is None
    is_head = {
        name: name in new or (outside and id(parameter) not in trunk_parameters)
        for name, parameter in model.named_parameters()
    }
    heads: list[str] = []
    for module_name, module in model.named_modules():
        own = [f"{module_name}.{name}" for name, _ in module.named_parameters()] if module_name else []
        below = any(module_name.startswith(f"{head}.") for head in heads)
        if own and not below and all(is_head.get(name, False) for name in own):
            heads.append(module_name)
    covered = {name for name, head in is_head.items() if any(name.startswith(f"{h}.") for h in heads)}
    bias = getattr(words, "bias", None)
    alone = {name for name, parameter in model.named_parameters() if parameter is bias}
    missed = sorted(name for name in new if name in is_head and name not in covered | alone)
    if missed:
        raise ModelError(
            f"the checkpoint lacks {missed}, single weights inside modules that it has otherwise; a head "
            "cannot be told from the trunk. Is this the checkpoint of another architecture or version?"
        )
    return tuple(heads)


def stacks_of(model: nn.Module) -> list[tuple[str, int]]:
    """The trunk's stacks of layers, bottom first: (path of the module that holds them, number of layers).

    A stack is an outermost ``nn.ModuleList`` of two or more (or the only one); lists that share a parent are
    one stack (XLM keeps attentions and feed-forwards in lists of their own).
    """
    prefix = _trunk_prefix(model)
    stacks: dict[str, int] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if name.startswith(prefix) and len(module) > 0 and next(module.parameters(), None) is not None:
            inside.append(name)
            parent = name.rpartition(".")[0]
            stacks[parent] = max(stacks.get(parent, 0), len(module))
    return list(stacks.items())


def _trunk_prefix(model: nn.Module) -> str:
    trunk = trunk_of(plain_model(model))
    return next((f"{name}." if name else "" for name, module in model.named_modules() if module is trunk), "")


def depths(model: nn.Module, head: Sequence[str]) -> dict[str, int]:
    """Depth of every parameter: 0 for embeddings, 1 to L for the layers from the bottom, L + 1 for the head.

    An encoder-decoder counts its decoder's layers above its encoder's. What stands before a stack, or bears
    "embedding" in its name, belongs to the embeddings; what stands after it (a final norm, a pooler) to the
    stack's top layer.
    """
    base = plain_model(model)
    base_prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    stacks = stacks_of(model)
    offsets, sizes = offsets_of(stacks), dict(stacks)
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    result: dict[str, int] = {}
    top_of: dict[str, int] = {}  # of the stacks whose layers have been seen
    for name, _ in model.named_parameters():
        stack = _stack_of(name, offsets)
        layer = layer_index(name, offsets)
        # A prompt's PeftModel holds the model without the tuner in between.
        plain = name.removeprefix(base_prefix).removeprefix("base_model." if base_prefix else "")
        if any(plain.startswith(f"{module}.") for module in head):
            result[name] = sum(sizes.values()) + 1
        elif layer is not None and stack is not None:
            top_of[stack] = offsets[stack] + sizes[stack]
            result[name] = layer
        elif name.rpartition(".")[0] in tables or any(map(_is_embedding, name.split("."))):
            result[name] = 0
        elif stack is None:
            result[name] = max(top_of.values(), default=0)
        elif any(part.startswith("final") for part in name.split(".")):  # OPT registers it before its layers
            result[name] = offsets[stack] + sizes[stack]
        else:
            result[name] = top_of.get(stack, 0)
    return result


def _is_embedding(part: str) -> bool:
    return part.startswith("emb") or "_emb" in part


def offsets_of(stacks: Sequence[tuple[str, int]]) -> dict[str, int]:
    """How many layers lie below each stack."""
    offsets, total = {}, 0
    for parent, size in stacks:
        offsets[parent] = total
        total += size
    return offsets


def _stack_of(name: str, offsets: Mapping[str, int]) -> str | None:
    """The innermost stack whose holder a parameter is in."""
    return max((p for p in offsets if name.startswith(f"{p}.")), key=len, default=None)


def layer_index(name: str, offsets: Mapping[str, int]) -> int | None:
    """Number of the layer, from 1 at the bottom, that a parameter is in; None outside the layers."""
    stack = _stack_of(name, offsets)
    parts = name.removeprefix(f"{stack}.").split(".")
    if stack is None or len(parts) < 3 or not parts[1].isdigit():
        return None
    return offsets[stack] + int(parts[1]) + 1


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total numbers of parameters; a shared one counts once, and two in a byte count as two."""
    parameters = list(model.parameters())
    total = sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in parameters)
    return sum(p.numel() for p in parameters if p.requires_grad), total


def to_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Half-precision weights that are to be trained, in float32: bfloat16 loses small updates."""
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()

"""Models without their weights, built as a run builds them: to be counted on, inside a :class:`Counter`.

:func:`load_model` and :func:`random_model` stand in for those of :mod:`ptft_hf.models`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptft_hf import adapters, models
from ptft_hf.models import LoadedModel
from ptft_hf.preparing import Plan, Ready

BLOCK, DOUBLE_BLOCK = 64, 256
"""Weights that share a scale in four bits, and scales that do if they are quantized, too (bitsandbytes' own)."""


def load_model(
    reference: str,
    auto_class: str,
    *,
    config: Any,
    quantization: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadedModel:
    """As :func:`ptft_hf.models.load_model`, of the checkpoint's configuration and the names and shapes in its files.

    Raises:
        ModelError: The checkpoint cannot be found, or its architecture has no head of this kind.
    """
    if isinstance(config, Mapping):
        config = models.from_pretrained("AutoConfig", reference, options, **config)
    model = bare(reference, auto_class, config, options)
    new = new_weights(model, stored_shapes(reference, options))
    head = models.head_modules(model, new)
    if quantization:
        quantize(model, quantization, head)
    return LoadedModel(model, new, head, "")


def random_model(
    reference: str, auto_class: str, config: Any, reader: Any, options: Mapping[str, Any]
) -> LoadedModel:
    """As :func:`ptft_hf.models.random_model`."""
    with uninitialised():
        model = tied(models.made_from_config(reference, auto_class, config, reader, options))
    new = frozenset(name for name, _ in model.named_parameters())
    return LoadedModel(model, new, models.head_modules(model, frozenset()), "")


def bare(reference: str, auto_class: str, config: Any, options: Mapping[str, Any]) -> Any:
    """The model of a configuration, as ``from_pretrained`` would make it of these options."""
    auto = models.auto_of(auto_class, reference, config, options)
    given = {name: options[name] for name in ("attn_implementation", "trust_remote_code") if name in options}
    given["dtype"] = models.as_dtype(options.get("dtype", "float32"))
    with models.reading(reference), uninitialised():
        return tied(auto.from_config(config, **given).eval())


def tied(model: Any) -> Any:
    """With one weight where it has one under several names; upstream ties them while it initialises."""
    model.tie_weights()
    return model


def uninitialised() -> Any:
    """Weights that have no values need no random ones."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def shadow(plan: Plan, ready: Ready) -> Ready:
    """What a run has ready, its model without weights."""
    options = plan.task.model_options
    task, added = ready.task, ready.facts["added_tokens"]
    model = bare(plan.model, task.auto_class, models.base_config(models.plain_model(ready.model)), options)
    if plan.adapter.quantization:
        quantize(model, plan.adapter.quantization, ready.head)
    if task.reads == "text":
        models.ensure_padding(model, ready.tokenizer)
    if added:
        models.give_rows(model, **added)
    method = adapters.build(plan.adapter, plan.config)
    with models.quiet():
        attached = method.attach(model, ready.head, task.peft_task_type)
    return ready._replace(model=attached, method=method, notes=[])


# ---- what a checkpoint holds ----


def stored_shapes(reference: str, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's weights, read from the headers of its safetensors files; empty where it has
    none that are at hand (GGUF)."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(reference, options):
        with safe_open(file, "pt") as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return found


def weight_files(reference: str, options: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a checkpoint that are on this machine."""
    from transformers.utils.hub import cached_file

    source, given = models.located(reference, options)
    if "gguf_file" in given:
        return []
    kept = ("revision", "token", "cache_dir", "subfolder")
    where: dict[str, Any] = {name: given[name] for name in kept if name in given}
    reasons = ("missing_entries", "connection_errors", "gated_repo")
    where |= {"local_files_only": True, **{f"_raise_exceptions_for_{reason}": False for reason in reasons}}

    def place(name: str) -> Path | None:
        path = cached_file(source, name, **where)
        return None if path is None else Path(path)

    index = place("model.safetensors.index.json")
    if index is None:
        whole = place("model.safetensors")
        return [] if whole is None else [whole]
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return [path for path in map(place, names) if path is not None]


def new_weights(model: Any, stored: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of the parameters that a checkpoint lacks or has in another shape.

    None, if that cannot be told: upstream reads some architectures' weights under other names.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    legacy = {"gamma": "weight", "beta": "bias"}

    def plain(name: str) -> str:
        rest, dot, last = name.removeprefix(prefix).rpartition(".")
        return f"{rest}{dot}{legacy.get(last, last)}"

    known = {plain(name): shape for name, shape in stored.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameters[name]) for name in parameters if plain(name) in known}
    lacking = {
        name
        for name, p in parameters.items()
        if known.get(plain(name)) != tuple(p.shape) and not (id(p) in tied and plain(name) not in known)
    }
    trunk = {id(p) for p in models.trunk_of(model).parameters()}
    below = [name for name in lacking if id(parameters[name]) in trunk]
    return frozenset() if len(below) > 0.1 * len(trunk) else frozenset(lacking)


# ---- four and eight bits ----


class _Product(torch.autograd.Function):
    """``x W^T`` with a frozen ``W`` that is made from few bits, forwards and backwards, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in four or eight bits as bitsandbytes holds it: bytes, scales and a bias.

    Args:
        linear: What it stands for.
        bits: 4 or 8.
        double: Whether the scales are in eight bits themselves (``bnb_4bit_use_double_quant``).
    """

    def __init__(self, linear: Any, bits: int, double: bool) -> None:
        nn.Module.__init__(self)
        weight = linear.weight
        count = weight.numel()
        transposed = type(linear).__name__ == "Conv1D"
        self.out_features, self.in_features = weight.shape[::-1] if transposed else weight.shape
        scales = count // BLOCK if bits == 4 else self.out_features
        held = scales + 4 * (scales // DOUBLE_BLOCK) if double else 4 * scales
        self.weight = nn.Parameter(torch.empty(count * bits // 8, 1).to(torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(held // 4))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: torch.Tensor = _Product.apply(x, (self.out_features, self.in_features))  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(result.dtype)


def quantize(model: Any, quantization: Mapping[str, Any], head: Any) -> None:
    """Put :class:`QuantizedLinear` where upstream puts bitsandbytes' layers: everywhere but in the head, the output
    embeddings and the modules that ``llm_int8_skip_modules`` names."""
    kept = {*head, *(quantization.get("llm_int8_skip_modules") or ())}
    output = model.get_output_embeddings()
    bits = 4 if quantization.get("load_in_4bit") else 8
    for name, module in list(model.named_modules()):
        is_linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if not is_linear or module is output or any(f"{name}.".startswith(f"{k}.") for k in kept):
            continue
        double = bits == 4 and bool(quantization.get("bnb_4bit_use_double_quant"))
        model.set_submodule(name, QuantizedLinear(module, bits, double))
    model.requires_grad_(False)

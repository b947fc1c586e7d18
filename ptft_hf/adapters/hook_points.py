"""Where bottleneck adapters go: the beginning and the end of each sub-layer, by architecture.

A layer adds each sub-layer's output to the residual stream. An adapter changes that output before it is added,
which is where AdapterHub's library places it, too. Functional dropout that a few architectures (BART, ViT) apply
between the sub-layer and the sum then falls on the adapter's part as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ptft_hf.errors import AdapterError
from ptft_hf.recipes import BottleneckConfig, HookPoint
from ptft_hf.recipes.bottleneck import Place

PLACES: tuple[Place, ...] = ("mh_adapter", "cross_adapter", "output_adapter")
Table = Mapping[Place, Sequence[HookPoint]]
"""For each place the points to look for; a layer has the first one whose modules it has."""


def _at(output: str, input: str, norm: str | None = None, beside: str | None = None) -> HookPoint:
    return HookPoint(output=output, input=input, norm=norm, beside=beside)


# Layers that normalise after the sum.
_BERT: Table = {
    "mh_adapter": [_at("attention.output.dropout", "attention", "attention.output.LayerNorm")],
    "output_adapter": [_at("output.dropout", "intermediate", "output.LayerNorm")],
}
_DISTILBERT: Table = {
    "mh_adapter": [_at("attention.out_lin", "attention", "sa_layer_norm")],
    "output_adapter": [_at("ffn", "ffn", "output_layer_norm")],
}
_ALBERT: Table = {
    "mh_adapter": [_at("attention.output_dropout", "attention", "attention.LayerNorm")],
    "output_adapter": [_at("ffn_output", "ffn", "full_layer_layer_norm")],
}
_BART: Table = {
    "mh_adapter": [_at("self_attn", "self_attn", "self_attn_layer_norm")],
    "cross_adapter": [_at("encoder_attn", "encoder_attn", "encoder_attn_layer_norm")],
    "output_adapter": [_at("fc2", "fc1", "final_layer_norm")],
}
# Layers that normalise before the sub-layer: the norm's input is the residual stream.
_MODERNBERT: Table = {
    "mh_adapter": [_at("attn", "attn_norm")],
    "output_adapter": [_at("mlp", "mlp_norm")],
}
_GPT2: Table = {
    "mh_adapter": [_at("attn", "ln_1")],
    "output_adapter": [_at("mlp", "ln_2")],
}
_LLAMA: Table = {
    "mh_adapter": [_at("self_attn", "input_layernorm")],
    "output_adapter": [_at("mlp", "post_attention_layernorm")],
}
_T5: Table = {
    "mh_adapter": [_at("layer.0.dropout", "layer.0")],
    "cross_adapter": [_at("layer.1.dropout", "layer.1", beside="layer.1.EncDecAttention")],
    "output_adapter": [_at("layer.2.dropout", "layer.2"), _at("layer.1.dropout", "layer.1")],
}
_VIT: Table = {
    "mh_adapter": [_at("attention", "layernorm_before")],
    # The layer of transformers below 5.10 has no mlp; its output module adds the residual stream itself.
    "output_adapter": [_at("mlp", "layernorm_after"), _at("output.dropout", "layernorm_after")],
}
HOOK_POINTS: dict[str, Table] = {
    "albert": _ALBERT,
    "bart": _BART,
    "bert": _BERT,
    "deberta-v2": _BERT,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "gemma": _LLAMA,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "modernbert": _MODERNBERT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
    "vit": _VIT,
    "xlm-roberta": _BERT,
}
"""By ``config.model_type``."""


def hook_points(model: Any, config: BottleneckConfig) -> list[tuple[str, dict[Place, HookPoint]]]:
    """Each layer's path and the points at which ``config`` has an adapter, bottom first, an encoder before its
    decoder. Layers that are left out have none.

    Raises:
        AdapterError: The architecture is unknown, or has no such places; with the module names to choose from.
    """
    kind = model.config.model_type
    table: Table | None = HOOK_POINTS.get(kind)
    if config.hook_points is not None:
        table = {place: [point] for place, point in config.hook_points.items()}
    if table is None:
        raise AdapterError(
            f"bottleneck adapters: the architecture {kind!r} is unknown (known: {', '.join(sorted(HOOK_POINTS))}); "
            f"name its hook_points. {_choice(model)}"
        )
    layers = {
        name: {place: point for place in table if (point := _found(module, table[place])) is not None}
        for name, module in model.named_modules()
        if name.rpartition(".")[2].isdigit()
    }
    needed = set(table) - {"cross_adapter"}  # which an encoder's layers lack
    layers = {name: points for name, points in layers.items() if points and needed <= points.keys()}
    if not layers:
        named = {name for points in table.values() for p in points for name in (p.output, p.input, p.norm)}
        raise AdapterError(
            f"hook_points: no layer of {type(model).__name__} holds all of "
            f"{', '.join(sorted(filter(None, named)))}. {_choice(model)}"
        )
    wanted = [place for place in PLACES if getattr(config, place)]
    problems = [
        f"{place}: {type(model).__name__} has no such place; it has "
        f"{', '.join(p for p in PLACES if any(p in points for points in layers.values()))}"
        for place in wanted
        if not any(place in points for points in layers.values())
    ]
    problems += [
        f"leave_out: {index} of this model's {len(layers)} layers, which count from 0"
        for index in config.leave_out
        if index >= len(layers)
    ]
    if len({*config.leave_out} & {*range(len(layers))}) == len(layers):
        problems.append("leave_out: leaves no layer with an adapter")
    if problems:
        raise AdapterError(*problems)
    return [
        (name, {p: points[p] for p in wanted if p in points} if index not in config.leave_out else {})
        for index, (name, points) in enumerate(layers.items())
    ]


def _found(layer: nn.Module, points: Sequence[HookPoint]) -> HookPoint | None:
    def has(name: str | None) -> bool:
        try:
            return name is None or layer.get_submodule(name) is not None
        except AttributeError:
            return False

    return next((p for p in points if all(map(has, (p.output, p.input, p.norm, p.beside)))), None)


def _choice(model: nn.Module) -> str:
    """The names inside the first layer of the longest stack of layers."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    name, layer = max(((f"{n}.0", m[0]) for n, m in stacks[:1]), default=("the model", model))
    names = [inner for inner, _ in layer.named_modules() if inner]
    return f"Modules of {name} to choose from: {', '.join(names)}"

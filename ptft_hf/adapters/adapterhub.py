"""Adapters that AdapterHub's library (``adapters``, ``adapter-transformers``) saved, read into our own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from ptft_hf.adapters.hook_points import hook_points
from ptft_hf.errors import AdapterError
from ptft_hf.recipes import BottleneckConfig, BottleneckRecipe, HookPoint
from ptft_hf.recipes.bottleneck import Place

if TYPE_CHECKING:
    from ptft_hf.adapters.bottleneck import BottleneckModel

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
UNREAD = {
    "architecture": None,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "use_gating": False,
    "inv_adapter": None,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
"""Options of AdapterHub's that must have these values: others are other methods, or no identity at the start."""
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version mean by these names."""
PREFIX: dict[Place, str] = {
    "mh_adapter": "attention",
    "cross_adapter": "cross_attention",
    "output_adapter": "output",
}


def recipe_of_folder(folder: Path) -> BottleneckRecipe:
    """A recipe that stands for a saved adapter, so that it can be trained further.

    Raises:
        AdapterError: As :func:`read_config`.
    """
    return BottleneckRecipe(name=str(folder), family="bottleneck", **read_config(folder)[1].model_dump())


def read_config(folder: Path) -> tuple[str, BottleneckConfig]:
    """The adapter's name in its file, and what it is.

    Raises:
        AdapterError: With every option that is not a plain bottleneck adapter's.
    """
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text("utf-8"))
    options = dict(saved["config"])
    problems = [
        f"{file}: {name}: {options[name]!r} is not read, only {value!r}"
        for name, value in UNREAD.items()
        if options.get(name, value) != value
    ]
    if saved.get("model_type") == "albert" and options.get("mh_adapter"):
        problems.append(
            f"{file}: mh_adapter: on ALBERT AdapterHub's library feeds it the attention's input instead of its "
            "output; train a new adapter"
        )
    fields = {name: options[name] for name in BottleneckConfig.model_fields if name in options}
    fields["leave_out"] = list(fields.get("leave_out") or [])
    name = str(fields.get("non_linearity")).lower()
    name = OLD_ACTIVATIONS.get(name, name) if "version" not in saved else name
    fields["non_linearity"] = {"leakyrelu": "leaky_relu"}.get(name, name)
    try:
        config = BottleneckConfig(**fields)
    except ValidationError as error:
        problems += [f"{file}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if problems:
        raise AdapterError(*problems)
    return saved["name"], config


def read(model: BottleneckModel, folder: Path, name: str, with_head: bool) -> None:
    """Add the adapter that AdapterHub's library saved in ``folder`` under ``name``.

    Args:
        model: The base it was trained on, with or without adapters of its own.
        folder: What ``save_adapter`` wrote: ``adapter_config.json`` and the weights, as safetensors or as a pickle,
            of which nothing but tensors is unpickled.
        name: What to call it here.
        with_head: Take a head of the same names and shapes that was saved beside it.

    Raises:
        AdapterError: Weights are missing, left over or of another shape, or there are options that are not read.
    """
    their_name, config = read_config(folder)
    prefix = f"{model.base_model.base_model_prefix}."
    weights = {
        re.sub(r"(attention|layer)_text_(task|lang)_adapters", "adapters", key).removeprefix(prefix): value
        for key, value in _load(folder, WEIGHTS).items()
    }
    model.add_adapter(name, config)
    own = model.base_model.state_dict()
    pairs: dict[str, str] = {}
    for index, (path, points) in enumerate(hook_points(model.base_model, config)):
        for place, point in points.items():
            theirs = _container(weights, their_name, path.removeprefix(prefix), index, place, point)
            pairs |= _pairs(config, theirs, f"{path}.{place}.{name}")
    read = {*pairs.values(), *(k for k in weights if config.ln_before and ".adapter_down.0." in k)}
    problems = [
        *(f"{key} is missing" for key in pairs.values() if key not in weights),
        *(f"{key} has no place" for key in weights if f".{their_name}." in key and key not in read),
        *(
            f"{theirs} has the shape {tuple(weights[theirs].shape)} instead of {tuple(own[ours].shape)}"
            for ours, theirs in pairs.items()
            if theirs in weights and weights[theirs].shape != own[ours].shape
        ),
    ]
    if problems:
        model.delete_adapter(name)
        raise AdapterError(*(f"{folder}: {problem}" for problem in problems[:20]))
    with torch.no_grad():
        for ours, theirs in pairs.items():
            own[ours].copy_(weights[theirs])
        head = _load(folder, HEAD_WEIGHTS) if with_head else {}
        if head and all(key in own and own[key].shape == value.shape for key, value in head.items()):
            for key, value in head.items():
                own[key].copy_(value)


def _load(folder: Path, names: tuple[str, str]) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, pickled = (folder / name for name in names)
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return dict(torch.load(pickled, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(f"{folder}: its weights cannot be read: {error}") from error
    if names is WEIGHTS:
        raise AdapterError(f"{folder}: holds neither {' nor '.join(names)}")
    return {}


def _container(
    weights: dict[str, Any], name: str, path: str, index: int, place: Place, point: HookPoint
) -> str:
    """Where AdapterHub's library keeps the adapter of one place: in the layer, or in the module at its end."""
    word, end = PREFIX[place], point.output.rpartition(".")[0]
    layers = (path, f"encoder.layer.{index}")  # the second: ViT's, before transformers renamed it
    within = (f"{end}.adapters", *(f"{at}{word}_adapters.adapters" for at in ("", "attention.", "output.")))
    known = [f"{layer}.{inner}.{name}" for layer in layers for inner in within]
    return next((key for key in known if f"{key}.adapter_up.weight" in weights), known[1])


def _pairs(config: BottleneckConfig, theirs: str, ours: str) -> dict[str, str]:
    """Our names of one adapter's weights: AdapterHub's."""
    parts = {"down": f"adapter_down.{int(config.ln_before)}", "up": "adapter_up"}
    if config.ln_before:
        parts["norm_before"] = "adapter_norm_before"
    if config.ln_after:
        parts["norm_after"] = "adapter_norm_after"
    both = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in parts.items() for kind in ("weight", "bias")]
    if isinstance(config.scaling, str):
        both.append(("scaling", "scaling"))
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in both}

"""Checkpoints, loaded from the Hub or disk with the names of the weights that are new."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptft_hf.errors import ModelError
from ptft_hf.models.quantizing import keep_learning, quantization_config
from ptft_hf.models.reading import auto_of, check_no_adapter, from_pretrained, located, options_of, reading
from ptft_hf.models.structure import depths, head_modules, layer_index, offsets_of, stacks_of, trunk_of


class LoadedModel(NamedTuple):
    """A pretrained model with a task head attached.

    Attributes:
        model: The model, on the CPU, in evaluation mode.
        new: Names of the parameters that ``from_pretrained`` initialised anew: no checkpoint has them.
        head: Names of the modules above the trunk, as few as cover every new parameter.
        fingerprint: ``sha256:...`` over every parameter and buffer that came from the checkpoint, before it was
            quantized: it is of the base, however that is held.
    """

    model: Any
    new: frozenset[str]
    head: tuple[str, ...]
    fingerprint: str


def load_model(
    reference: str,
    auto_class: str,
    *,
    config: Any,
    quantization: Mapping[str, Any] | None = None,
    **options: Any,
) -> LoadedModel:
    """Load a checkpoint with the head that ``auto_class`` puts on it.

    A head that is there for another number of labels is initialised anew, like one that is not there.

    Args:
        reference: Hub id, ``name@revision``, folder, or ``package:NAME/folder``.
        auto_class: Name of a transformers auto class, for example ``AutoModelForSequenceClassification``.
        config: A whole configuration, or overrides of the checkpoint's own (``num_labels``, ``id2label``, ...).
        quantization: Fields of ``BitsAndBytesConfig``: the trunk in four or eight bits. The checkpoint is read
            twice, first in full precision: it tells the head, which stays as it is, and the fingerprint.
        **options: ``from_pretrained``'s own arguments. ``dtype`` is ``float32`` by default, because weights
            that are updated in bfloat16 lose small updates; ``trust_remote_code`` is off by default.
            Weights are read from safetensors (or GGUF) files, whatever they say.

    Raises:
        ModelError: The checkpoint cannot be found or read, lacks weights of the trunk, or its architecture has
            no head of this kind.
    """
    if quantization and "gguf_file" in options:
        raise ModelError(
            f"{reference}: quantization: a GGUF file ({options['gguf_file']}) is unpacked while it is read and "
            "cannot be quantized anew; train on it without quantization, or save it as a checkpoint first "
            "(AutoModel...from_pretrained(..., gguf_file=...), then save_pretrained)"
        )
    if isinstance(config, Mapping):
        config = from_pretrained("AutoConfig", reference, options, **config)
    auto = auto_of(auto_class, reference, config, options)
    source, options = located(reference, options)
    check_no_adapter(reference, source, options)
    options["dtype"] = as_dtype(options.get("dtype", "float32"))
    with reading(reference):
        given = {"config": config, "ignore_mismatched_sizes": True, **options, "use_safetensors": True}
        # It shows a bar of its own while it unpacks a GGUF file.
        with redirect_stderr(StringIO()) if "gguf_file" in options else nullcontext():
            model, info = auto.from_pretrained(source, output_loading_info=True, **given)
        if "gguf_file" in options:
            model = unpacked(model)
    model.eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mismatched = {key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()}
    new = frozenset(name for name in {*info["missing_keys"], *mismatched} if name in parameters)
    _check_trunk(reference, model, new)
    head, digest = head_modules(model, new), fingerprint(model, new)
    if quantization:
        given["quantization_config"] = quantization_config(quantization, model, head)
        kept = {
            name: value for name, value in model.state_dict().items() if f"{name}.".startswith(_inside(head))
        }
        del model
        with reading(reference):
            model = auto.from_pretrained(source, **given).eval()
        model.load_state_dict(kept, strict=False)  # a head that is new is drawn anew at every reading
        keep_learning(model)
        del (
            model.config.quantization_config
        )  # which is saved beside adapters, and says nothing of the adapter
    return LoadedModel(model, new, head, digest)


def unpacked(model: Any) -> Any:
    """The model of a GGUF file, whose weights transformers has unpacked, as a plain one: else it counts as quantized
    and is refused by ``save_pretrained``."""
    del model.config.quantization_config
    plain = type(model)(model.config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _inside(head: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in head)


def _check_trunk(reference: str, model: Any, new: frozenset[str]) -> None:
    """Layers and embeddings must come from the checkpoint: a trunk of random weights is no pretrained one."""
    depth = depths(model, ())
    top = max(depth.values(), default=0)
    outside = {id(p) for p in model.parameters()} - {id(p) for p in trunk_of(model).parameters()}
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    offsets = offsets_of(stacks_of(model))
    lacking = sorted(
        name
        for name, parameter in model.named_parameters()
        if name in new
        and top
        and id(parameter) not in outside
        and (name in embeddings or layer_index(name, offsets) is not None)
    )
    if lacking:
        raise ModelError(
            f"{reference}: the checkpoint lacks (or has in other sizes) {len(lacking)} weights of the trunk, such "
            f"as {lacking[0]}; do its config.json and its weights belong together?"
        )


def as_dtype(value: Any) -> torch.dtype:
    """``"bfloat16"`` or ``torch.bfloat16`` as a dtype.

    Raises:
        ModelError: No floating-point dtype of this name.
    """
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"model.dtype: {value!r} is no dtype; use float32, bfloat16 or float16")
    return dtype


def head_config(folder: Path, options: Mapping[str, Any]) -> Any:
    """The configuration that stands beside an adapter: labels, problem type, padding token; ``options`` are its
    base's."""
    return from_pretrained("AutoConfig", str(folder), options_of(str(folder), options))


def fingerprint(model: nn.Module, new: frozenset[str] = frozenset()) -> str:
    """``sha256:...`` over name, dtype, shape and bytes of every weight except the ``new`` ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in new:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"

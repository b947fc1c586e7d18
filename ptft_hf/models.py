"""Checkpoints and tokenizers: loaded from the Hub or disk, with the names of the weights that are new."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ptft_hf.errors import ModelError
from ptft_hf.recipes import locate

DEFAULT_MAX_LENGTH = 512
"""Tokens; attention costs grow with the square of the length, so a decoder's 100,000 is no sensible default."""


class LoadedModel(NamedTuple):
    """A pretrained model with a task head attached.

    Attributes:
        model: The model, on the CPU, in evaluation mode.
        new: Names of the parameters that ``from_pretrained`` initialised anew: no checkpoint has them.
        head: Names of the modules above the trunk, as few as cover every new parameter.
        fingerprint: ``sha256:...`` over every parameter and buffer that came from the checkpoint.
    """

    model: Any
    new: frozenset[str]
    head: tuple[str, ...]
    fingerprint: str


def split_revision(reference: str) -> tuple[str, str | None]:
    """Split ``name@revision``; a path that exists is never split."""
    name, at, revision = reference.rpartition("@")
    if not at or Path(reference).exists():
        return reference, None
    return name, revision


def load_model(reference: str, auto_class: str, *, config: Any, **options: Any) -> LoadedModel:
    """Load a checkpoint with the head that ``auto_class`` puts on it.

    A head that is there for another number of labels is initialised anew, like one that is not there.

    Args:
        reference: Hub id, ``name@revision``, folder, or ``package:NAME/folder``.
        auto_class: Name of a transformers auto class, for example ``AutoModelForSequenceClassification``.
        config: A whole configuration, or overrides of the checkpoint's own (``num_labels``, ``id2label``, ...).
        **options: ``from_pretrained``'s own arguments. ``dtype`` is ``float32`` by default, because weights
            that are updated in bfloat16 lose small updates; ``trust_remote_code`` is off by default.

    Raises:
        ModelError: The checkpoint cannot be found or read, lacks weights of the trunk, or its architecture has
            no head of this kind.
    """
    import transformers

    source, revision = split_revision(locate(reference))
    if revision is not None:
        options = {"revision": revision, **options}
    options["dtype"] = as_dtype(options.get("dtype", "float32"))
    with reading(reference):
        if isinstance(config, Mapping):
            config = transformers.AutoConfig.from_pretrained(source, **config, **_config_options(options))
        auto = getattr(transformers, auto_class)
        if type(config) not in auto._model_mapping and not options.get("trust_remote_code"):
            raise ModelError(
                f"{reference}: transformers has no {auto_class} for the architecture "
                f"{config.model_type!r}; choose a checkpoint of another architecture"
            )
        model, info = auto.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model.eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mismatched = {key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()}
    new = frozenset(name for name in {*info["missing_keys"], *mismatched} if name in parameters)
    _check_trunk(reference, model, new)
    return LoadedModel(model, new, _head_modules(model, new), fingerprint(model, new))


def _check_trunk(reference: str, model: Any, new: frozenset[str]) -> None:
    """Layers and embeddings must come from the checkpoint: a trunk of random weights is no pretrained one."""
    depth = depths(model, ())
    top = max(depth.values(), default=0)
    outside = {id(p) for p in model.parameters()} - {id(p) for p in trunk_of(model).parameters()}
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    offsets = _offsets(stacks_of(model))
    lacking = sorted(
        name
        for name, parameter in model.named_parameters()
        if name in new
        and top
        and id(parameter) not in outside
        and (name in embeddings or _layer_index(name, offsets) is not None)
    )
    if lacking:
        raise ModelError(
            f"{reference}: the checkpoint lacks (or has in other sizes) {len(lacking)} weights of the trunk, such "
            f"as {lacking[0]}; do its config.json and its weights belong together?"
        )


def _config_options(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")
    return {name: options[name] for name in names if name in options}


def as_dtype(value: Any) -> torch.dtype:
    """``"bfloat16"`` or ``torch.bfloat16`` as a dtype.

    Raises:
        ModelError: No floating-point dtype of this name.
    """
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"model.dtype: {value!r} is no dtype; use float32, bfloat16 or float16")
    return dtype


@contextmanager
def reading(reference: str) -> Iterator[None]:
    """Turn what upstream raises while it reads ``reference`` into one clear :class:`ModelError`, and keep its
    log lines and bars to itself."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{reference}: {_reason(reference, error)}") from error


def _reason(reference: str, error: Exception) -> str:
    path = Path(split_revision(locate(reference))[0])
    first = " ".join(str(error).split())[:300]
    if path.is_dir() and not (path / "config.json").is_file():
        return (
            f"the folder has no config.json, so it is no checkpoint; it holds {sorted(os.listdir(path))[:8]}"
        )
    if path.is_dir():
        return f"the folder cannot be read as a checkpoint: {type(error).__name__}: {first}"
    if path.exists():
        return "a file; a checkpoint is a folder, or a model on the Hub"
    if isinstance(error, OSError):
        return f"no such folder here, and not to be had from the Hub: {first}"
    return f"{type(error).__name__}: {first}"


@contextmanager
def quiet() -> Iterator[None]:
    """Upstream's log lines, deprecation warnings and progress bars off; errors still raise."""
    import transformers

    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    others = [logging.getLogger(name) for name in ("bitsandbytes", "peft", "accelerate", "torch.distributed")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        for other, before in zip(others, levels, strict=True):
            other.setLevel(before)


def head_config(folder: Path) -> Any:
    """The configuration that stands beside an adapter: labels, problem type, padding token."""
    import transformers

    with reading(str(folder)):
        return transformers.AutoConfig.from_pretrained(folder)


def plain_model(model: Any) -> Any:
    """The ``transformers`` model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def trunk_of(model: nn.Module) -> nn.Module:
    """The pretrained body below the task head (transformers' ``base_model``); the model itself if it has none."""
    trunk = getattr(model, "base_model", model)
    return trunk if isinstance(trunk, nn.Module) else model


def _head_modules(model: nn.Module, new: frozenset[str]) -> tuple[str, ...]:
    """The topmost modules that hold nothing but head: what lies outside the trunk, or is wholly new.

    PEFT guesses heads by name ("classifier", "score") and so loses others on save (BART, T5, XLNet, XLM,
    DeBERTa). Here a head is what it is: every parameter that the checkpoint did not have.

    Raises:
        ModelError: A new parameter stands beside pretrained ones in one module, so that no module can be
            saved for it.
    """
    trunk_parameters = {id(p) for p in trunk_of(model).parameters()}
    is_head = {
        name: name in new or (trunk_of(model) is not model and id(parameter) not in trunk_parameters)
        for name, parameter in model.named_parameters()
    }
    heads: list[str] = []
    for module_name, module in model.named_modules():
        own = [f"{module_name}.{name}" for name, _ in module.named_parameters()] if module_name else []
        below = any(module_name.startswith(f"{head}.") for head in heads)
        if own and not below and all(is_head.get(name, False) for name in own):
            heads.append(module_name)
    covered = {name for name, head in is_head.items() if any(name.startswith(f"{h}.") for h in heads)}
    missed = sorted(name for name in new if name in is_head and name not in covered)
    if missed:
        raise ModelError(
            f"the checkpoint lacks {missed}, single weights inside modules that it has otherwise; a head "
            "cannot be told from the trunk. Is this the checkpoint of another architecture or version?"
        )
    return tuple(heads)


def fingerprint(model: nn.Module, new: frozenset[str] = frozenset()) -> str:
    """``sha256:...`` over name, dtype, shape and bytes of every weight except the ``new`` ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in new:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def load_tokenizer(reference: str, **options: Any) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    import transformers

    source, revision = split_revision(locate(reference))
    if revision is not None:
        options = {"revision": revision, **options}
    with reading(reference):
        return transformers.AutoTokenizer.from_pretrained(source, **_config_options(options))


def ensure_padding(model: Any, tokenizer: Any) -> str | None:
    """Give model and tokenizer one padding token, and pad on the right.

    Decoders pool the last token that is not padding; without a padding id they refuse batches, and on the
    left their positions would shift with the neighbours. A tokenizer without a padding token takes the end
    token: the model then pools the last token before it, in every batch alike.

    Returns:
        What was changed, to be said aloud, or None.

    Raises:
        ModelError: The tokenizer has neither a padding nor an end token.
    """
    note = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has neither a padding token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
        note = f"the tokenizer has no padding token: its end token {tokenizer.eos_token!r} is used"
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    text_config = model.config.get_text_config()
    text_config.pad_token_id = tokenizer.pad_token_id
    return note


def longest_input(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """Tokens after which an input is cut: ``wanted``, or the least of 512 and what model and tokenizer take.

    Raises:
        ModelError: ``wanted`` is more than the model has positions for.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
    # RoBERTa and its kin number positions from padding_idx + 1 on, so the last two are never reached.
    offset = config.pad_token_id + 1 if _counts_from_padding(model) and config.pad_token_id is not None else 0
    limit = positions - offset if isinstance(positions, int) and positions > 0 else None
    if wanted is not None:
        if limit is not None and wanted > limit:
            raise ModelError(f"model.max_length: {wanted} is more than the {limit} positions of this model")
        return wanted
    return min(x for x in (DEFAULT_MAX_LENGTH, limit, tokenizer.model_max_length) if x)


def _counts_from_padding(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )


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

    An encoder-decoder counts its decoder's layers above its encoder's. What stands after a stack (a final
    norm, a pooler) has the depth of the stack's top layer.
    """
    base_prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    stacks = stacks_of(model)
    offsets, total = _offsets(stacks), sum(size for _, size in stacks)
    embeddings = {
        f"{name}.{own}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding)
        for own, _ in m.named_parameters(recurse=False)
    }
    result, seen = {}, 0
    for name, _ in model.named_parameters():
        plain = name.removeprefix(base_prefix)
        if any(plain.startswith(f"{module}.") for module in head):
            result[name] = total + 1
        elif name in embeddings:
            result[name] = 0
        else:
            layer = _layer_index(name, offsets)
            seen = layer if layer is not None else seen
            result[name] = seen
    return result


def _offsets(stacks: Sequence[tuple[str, int]]) -> dict[str, int]:
    """How many layers lie below each stack."""
    offsets, total = {}, 0
    for parent, size in stacks:
        offsets[parent] = total
        total += size
    return offsets


def _layer_index(name: str, offsets: Mapping[str, int]) -> int | None:
    for parent in sorted(offsets, key=len, reverse=True):
        if name.startswith(f"{parent}."):
            parts = name.removeprefix(f"{parent}.").split(".")
            if len(parts) > 2 and parts[1].isdigit():
                return offsets[parent] + int(parts[1]) + 1
    return None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total numbers of parameters; a shared one counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

"""What a reference to a checkpoint means, and upstream's reading of it: quiet, with one clear error."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptft_hf.errors import ModelError, PtftError
from ptft_hf.recipes import locate

# As it is imported, bitsandbytes warns of a faster kernel that it did not find on the Hub, and that nobody asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def split_revision(reference: str) -> tuple[str, str | None]:
    """Split ``name@revision``; a path that exists is never split."""
    name, at, revision = reference.rpartition("@")
    if not at or Path(reference).exists():
        return reference, None
    return name, revision


def located(reference: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where upstream finds ``name@revision`` or ``package:NAME/folder``, and its options, the revision among them."""
    source, revision = split_revision(locate(reference))
    return source, {**({} if revision is None else {"revision": revision}), **options}


def options_of(reference: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s arguments that hold for a reference: what we or PEFT saved in a folder is plain
    files, and where in a checkpoint files lie (``gguf_file``, ``revision``, ...) is said of another, its base."""
    saved = any((Path(reference) / name).is_file() for name in ("run.json", "adapter_config.json"))
    elsewhere = ("gguf_file", "revision", "code_revision", "subfolder", "variant") if saved else ()
    return {name: value for name, value in options.items() if name not in elsewhere}


def config_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s arguments that configurations and tokenizers take, too. Where nothing is said of
    ``trust_remote_code``, upstream would ask on the terminal, and take a line of stdin's texts for the answer."""
    names = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only", "gguf_file")
    return {"trust_remote_code": False, **{name: options[name] for name in names if name in options}}


def from_pretrained(auto_class: str, reference: str, options: Mapping[str, Any], **more: Any) -> Any:
    """A checkpoint's configuration, tokenizer or image processor: what ``transformers``' auto class reads there.

    Args:
        auto_class: Its name, for example ``AutoConfig``.
        reference: Hub id, ``name@revision``, folder, or ``package:NAME/folder``.
        options: Those of ``from_pretrained``; what is of models alone is left out.
        **more: The auto class's own.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    import transformers

    source, options = located(reference, options)
    with reading(reference):
        return getattr(transformers, auto_class).from_pretrained(source, **more, **config_options(options))


def auto_of(auto_class: str, reference: str, config: Any, options: Mapping[str, Any]) -> Any:
    """The auto class of models, which has one for this configuration.

    Raises:
        ModelError: It has none.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    if type(config) not in auto._model_mapping and not options.get("trust_remote_code"):
        raise ModelError(
            f"{reference}: transformers has no {auto_class} for the architecture {config.model_type!r}; choose a "
            "checkpoint of another architecture"
        )
    return auto


def check_adapter_weights(folder: Path) -> None:
    """Hold the folder of a PEFT adapter to safetensors: upstream reads pickles, too.

    Raises:
        ModelError: It has no such file.
    """
    weights, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not weights.is_file():
        there = f": where you trust {pickled.name}, load it with PEFT and save it anew (save_pretrained)"
        raise ModelError(
            f"{folder}: has no {weights.name}, and other formats, which can run code, are not read"
            f"{there if pickled.is_file() else ''}"
        )


def check_no_adapter(reference: str, source: str, options: Mapping[str, Any]) -> None:
    """Hold a checkpoint to be one alone: upstream puts an adapter that lies beside it on the model without a word.

    Raises:
        ModelError: There is one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
    with reading(reference):
        found = find_adapter_config_file(source, **{name: options[name] for name in names if name in options})
    if found is not None:
        raise ModelError(
            f"{reference}: holds an adapter (adapter_config.json), and a checkpoint without one is needed: give the "
            "base itself, or merge the adapter into it (ptft merge)"
        )


@contextmanager
def reading(reference: str) -> Iterator[None]:
    """Turn what upstream raises while it reads ``reference`` into one clear :class:`ModelError`, and keep its
    log lines and bars to itself."""
    try:
        with quiet():
            yield
    except PtftError:
        raise
    except Exception as error:
        raise ModelError(f"{reference}: {_reason(reference, error)}") from error


def _reason(reference: str, error: Exception) -> str:
    path = Path(split_revision(locate(reference))[0])
    first = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return (
            "needs Python code that comes with it, which is not run; if you trust it, set "
            "model.trust_remote_code: true in the recipe (or --set model.trust_remote_code=true)"
        )
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

"""Models that write, from checkpoints, run folders of any stage, and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ptft_hf import adapters, checkpoints, inference, models, recipes
from ptft_hf.errors import CheckpointError, ModelError

CAUSAL = "AutoModelForCausalLM"
WRITES = cast(Any, SimpleNamespace(auto_class=CAUSAL))
"""As much of a task as there is to a model that writes."""


def load_decoder(reference: str, dtype: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model that writes, in evaluation mode, and its tokenizer.

    Args:
        reference: A Hub id or checkpoint, the folder of a run, or that of a PEFT adapter.
        dtype: Computes in this type.
        options: ``from_pretrained``'s, for checkpoints; runs know their own, and ask these for ``trust_remote_code``.

    Raises:
        ModelError: It is no decoder, or cannot be loaded.
        CheckpointError: The folder of a run is damaged, or needs code that is not trusted.
    """
    folder, computes_in = Path(reference), models.as_dtype(dtype)
    if (folder / "run.json").is_file():
        model = of_run(folder, trusted=options.get("trust_remote_code"))[0]
    elif recipes.saved_adapter_kind(reference) is not None:
        config = checkpoints.read_json(folder / "adapter_config.json")
        base = str(config.get("base_model_name_or_path"))
        with models.reading(reference):
            model = adapters.load(_checkpoint(base, options), folder)
    else:
        model = _checkpoint(reference, options)
    tokenizer = _tokenizer(reference, options)
    if models.plain_model(model).config.is_encoder_decoder or tokenizer.eos_token_id is None:
        raise ModelError(f"{reference}: a decoder with an end token is needed, which goes on from a prompt")
    models.ensure_padding(models.plain_model(model), tokenizer)
    model = models.in_dtype(model, computes_in)
    return (model.to("cuda") if torch.cuda.is_available() else model).eval(), tokenizer


def check_decoder(reference: str, options: Mapping[str, Any]) -> None:
    """Refuse, of what :func:`load_decoder` refuses, what can be told without the weights.

    Raises:
        ModelError: There is no such model, or it does not write.
        CheckpointError: The folder of a run is damaged, or needs code that is not trusted.
    """
    if (Path(reference) / "run.json").is_file():
        _run_that_writes(Path(reference), options.get("trust_remote_code"))
    _tokenizer(reference, options)


def _tokenizer(reference: str, options: Mapping[str, Any]) -> Any:
    """A model's, or its adapter's; of an adapter without one its base's."""
    folder, place = Path(reference), reference
    bare = recipes.saved_adapter_kind(reference) is not None and not (folder / "tokenizer_config.json").is_file()
    if bare and not (folder / "run.json").is_file():
        place = str(checkpoints.read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    return models.load_tokenizer(place, **models.options_of(place, options))


def _checkpoint(reference: str, options: Mapping[str, Any]) -> Any:
    loaded = models.load_model(reference, CAUSAL, config={}, **options)
    if loaded.new:
        raise ModelError(f"{reference}: no language model: {sorted(loaded.new)[:3]} are not in the checkpoint")
    return loaded.model


def of_run(folder: Path, base: str | None = None, trusted: Any = False) -> tuple[Any, dict[str, Any]]:
    """A run's model that writes, and its ``run.json``, with all options of the base; ``base`` says where that is now,
    if it has moved; ``trusted`` is whether its own code may run.

    Raises:
        ModelError: It is no decoder, or cannot be loaded.
        CheckpointError: The folder is damaged, or needs code that is not trusted.
    """
    run = _run_that_writes(folder, trusted)
    facts = run["model"]
    options = {"dtype": facts["dtype"], **facts["options"]}  # which the base's fingerprint is of
    as_trained = {**run, "model": {**facts, "options": options}}
    model = inference.load_weights(folder, as_trained, base, WRITES, True)
    if base is not None:
        as_trained["model"] = inference.relocated(as_trained["model"], base)
    return model, as_trained


def _run_that_writes(folder: Path, trusted: Any) -> dict[str, Any]:
    if problems := checkpoints.damage(folder):
        raise CheckpointError(*problems)
    run = checkpoints.read_json(folder / "run.json")
    checkpoints.check_code(folder, run, trusted)
    if run["model"].get("auto_class", CAUSAL) != CAUSAL:  # runs of PPO do not name it
        raise ModelError(f"{folder}: was trained for {run['task']['name']}, and does not go on from a prompt")
    return run

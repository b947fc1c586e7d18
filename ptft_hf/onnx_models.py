"""Classifiers and taggers as ONNX graphs: made by torch's own exporter, run by onnxruntime (extra ``onnx``)."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptft_hf.errors import ModelError
from ptft_hf.forward import first_logits
from ptft_hf.models import quiet

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FILE = "model.onnx"


def check_packages() -> None:
    """Before anything is loaded.

    Raises:
        ModelError: A package of the extra is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"onnx: needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: pip install 'ptft-hf[onnx]'"
        )


class _ByPosition(nn.Module):
    """A model whose inputs have an order, and whose only output is its logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return first_logits(self.model(**dict(zip(self.names, values, strict=True))))


def write(model: Any, example: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``model.onnx`` (and, of large models, its weights beside it), with any number of rows and tokens.

    Args:
        model: A ``transformers`` model, in float32.
        example: Inputs ``[B, T]``, of at least two rows.
        folder: Where it is written.

    Raises:
        ModelError: The exporter cannot convert the architecture.
    """
    names = list(example)
    axes = {0: "batch", 1: "length"}
    wrapped = _ByPosition(model, names).eval()
    cached, log = getattr(model.config, "use_cache", None), logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # which operators of packages that are not here it knows
    if cached:
        model.config.use_cache = False  # keys and values of decoders are no outputs here
    try:
        with warnings.catch_warnings(), quiet(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's of its own deprecations, and of unnamed axes
            program = torch.onnx.export(
                wrapped,
                tuple(example.values()),
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes={"values": tuple(axes for _ in names)},
                verbose=False,
            )
            assert program is not None
            program.save(folder / FILE)
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise ModelError(
            f"onnx: torch's exporter cannot convert {type(model).__name__}: {type(error).__name__}: {first}"
        ) from error
    finally:
        log.setLevel(level)
        if cached:
            model.config.use_cache = cached


class OnnxModel(nn.Module):
    """A written graph under onnxruntime, called as a ``transformers`` model is.

    Args:
        folder: Where ``model.onnx`` is.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(
            str(folder / FILE), providers=["CPUExecutionProvider"]
        )
        self.names = [value.name for value in self.session.get_inputs()]
        self.register_parameter("place", nn.Parameter(torch.empty(0)))  # says where inputs are to be

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {name: inputs[name].numpy() for name in self.names}
        return {"logits": torch.from_numpy(self.session.run(None, given)[0])}

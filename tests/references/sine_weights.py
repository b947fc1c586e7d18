"""Weights that are the same in every environment: sines, by the name of the weight."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

IDS = [[1, 9, 10, 11, 12, 13, 2], [1, 14, 15, 16, 2, 0, 0], [1, 17, 18, 19, 20, 2, 0]]
LABELS = [0, 1, 1]


def fill(model: Any) -> Any:
    """Overwrite every weight of a model; what is tied counts by its first name."""
    seen: set[int] = set()
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point() or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        value.copy_(sine(name, list(value.shape)))
    return model.eval()


def sine(name: str, shape: list[int]) -> torch.Tensor:
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(steps * 0.7318 + zlib.crc32(name.encode()) % 997)
    is_scale = len(shape) == 1 and name.endswith("weight")
    return (wave * (0.2 if len(shape) > 1 else 0.1) + float(is_scale)).view(shape).float()


def text_inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor(IDS)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def image_inputs() -> dict[str, torch.Tensor]:
    pixels = torch.sin(torch.arange(3 * 3 * 16 * 16, dtype=torch.float64) * 0.37).float()
    return {"pixel_values": pixels.view(3, 3, 16, 16)}


def config_fields(name: str) -> dict[str, Any]:
    """Of a tiny model with a head for two classes, without dropout."""
    from tests.tiny import SIZES, SPECIAL

    if name == "vit":
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        return {**sizes, "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "num_labels": 2}
    ids = {f"{key}_token_id": value for key, value in SPECIAL.items() if key in ("pad", "bos", "eos")}
    if name == "bart":
        ids |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    if name == "bert":
        ids |= {"num_hidden_layers": 2}
    if name == "t5":
        ids |= {"decoder_start_token_id": 2, "num_layers": 1}
    else:
        ids["n_positions" if name == "gpt2" else "max_position_embeddings"] = 72
    return {**SIZES[name], "vocab_size": 64, "num_labels": 2, **ids}


def build(name: str, auto: Any) -> Any:
    """A tiny model of ``auto`` (AutoModelForSequenceClassification, ...) with these weights."""
    from transformers import AutoConfig

    with torch.no_grad():
        return fill(auto.from_config(AutoConfig.for_model(name, **config_fields(name))))

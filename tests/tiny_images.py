"""Tiny random checkpoints of image models, and a small learnable set of images, built without a network."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

SIZE = 32
TRANSFORMER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=SIZE)
SIZES: dict[str, dict[str, Any]] = {
    "vit": dict(**TRANSFORMER, patch_size=8),
    "deit": dict(**TRANSFORMER, patch_size=8),
    "beit": dict(**TRANSFORMER, patch_size=8),
    "dinov2": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8),
    "resnet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE),
    "convnextv2": dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE),
    "swin": dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=SIZE, patch_size=4),
    "segformer": dict(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    "mobilevit": dict(
        image_size=SIZE,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 32],
        num_attention_heads=2,
    ),
    "mobilenet_v2": dict(depth_multiplier=0.25, image_size=SIZE),
    "regnet": dict(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], groups_width=8),
    "poolformer": dict(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_encoder_blocks=4, mlp_ratio=2.0
    ),
    "pvt": dict(
        image_size=SIZE,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        sequence_reduction_ratios=[4, 2, 1, 1],
    ),
}
DARK, LIGHT = "dark", "light"


def make_image_checkpoint(name: str, folder: Path, **overrides: Any) -> Path:
    """Save a random checkpoint without a head, with its image processor."""
    import torch
    import transformers

    from ptft_hf.models.images import default_processor

    config = transformers.AutoConfig.for_model(name, **{**SIZES[name], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    config.image_size = SIZE
    default_processor(config).save_pretrained(folder)
    return folder


def picture(label: str, draw: random.Random, size: int = 12) -> Image.Image:
    """Noise, dark or light."""
    low, high = (0, 100) if label == DARK else (155, 255)
    pixels = [[[draw.randint(low, high) for _ in "RGB"] for _ in range(size)] for _ in range(size)]
    return Image.fromarray(np.array(pixels, dtype=np.uint8))


def pictures(count: int, seed: int, labels: tuple[str, ...] = (DARK, LIGHT)) -> datasets.Dataset:
    draw = random.Random(seed)
    rows = [labels[i % len(labels)] for i in range(count)]
    columns = {"image": [picture(label, draw) for label in rows], "label": rows}
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    )


def splits(count: int = 16) -> datasets.DatasetDict:
    sizes = {"train": count, "validation": 8, "test": 8}
    return datasets.DatasetDict({name: pictures(n, seed) for seed, (name, n) in enumerate(sizes.items())})

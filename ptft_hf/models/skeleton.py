"""An architecture without its weights: enough to know what it reads, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ptft_hf.models.reading import auto_of, from_pretrained, reading


def skeleton(reference: str, auto_class: str, config: Mapping[str, Any], **options: Any) -> Any:
    """The model of a checkpoint on the meta device: modules, names and shapes, no values.

    Args:
        reference: As in :func:`ptft_hf.models.load_model`.
        auto_class: Likewise.
        config: Overrides of the checkpoint's own configuration.
        **options: ``from_pretrained``'s own arguments.

    Raises:
        ModelError: The checkpoint cannot be found or read, or its architecture has no head of this kind.
    """
    found = from_pretrained("AutoConfig", reference, options, **config)
    auto = auto_of(auto_class, reference, found, options)
    with reading(reference), torch.device("meta"):
        return auto.from_config(found, **{k: v for k, v in options.items() if k == "trust_remote_code"})

"""An architecture without its weights: enough to know what it reads, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ptft_hf.errors import ModelError
from ptft_hf.models.reading import config_options, reading, split_revision
from ptft_hf.recipes import locate


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
    import transformers

    source, revision = split_revision(locate(reference))
    options = {**({"revision": revision} if revision else {}), **options}
    with reading(reference):
        found = transformers.AutoConfig.from_pretrained(source, **config, **config_options(options))
        auto = getattr(transformers, auto_class)
        if type(found) not in auto._model_mapping and not options.get("trust_remote_code"):
            raise ModelError(
                f"{reference}: transformers has no {auto_class} for the architecture {found.model_type!r}; choose "
                "a checkpoint of another architecture"
            )
        with torch.device("meta"):
            return auto.from_config(found, **{k: v for k, v in options.items() if k == "trust_remote_code"})

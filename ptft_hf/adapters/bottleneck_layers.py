"""Bottleneck adapters: small networks that change what a layer's sub-layers add to the residual stream.

With ``y`` a sub-layer's output, ``x`` the residual stream before it, ``LN`` the layer norm after it (in layers
that normalise before, nothing), ``A(h) = scaling * up(activation(down(h)))``, the layer goes on from
``LN(x + y')``, where

- Houlsby et al. 2019, after attention and feed-forward: ``y' = y + A(y)``,
- Pfeiffer et al. 2020 (AdapterFusion), after the feed-forward only: ``y' = y + A(LN(x + y))``,
- He et al. 2021, in parallel to the feed-forward: ``y' = y + A(x)``.

The up-projection starts at zero (He et al.), so that a fresh adapter changes nothing.

Hooks run the adapters, and the adapters are modules of the layer that they belong to: classes and names of the
pretrained model stay as they are, and gradient checkpointing, copies, ``state_dict`` and DistributedDataParallel
need no help.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptft_hf.errors import AdapterError, did_you_mean
from ptft_hf.recipes import BottleneckConfig


class BottleneckLayer(nn.Module):
    """One adapter at one place.

    Raises:
        AdapterError: No such activation.
    """

    def __init__(self, config: BottleneckConfig, hidden_size: int) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        if config.non_linearity not in ACT2FN:
            near = did_you_mean(config.non_linearity, ACT2FN) or f"; known: {', '.join(sorted(ACT2FN))}"
            raise AdapterError(
                f"non_linearity: transformers has no activation {config.non_linearity!r}{near}"
            )
        size = max(1, int(hidden_size // config.reduction_factor))
        self.reads_input, self.reads_normed = config.is_parallel, config.original_ln_before
        self.norm_before = nn.LayerNorm(hidden_size) if config.ln_before else nn.Identity()
        self.down = nn.Linear(hidden_size, size)
        self.activation = ACT2FN[config.non_linearity]
        self.up = nn.Linear(size, hidden_size)
        self.scaling: Any = None if config.scaling == 1.0 else config.scaling
        if config.scaling in ("learned", "channel"):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.norm_after = nn.LayerNorm(hidden_size) if config.ln_after else nn.Identity()
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, output: torch.Tensor, stream: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """``y'`` from ``y``, ``x`` and ``LN`` (see the top of this file), all ``[batch, tokens, hidden]``."""
        read = stream if self.reads_input else output
        if self.reads_normed:
            read = output + stream
            read = read if norm is None else norm(read)
        if not torch.is_autocast_enabled(read.device.type):  # a half-precision base without autocast
            read = read.to(self.down.weight.dtype)
        change = self.up(self.activation(self.down(self.norm_before(read))))
        change = change if self.scaling is None else change * self.scaling
        added: torch.Tensor = self.norm_after(self.dropout(change))
        return output + added.to(output.dtype)


class HookedAdapters(nn.ModuleDict):
    """The adapters at one hook point, by name, and the two hooks that run the active ones.

    The hooks are bound methods: a copied or unpickled model is hooked to its own adapters.
    """

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.stream: torch.Tensor | None = None
        self._norm = (norm,)  # in a tuple: it belongs to the layer, not to the adapters
        self.handles: list[Any] = []

    def hook(self, input_module: nn.Module, output_module: nn.Module) -> None:
        self.handles = [
            input_module.register_forward_pre_hook(self._remember, with_kwargs=True),
            output_module.register_forward_hook(self._change),
        ]

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stream = next(iter((*args, *kwargs.values()))) if self.active else None

    def _change(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if not self.active:
            return result
        stream, self.stream = self.stream, None
        output, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        for name in self.active:
            output = self[name](output, stream, self._norm[0])
        return output if rest is None else (output, *rest)

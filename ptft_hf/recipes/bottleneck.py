"""Bottleneck adapters: what a recipe may say of them. Names and meanings are those of AdapterHub's ``BnConfig``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ptft_hf.recipes.documents import shown
from ptft_hf.recipes.faults import Fault
from ptft_hf.recipes.models import AdapterRecipe, _Strict

Place = Literal["mh_adapter", "cross_adapter", "output_adapter"]
"""After a layer's attention, its cross-attention, its feed-forward."""


class HookPoint(_Strict):
    """Where one sub-layer of a layer begins and ends; module names are relative to the layer."""

    output: str
    """The module whose output is added to the residual stream (its first element, if it is a tuple)."""
    input: str
    """A module whose first argument is the residual stream before the sub-layer."""
    norm: str | None = None
    """The layer norm after the sum; None where the norm stands before the sub-layer."""
    beside: str | None = None
    """A module without which a layer has no such sub-layer."""


class BottleneckConfig(_Strict):
    """One bottleneck adapter: where it stands and what it is made of. The defaults are AdapterHub's.

    Raises:
        pydantic.ValidationError: If a name is unknown or a value of the wrong type.
    """

    mh_adapter: bool = False
    """After the (self-)attention of each layer."""
    output_adapter: bool = True
    """After the feed-forward of each layer."""
    cross_adapter: bool = False
    """After the cross-attention of each decoder layer."""
    reduction_factor: Annotated[float, Field(gt=0)] = 16
    """Hidden size over bottleneck size."""
    non_linearity: str = "relu"
    """As transformers' ``get_activation`` names it."""
    original_ln_before: bool = False
    """The adapter reads what the pretrained layer norm makes of sub-layer plus residual (in layers that normalise
    before: their sum), and not the sub-layer's own output."""
    is_parallel: bool = False
    """The adapter reads the sub-layer's input, as the residual stream has it."""
    scaling: float | Literal["learned", "channel"] = 1.0
    """Factor on what is added: a number, one that is learned, or one learned for each channel."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On what is added."""
    ln_before: bool = False
    """A new layer norm before the down-projection."""
    ln_after: bool = False
    """A new layer norm on what is added. Its input is zero at the start, where it amplifies by up to 300."""
    leave_out: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Layers without an adapter, counted from 0; a decoder's follow its encoder's."""
    hook_points: dict[Place, HookPoint] | None = None
    """For architectures that the table in ``ptft_hf/adapters/hook_points.py`` lacks."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from bottleneck_faults(values)


class BottleneckRecipe(AdapterRecipe, BottleneckConfig):
    """Bottleneck adapters (Houlsby et al. 2019 and later)."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from bottleneck_faults(values)

    @property
    def config(self) -> BottleneckConfig:
        """The adapter itself, without how fast it is trained."""
        return BottleneckConfig(**{name: getattr(self, name) for name in BottleneckConfig.model_fields})


def bottleneck_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Settings that have no meaning beside each other."""
    if not any(values.get(name) for name in ("mh_adapter", "output_adapter", "cross_adapter")):
        yield (
            ("output_adapter",),
            "there is no place left for an adapter: set mh_adapter, output_adapter or cross_adapter",
        )
    if values.get("is_parallel") and values.get("original_ln_before"):
        yield ("original_ln_before",), f"{shown(True)} has no meaning for a parallel adapter; leave it out"

"""TRL's trainers with what recipes say of rates and dropout, and with checkpoints that appear whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ptft_hf.adapters import Adapter
from ptft_hf.atomic import AtomicCheckpoints
from ptft_hf.by_recipe import ByRecipe, without_dropout


class OfTRL(AtomicCheckpoints, ByRecipe):
    """To be inherited before one of TRL's trainers."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Upstream's, and answers are sampled here."""
        if self.model.training:
            self.quieten()
        return super()._prepare_inputs(inputs)  # type: ignore[misc]


def build(kind: type, method: Adapter, head: Sequence[str], **options: Any) -> Any:
    """A trainer of TRL's ``kind`` for the model of ``options``, on which ``method`` was put."""
    model = options["model"]
    quiet = [] if method.recipe.trunk_dropout else without_dropout(model, method.own_modules())
    made = type(f"Atomic{kind.__name__}", (OfTRL, kind), {"method": method, "head": head})
    with _reference_of_its_own(model):
        trainer = made(**options)
    trainer.quiet = quiet
    return trainer


@contextmanager
def _reference_of_its_own(model: Any) -> Iterator[None]:
    """The reference is a second adapter of the same configuration, which gets the first one's weights; PiSSA and its
    kin would begin it with a second change of the base."""
    config = getattr(model, "peft_config", {}).get("default")
    given = getattr(config, "init_lora_weights", True)
    if config is None or not isinstance(given, str):
        yield
        return
    config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = given

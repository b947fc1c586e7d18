"""What an adapter's recipe says of learning rates and of dropout, for any ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ptft_hf.adapters import Adapter
from ptft_hf.models import depths, plain_model, trains_rows_alone, trunk_of


class ByRecipe:
    """To be inherited before a ``transformers.Trainer``: rates are those of ``method`` and its recipe, and ``quiet``
    modules can be kept out of training mode."""

    args: Any
    model: Any
    optimizer: Any
    method: Adapter
    head: Sequence[str] = ()
    """Names of the modules above the trunk."""
    quiet: Sequence[nn.Module] = ()
    """Of :func:`without_dropout`."""
    get_optimizer_cls_and_kwargs: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW in upstream's groups, or the method's; by depth if the recipe has ``layerwise_lr_decay`` or a head
        rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate = options.setdefault("lr", self.args.learning_rate)
            if self.method.recipe.layerwise_lr_decay or self.method.recipe.head_learning_rate:
                self.optimizer = kind(self.parameter_groups(model, rate), **options)
            else:
                self.optimizer = self.method.optimizer(model, kind, options, self.args.weight_decay)
        return super().create_optimizer(model)  # type: ignore[misc]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Upstream's, without embeddings of which some rows alone are trained: decay would move the others."""
        some = {name for name, p in model.named_parameters() if trains_rows_alone(p)}
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if name not in some]

    def parameter_groups(self, model: Any, rate: float) -> list[dict[str, Any]]:
        """Rate of depth ``d`` of ``L`` layers: ``rate * decay ** (L + 1 - d)`` (Howard & Ruder 2018; ELECTRA);
        the head has ``rate``, or its own."""
        recipe, decayed = self.method.recipe, set(self.get_decay_parameter_names(model))
        depth = depths(model, self.head)
        top = max(depth.values())
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            d = depth[name]
            lr = rate * (recipe.layerwise_lr_decay or 1.0) ** (top - d)
            if d == top and recipe.head_learning_rate is not None:
                lr = recipe.head_learning_rate
            decay = self.args.weight_decay if name in decayed else 0.0
            groups.setdefault((d, decay > 0), {"params": [], "lr": lr, "weight_decay": decay})
            groups[d, decay > 0]["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def quieten(self) -> None:
        """Take the frozen part of the trunk out of training mode, and with it its dropout."""
        for module in self.quiet:
            # Gradient checkpointing happens in training mode alone.
            module.training = bool(getattr(module, "gradient_checkpointing", False))


def without_dropout(model: nn.Module, own: tuple[type, ...] = ()) -> list[nn.Module]:
    """Modules of the frozen part of the trunk, to be kept out of training mode so that their dropout is off.

    Frozen weights cannot co-adapt, and drawing dropout's random numbers is a fifth of a CPU step. A layer
    with trained pretrained weights keeps its dropout, as does the head.

    Args:
        model: The model that is trained.
        own: Types of a method's own modules, which keep theirs, too.
    """
    base = plain_model(model)
    trunk = trunk_of(base)
    quiet: list[nn.Module] = []

    def visit(module: nn.Module, unit: bool) -> bool:
        """Collect the quiet modules below and tell whether all of ``module`` is frozen. Inside a unit (a
        layer, or a part of the trunk without layers) it is all or nothing."""
        if isinstance(module, own):
            return True
        unit = unit or not any(isinstance(m, nn.ModuleList) for m in module.modules())
        mark = len(quiet)
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        for child in module.children():
            frozen = visit(child, unit or isinstance(module, nn.ModuleList)) and frozen
        if not frozen and unit:
            del quiet[mark:]
        if frozen:
            quiet.append(module)
        return frozen

    if trunk is not base:
        visit(trunk, False)
    return quiet

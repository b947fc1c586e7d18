"""Bottleneck adapters on a model: what a ``bottleneck/`` recipe does, several adapters on one base, save and load.

What an adapter computes is in :mod:`ptft_hf.adapters.bottleneck_layers`, where it stands in
:mod:`ptft_hf.adapters.hook_points`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptft_hf.adapters import Adapter
from ptft_hf.adapters.bottleneck_layers import BottleneckLayer, HookedAdapters
from ptft_hf.adapters.hook_points import hook_points
from ptft_hf.errors import AdapterError, CheckpointError, did_you_mean
from ptft_hf.models import added_rows, to_float32, unfreeze
from ptft_hf.recipes import BottleneckConfig, BottleneckRecipe, saved_adapter_kind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEFAULT = "default"
"""The name of a run's adapter."""


class Bottleneck(Adapter):
    """The method of a ``bottleneck/`` recipe. 1e-4 is what AdapterHub's documentation found to work well in most
    settings (docs.adapterhub.ml, "Adapter Training")."""

    learning_rate = 1e-4

    def __init__(self, recipe: BottleneckRecipe, earlier: Path | None = None) -> None:
        """See :func:`ptft_hf.adapters.build`; ``earlier`` is its ``given``."""
        self.recipe, self.earlier = recipe, earlier

    def own_modules(self) -> tuple[type, ...]:
        """See :class:`ptft_hf.adapters.Adapter`."""
        return (HookedAdapters,)

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> BottleneckModel:
        """See :class:`ptft_hf.adapters.Adapter`.

        Raises:
            AdapterError: The architecture is unknown or lacks a place, or the earlier adapter does not fit.
        """
        if added_rows(model):
            raise AdapterError(
                f"{self.recipe.name}: cannot keep the embeddings of added tokens (add_tokens); use a LoRA, "
                "partial or full recipe"
            )
        kind = saved_adapter_kind(self.earlier)
        try:
            wrapped = BottleneckModel(model, head)
            if kind == "adapterhub":
                wrapped.load_adapter(str(self.earlier), DEFAULT, with_head=True)
            else:
                wrapped.add_adapter(DEFAULT, self.recipe.config)
            wrapped.activate(DEFAULT)
        except AdapterError as error:
            raise AdapterError(*(f"{self.recipe.name}: {problem}" for problem in error.problems)) from error
        if self.earlier is not None and kind == "bottleneck":
            wrapped.load_weights(self.earlier)
        return wrapped


class BottleneckModel(nn.Module):
    """A ``transformers`` model with bottleneck adapters; everything that is not said here is the model's own.

    Several adapters may stand on one base: :meth:`add_adapter` and :meth:`load_adapter` bring them,
    ``activate("a")`` switches to one, ``activate("a", "b")`` stacks them (the second reads what the first made),
    ``activate()`` runs the base alone, and :meth:`average` makes one of several. They share one head.

    Args:
        base_model: A pretrained model with its task head; it is frozen, up to the head.
        head: Names of the modules above the trunk, which are trained and saved with the adapters.
    """

    adapter_kind = "bottleneck"
    _hf_peft_config_loaded = True  # Trainer's question whether a quantized base has something to train

    def __init__(self, base_model: Any, head: Sequence[str]) -> None:
        super().__init__()
        self.base_model = base_model
        self.head = tuple(head)
        self.configs: dict[str, BottleneckConfig] = {}
        self.active: tuple[str, ...] = ()
        base_model.requires_grad_(False)
        for name in head:
            to_float32(base_model.get_submodule(name).requires_grad_(True).parameters())
        self._first_head = {n: v.detach().clone() for n, v in self.own_state().items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The ``transformers`` model, adapters and all; :meth:`unload` takes them out."""
        return self.base_model

    # ---- several adapters ----

    def add_adapter(self, name: str, config: BottleneckConfig) -> None:
        """Put a fresh, inactive adapter on the base: it changes nothing until it is trained.

        Raises:
            AdapterError: The name is taken or no identifier, or the configuration does not fit the architecture.
        """
        if name in self.configs or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise AdapterError(f"the adapter name {name!r} is taken, or no name of letters, digits and _")
        base: Any = self.base_model
        hidden_size = getattr(base.config.get_text_config(), "hidden_size", None)
        if hidden_size is None:
            raise AdapterError(f"bottleneck adapters: the layers of {type(base).__name__} have no one hidden size")
        for path, points in hook_points(base, config):
            layer = base.get_submodule(path)
            for place, point in points.items():
                if not hasattr(layer, place):
                    adapters = HookedAdapters(layer.get_submodule(point.norm) if point.norm else None)
                    adapters.hook(layer.get_submodule(point.input), layer.get_submodule(point.output))
                    layer.add_module(place, adapters)
                fresh = BottleneckLayer(config, hidden_size)
                getattr(layer, place)[name] = fresh.to(next(layer.parameters()).device)
        self.configs[name] = config

    def load_adapter(self, folder: str | Path, name: str, *, with_head: bool = False) -> None:
        """Put the adapter of a finished bottleneck run, or one that AdapterHub's library saved, on the base.

        Args:
            folder: A run's output folder, or what AdapterHub's ``save_adapter`` (``save_all_adapters``) wrote.
            name: What to call it here; inactive until :meth:`activate`.
            with_head: Take the head that was saved with it, too, if it has the shape of this one.

        Raises:
            AdapterError: The folder holds no bottleneck adapter, or one for another architecture or size.
        """
        from ptft_hf.adapters import adapterhub

        kind = saved_adapter_kind(folder)
        if kind == "adapterhub":
            adapterhub.read(self, Path(folder), name, with_head)
            return
        if kind != "bottleneck":
            raise AdapterError(f"{folder}: holds no bottleneck adapter, neither ours nor AdapterHub's")
        configs, active, _ = read_config(Path(folder))
        if len(active) != 1:
            raise AdapterError(
                f"{folder}: holds {len(active)} active adapters; save it with one of them active"
            )
        self.add_adapter(name, configs[active[0]])
        own = {f"{path}.{active[0]}.{rest}": full for (path, rest), full in self.names_of(name).items()}
        own |= {n: n for n in self._first_head if with_head}
        self._copy(Path(folder), own, whole=False)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter off the base.

        Raises:
            AdapterError: No such adapter.
        """
        self.activate(*(other for other in self.active if other != name))
        self._check_names(name)
        for adapters in self._places().values():
            if name in adapters:
                del adapters[name]
        del self.configs[name]

    def activate(self, *names: str) -> None:
        """Run these adapters, in this order; none is the base alone. What is trained does not change.

        Raises:
            AdapterError: No such adapter.
        """
        self._check_names(*names)
        self.active = names
        for adapters in self._places().values():
            adapters.active = tuple(name for name in names if name in adapters)

    def average(self, name: str, weights: Mapping[str, float]) -> None:
        """Add an adapter whose weights are the weighted mean of others' (Chronopoulou et al. 2023, AdapterSoup).

        Args:
            name: Of the new adapter.
            weights: Of the adapters to average, by name; they are divided by their sum.

        Raises:
            AdapterError: The adapters are of different shapes, or the sum is not above zero.
        """
        total = sum(weights.values())
        if not total > 0:
            raise AdapterError(f"average: the weights {dict(weights)} do not sum to more than zero")
        self._check_names(*weights)
        first, *others = (self.configs[each] for each in weights)
        if any(other != first for other in others):
            raise AdapterError("average: the adapters differ in their configuration")
        self.add_adapter(name, first)
        state = self.base_model.state_dict()
        with torch.no_grad():
            for (path, rest), full in self.names_of(name).items():
                parts = [share / total * state[f"{path}.{n}.{rest}"] for n, share in weights.items()]
                state[full].copy_(torch.stack(parts).sum(0))

    def unload(self) -> Any:
        """Take all adapters out, put the head back as it was, and return the base model, frozen no more."""
        for path, adapters in self._places().items():
            for handle in adapters.handles:
                handle.remove()
            parent, _, place = path.rpartition(".")
            delattr(self.base_model.get_submodule(parent), place)
        self.base_model.load_state_dict(self._first_head, strict=False)
        self.configs, self.active = {}, ()
        return unfreeze(self.base_model)

    def merge_and_unload(self) -> Any:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a bottleneck's non-linearity cannot be folded into linear layers")

    def _check_names(self, *names: str) -> None:
        for name in names:
            if name not in self.configs:
                raise AdapterError(f"there is no adapter {name!r}{did_you_mean(name, self.configs)}")

    def _places(self) -> dict[str, HookedAdapters]:
        return {n: m for n, m in self.base_model.named_modules() if isinstance(m, HookedAdapters)}

    # ---- save and load ----

    def names_of(self, adapter: str) -> dict[tuple[str, str], str]:
        """Names of an adapter's weights in the base model's ``state_dict``, by place and by name within it."""
        return {
            (path, name): f"{path}.{adapter}.{name}"
            for path, adapters in self._places().items()
            if adapter in adapters
            for name in adapters[adapter].state_dict()
        }

    def own_state(self, state_dict: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """Weights of all adapters and of the head, without the frozen base.

        Args:
            state_dict: This model's whole ``state_dict``, where it is to be had from a sharded one.
        """
        if state_dict is None:
            state = self.base_model.state_dict()
        else:
            state = {name.removeprefix("base_model."): value for name, value in state_dict.items()}
        own = tuple(f"{path}." for path in (*self._places(), *self.head))
        return {name: value for name, value in state.items() if name.startswith(own)}

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Any] | None = None) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``: all adapters and the head."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "adapter_kind": self.adapter_kind,  # PEFT looks for peft_type, and refuses a file without it
            "library": "ptft_hf",
            "adapters": {name: config.model_dump(mode="json") for name, config in self.configs.items()},
            "active": list(self.active),
            "head": list(self.head),
        }
        own = {name: value.detach().cpu().contiguous() for name, value in self.own_state(state_dict).items()}
        save_file(own, path / WEIGHTS, metadata={"format": "pt"})
        (path / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")

    def load_weights(self, folder: Path) -> None:
        """Replace the weights of all adapters and the head by those that were saved.

        Raises:
            CheckpointError: Other weights were saved than this model has.
        """
        self._copy(folder, {name: name for name in self.own_state()}, whole=True)

    def _copy(self, folder: Path, own: Mapping[str, str], whole: bool) -> None:
        """Copy saved weights, by their name in the file; ``whole``: the file holds no others."""
        from safetensors.torch import load_file

        saved, state = load_file(folder / WEIGHTS), self.base_model.state_dict()
        wrong = sorted(own.keys() ^ saved.keys() if whole else own.keys() - saved.keys())
        wrong += [n for n in own if n in saved and saved[n].shape != state[own[n]].shape]
        if wrong:
            raise CheckpointError(
                f"{folder / WEIGHTS}: not the weights of this model; missing, left over or of another shape are "
                f"{', '.join(wrong[:10])}"
            )
        with torch.no_grad():
            for name, mine in own.items():
                state[mine].copy_(saved[name])


def read_config(folder: Path) -> tuple[dict[str, BottleneckConfig], list[str], list[str]]:
    """Adapters by name, the active ones, and the head's modules, of a folder that was saved.

    Raises:
        CheckpointError: Not readable.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        adapters = {name: BottleneckConfig(**fields) for name, fields in config["adapters"].items()}
        return adapters, config["active"], config["head"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: not readable as a bottleneck adapter's: {error}"
        ) from error


def load(base_model: Any, folder: str | Path) -> BottleneckModel:
    """The adapters and the head that :meth:`BottleneckModel.save_pretrained` wrote, on a freshly loaded base.

    Raises:
        CheckpointError: The folder is damaged, or of another architecture.
    """
    configs, active, head = read_config(Path(folder))
    try:
        model = BottleneckModel(base_model, head)
        for name, config in configs.items():
            model.add_adapter(name, config)
        model.activate(*active)
    except (AdapterError, AttributeError) as error:
        raise CheckpointError(f"{folder}: does not fit {type(base_model).__name__}: {error}") from error
    model.load_weights(Path(folder))
    return model.eval()

"""PPO whose processes share out the layers' weights: FSDP 2, by accelerate's settings.

Each layer of the models' stacks is sharded by itself, with all adapters in it, and gathered while it runs; embeddings
and heads are whole in each process. So all processes must run the same passes, even one that has nothing to compute.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.models import plain_model
from ptft_hf.rlhf.roles import Roles


def settings() -> Any:
    """accelerate's plugin, as ``accelerate launch --use_fsdp --fsdp_version 2`` or a file of it sets it; else None.

    Raises:
        RecipeError: It is FSDP 1, which wraps a model whole and trains all of it; or there is one process.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise RecipeError("FSDP: one process has nobody to share with; set --num_processes, or leave it out")
    found = FullyShardedDataParallelPlugin()
    if found.fsdp_version != 2:
        raise RecipeError("FSDP 1 cannot hold PPO's parts; set fsdp_version: 2 (accelerate launch --fsdp_version 2)")
    return found


def shard(parts: Roles, plugin: Any, device: torch.device) -> None:
    """Share out the layers of all models in place; parameters become others, of type ``DTensor``.

    Models come from the CPU; on ``device`` are then embeddings, heads, this process's parts, and the layer that runs.

    Raises:
        ModelError: Its layers are not known to transformers, or are in four or eight bits.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import OffloadPolicy, fully_shard

    models = {id(role.model): role.model for role in (parts.policy, parts.reference, parts.critic)}
    layers = [layer for model in models.values() for layer in layers_of(plain_model(model))]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        made = fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            offload_policy=plugin.cpu_offload or OffloadPolicy(),
        )
        # Losses are divided by the tokens of all processes already; gloo cannot scale while it sums.
        made.set_force_sum_reduction_for_comms(True)
        made.set_gradient_divide_factor(1.0)
    heads = [role.head for role in parts.all if role.head is not None]
    for module in [*models.values(), *heads]:
        for tensor in [*module.parameters(), *module.buffers()]:
            if not is_sharded(tensor):
                tensor.data = tensor.data.to(device)


def layers_of(model: Any) -> list[nn.Module]:
    """The modules of a transformers model that may not be split.

    Raises:
        ModelError: As of :func:`shard`.
    """
    kinds, name = set(model._no_split_modules or ()), type(model).__name__
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelError(f"{name}: transformers does not say what its layers are; FSDP cannot shard it")
    if not all(p.is_floating_point() for p in model.parameters()):
        raise ModelError(f"{name}: a base in 4 or 8 bits cannot be sharded; leave FSDP or the quantization out")
    return layers


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a part; all processes take part in it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if ``like`` is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def clip(parameters: list[nn.Parameter], most: float) -> float:
    """Clip gradients to this norm, over all parameters, some of which are sharded; returns what it was."""
    groups = [[p for p in parameters if is_sharded(p) is sharded] for sharded in (False, True)]
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norm = torch.stack([whole(torch.nn.utils.get_total_norm(group)) for group in gradients if group]).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, most, norm)
    return float(norm)

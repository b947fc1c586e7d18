"""PPO whose processes share out the optimizer's states (ZeRO stage 1) and gradients (stage 2): DeepSpeed, by
accelerate's settings.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. Weights are whole in each process; what shares them out,
too, is :mod:`ptft_hf.rlhf.sharding`. The engine holds what is trained and nothing else, and is handed losses: parts
on one base take turns outside it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from ptft_hf.errors import RecipeError
from ptft_hf.rlhf.processes import Processes

OURS = {
    "optimizer": "PPO has one, with a learning rate for the policy and one for the critic",
    "scheduler": "--set lr_scheduler_type=... is PPO's",
    "train_batch_size": "it follows from per_device_train_batch_size and gradient_accumulation_steps, both by --set",
    "train_micro_batch_size_per_gpu": "--set per_device_train_batch_size=... is PPO's",
    "gradient_accumulation_steps": "--set gradient_accumulation_steps=... is PPO's",
    "gradient_clipping": "--set max_grad_norm=... clips policy and critic, each by itself",
    "fp16": "--set bf16=true is PPO's half precision",
    "bf16": "--set bf16=true is PPO's",
}
"""Keys of a DeepSpeed configuration that PPO has settings of its own for."""


def settings() -> dict[str, Any] | None:
    """DeepSpeed's configuration, as ``accelerate launch --use_deepspeed --zero_stage 2`` or a file of it sets it;
    None without. What it leaves to ``auto`` is left out.

    Raises:
        RecipeError: It cannot be read; it asks for what would not happen, all of that at once; or DeepSpeed is not
            installed.
    """
    from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    try:
        given = _without_auto(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:  # of a file
        raise RecipeError(f"DeepSpeed: {error}") from error
    problems = [f"{key}: leave it out; {why}" for key, why in OURS.items() if _asks(key, given.get(key))]
    zero = given["zero_optimization"]
    if zero.get("stage") not in (1, 2):
        problems.append(
            f"zero_optimization.stage {zero.get('stage')}: is 1 or 2 here; FSDP 2 shares out the weights, too "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    if zero.get("round_robin_gradients"):
        problems.append("zero_optimization.round_robin_gradients: leave it out; checkpoints keep parameters in order")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device") or "none"
        if device != "none":
            problems.append(f"zero_optimization.{name}.device {device!r}: leave it out; nothing is offloaded here")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        problems.append("one process has nobody to share with; set --num_processes, or leave it out")
    if importlib.util.find_spec("deepspeed") is None:
        problems.append("deepspeed is not installed: pip install deepspeed")
    if problems:
        raise RecipeError(*(f"DeepSpeed: {problem}" for problem in problems))
    return given


def _asks(key: str, value: Any) -> bool:
    """Whether a key of a configuration asks for something."""
    if isinstance(value, dict) and "enabled" in value:
        return bool(value["enabled"])
    return value is not None and (key, value) != ("gradient_accumulation_steps", 1)


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in inner.items() if value != "auto"}


class Losses(nn.Module):
    """What the engine takes for its model: it has all trained parameters, and returns the loss that it is given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class Zero:
    """DeepSpeed's engine around an optimizer, whose groups become this process's parts of flat tensors.

    Args:
        optimizer: Of parameters in float32. A group of it is clipped by itself.
        config: :func:`settings`'.
        processes: All of them.
        most: Norm that gradients are clipped to.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: dict[str, Any], processes: Processes, most: float
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        self.optimizer, self.processes, self.most = optimizer, processes, most
        self.trained = [list(group["params"]) for group in optimizer.param_groups]
        self.norms: list[float] = []
        # It would clip all groups together, to 1 by default; and it counts samples, which nobody asks for.
        config = {**config, "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1}
        model = Losses([p for group in self.trained for p in group])
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        optimizer.register_step_pre_hook(self._clip)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of a loss, added to those before; after the ``last`` comes a step.

        DeepSpeed averages over processes, and PPO's losses are to be added up.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(self.engine(loss * self.processes.world))

    def step(self) -> list[float]:
        """Returns the groups' norms before they are clipped; not numbers if there is one that is none, whereupon
        DeepSpeed takes no step."""
        self.norms.clear()
        self.engine.optimizer.refresh_fp32_params()  # in case somebody else has set weights
        self.engine.step()
        return self.norms if len(self.norms) == len(self.trained) else [math.nan for _ in self.trained]

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed steps one group after the other."""
        for group in optimizer.param_groups:
            (part,) = group["params"]
            norm = self.processes.summed(part.grad.square().sum()).sqrt()
            torch.nn.utils.clip_grads_with_norm_([part], self.most, norm)
            self.norms.append(float(norm))

    # ---- states, as those of an optimizer whose states are whole ----

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer without DeepSpeed, on the CPU of the main process, to which the others send their
        parts; theirs are without states."""
        states: dict[int, dict[str, Any]] = {}
        groups, first = self.optimizer.state_dict()["param_groups"], 0
        for group, saved, trained in zip(self.optimizer.param_groups, groups, self.trained, strict=True):
            (part,) = group["params"]
            saved["params"] = list(range(first, first + len(trained)))
            first += len(trained)
            whole = {key: self._whole(value, part) for key, value in self.optimizer.state[part].items()}
            if not self.processes.is_main:
                continue
            sizes = [p.numel() for p in trained]
            each = {k: torch.split(v[: sum(sizes)], sizes) if v.dim() else [v] * len(sizes) for k, v in whole.items()}
            for place, (number, parameter) in enumerate(zip(saved["params"], trained, strict=True)):
                own = {key: values[place] for key, values in each.items()}
                states[number] = {k: v.view_as(parameter).clone() if v.dim() else v for k, v in own.items()}
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for group, saved in zip(self.optimizer.param_groups, given["param_groups"], strict=True):
            (part,) = group["params"]
            states = [given["state"][number] for number in saved["params"]]
            group |= {key: value for key, value in saved.items() if key != "params"}
            self.optimizer.state[part] = {
                key: self._part([state[key] for state in states], part) if value.dim() else value.clone()
                for key, value in states[0].items()
            }

    def _whole(self, value: Tensor, part: Tensor) -> Tensor:
        """Of all processes, one after the other, so that a device holds no more than a part besides its own."""
        if value.shape != part.shape:  # of a step count
            return value.cpu()
        pieces = []
        for rank in range(self.processes.world):
            piece = value.clone() if rank == self.processes.rank else torch.empty_like(value)
            torch.distributed.broadcast(piece, rank)
            pieces += [piece.cpu()] if self.processes.is_main else []
        return torch.cat(pieces) if pieces else value

    def _part(self, values: list[Tensor], part: Tensor) -> Tensor:
        whole = torch.cat([value.reshape(-1) for value in values])
        filled = nn.functional.pad(whole, (0, part.numel() * self.processes.world - whole.numel()))
        own: Tensor = filled.chunk(self.processes.world)[self.processes.rank]
        return own.to(part.device, copy=True)

"""What PEFT leaves to whoever trains: AdaLoRA's schedule, and the end of training."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from ptft_hf.errors import AdapterError

# ---- AdaLoRA ----


class AdaLoraSchedule(transformers.TrainerCallback):
    """Cuts ranks at every step, and keeps the SVD's factors near orthogonal (Zhang et al. 2023, eq. 4 and 12).

    ``total_step`` is the run's number of steps. Where the recipe names neither ``tinit`` nor ``tfinal``, ranks
    are cut between 12 % and 56 % of them, as in the authors' script for SST-2 (6,000 steps first and 22,000 last of
    some 50,000).

    PEFT adds the penalty to the loss that a model computes from its labels. Here the loss is the task's, so the
    penalty's gradient is added once an optimizer step, whatever the accumulation.

    Raises:
        AdapterError: The steps leave no room for cutting ranks, or fp16 is on, whose scaled gradients the
            penalty's cannot be added to.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        config, total = model.peft_config["default"], state.max_steps
        if self.given.get("total_step") not in (None, total):
            raise AdapterError(
                f"total_step: {self.given['total_step']} is not the {total} steps of this run; leave it out"
            )
        config.total_step = total
        if not {"tinit", "tfinal"} & self.given.keys():
            config.tinit, config.tfinal = int(0.12 * total), int(0.44 * total)
        if config.tinit >= total - config.tfinal:
            raise AdapterError(
                f"tinit, tfinal: {config.tinit} first and {config.tfinal} last steps leave none of the run's "
                f"{total} to cut ranks in"
            )
        if args.fp16:
            raise AdapterError("training.fp16: cannot be had with AdaLoRA; use bf16")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        factors = orthogonal_factors(model)
        weight = model.peft_config["default"].orth_reg_weight
        with torch.enable_grad():
            gradients = torch.autograd.grad(weight * penalty(factors), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def orthogonal_factors(model: Any) -> list[torch.Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` of each adapted layer, B transposed where they are compared."""
    return [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]


def penalty(factors: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the factors of the Frobenius norm of ``P P^T - I``, in the smaller dimension (the rank)."""
    norms = []
    for factor in factors:
        rows = factor if factor.shape[0] <= factor.shape[1] else factor.T
        norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=factor.device)))
    return torch.stack(norms).mean()


def cut_ranks(model: Any) -> None:
    """AdaLoRA's layers in the ranks that they are saved with; until now the rest was masked by zeros."""
    pattern = model.peft_config["default"].rank_pattern
    if pattern:
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")


# ---- PiSSA and its kin ----


class ChangedBase:
    """Undoes what an initialisation did to the base (PiSSA, OLoRA, CorDA), at the end of training.

    They begin with ``W = W_rest + s B0 A0`` and train ``B`` and ``A``. The trained ``W_rest + s B A`` is the
    unchanged ``W`` with a LoRA of twice the rank: ``W + s [B, -B0] [A; A0]``.
    """

    def __init__(self, model: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def look_at(self, wrapped: Any) -> None:
        """Keep the first factors of each layer whose base has changed, and forget the other weights."""
        kept = {}
        for name, layer in lora_layers(wrapped):
            weight = f"{name.removeprefix('base_model.model.')}.weight"
            if not torch.equal(layer.get_base_layer().weight, self.before[weight]):
                kept[weight] = self.before[weight]
                pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                self.factors[name] = tuple(p.detach().clone() for p in pair)
        self.before = kept

    def undo(self, wrapped: Any) -> None:
        """Give the base its weights back and the layers twice the rank."""
        if not self.factors:
            return
        for name, layer in lora_layers(wrapped):
            a0, b0 = self.factors[name]
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            layer.get_base_layer().weight.data = self.before[
                f"{name.removeprefix('base_model.model.')}.weight"
            ]
            a.weight = torch.nn.Parameter(torch.cat([a.weight.detach(), a0.to(a.weight)]))
            b.weight = torch.nn.Parameter(torch.cat([b.weight.detach(), -b0.to(b.weight)], dim=1))
            a.out_features = b.in_features = layer.r["default"] = 2 * layer.r["default"]
        config = wrapped.peft_config["default"]
        # The scale stays: alpha / r, or alpha / sqrt(r).
        factor = 2**0.5 if config.use_rslora else 2
        config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, factor * config.lora_alpha
        config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
        config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}


def lora_layers(wrapped: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in wrapped.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]


# ---- p-tuning ----


def drop_prompt_network(model: Any) -> None:
    """P-tuning's prompt as plain embeddings, as PEFT saves it: its network has served (Liu et al. 2021)."""
    prompt = model.get_prompt_embedding_to_save("default")
    config = model.peft_config["default"]
    config.inference_mode = True
    with torch.random.fork_rng():
        encoder = type(model.prompt_encoder["default"])(config)
    encoder.embedding.weight.data = prompt.to(model.device)
    model.prompt_encoder["default"] = encoder.to(model.device)

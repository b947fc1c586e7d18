"""Prompts to be answered, and PPO's options, named as in TRL's ``PPOConfig`` where it had them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ptft_hf.errors import did_you_mean
from ptft_hf.recipes.documents import shown
from ptft_hf.recipes.faults import Fault, column_faults, list_of
from ptft_hf.recipes.models import TaskRecipe, _Strict

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

FINDINGS = (
    "negative_kl", "kl_runaway", "answers_grow", "answers_collapse", "critic_useless", "clip_fraction_zero",
    "clip_fraction_high", "entropy_collapse", "reward_hacking", "not_a_number",
)  # fmt: skip
"""What the doctor can find (:mod:`ptft_hf.rlhf.doctor`)."""

NO_ANSWERS = (
    "prompts have no answers to learn from or to be scored by; they are for `ptft ppo`, `ptft train --algorithm "
    "grpo` (or rloo), `ptft feedback generate` and `ptft evaluate --against`"
)
"""Said where a task is needed that has them."""

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Of transformers' schedules of the learning rate those that cannot step by a count alone."""


class PPOConfig(_Strict):
    """How PPO trains.

    An update samples ``per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches`` answers on each
    process and takes ``num_ppo_epochs x num_mini_batches`` optimizer steps on them. (TRL's updates were smaller: its
    minibatches were parts of ``per_device_train_batch_size x gradient_accumulation_steps``.)

    Raises:
        pydantic.ValidationError: If a name is unknown or a value of the wrong type.
    """

    # ---- how much ----
    total_episodes: Count | None = None
    """Answers to be sampled; None is ``num_train_epochs`` times the prompts."""
    num_train_epochs: Positive = 1.0
    """How often each prompt is answered."""
    per_device_train_batch_size: Count = 8
    """Answers in a forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Such passes in an optimizer step; the step is that of one larger batch."""
    num_mini_batches: Count = 1
    """Optimizer steps that an epoch over an update's answers takes."""
    num_ppo_epochs: Count = 4
    """How often an update's answers are learnt from."""
    local_rollout_forward_batch_size: Count = 64
    """Rows that run together where there is no backward pass."""

    # ---- sampling ----
    response_length: Count = 53
    """The longest answer, in tokens."""
    temperature: Positive = 0.7
    """Of the distribution that is sampled from, and of all log-probabilities. Cutting it (top-k, top-p) would make
    the ratios of the loss wrong, and is not offered."""
    stop_token_id: Annotated[int, Field(ge=0)] | None = None
    """Ends an answer, besides the tokenizer's and the model's own end tokens."""

    # ---- rewards ----
    kl_coef: NotNegative = 0.05
    """The KL penalty's coefficient; at the start, if it is adaptive."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """See :func:`ptft_hf.rlhf.ppo_math.kl_per_token`; ``k3`` hardly holds the policy near the reference."""
    adap_kl_ctrl: bool = False
    """Adapt the coefficient such that an answer's KL approaches ``target`` (Ziegler et al. 2019)."""
    target: Positive = 6.0
    """Nats an answer."""
    horizon: Count = 10_000
    """Answers over which the coefficient changes by a fifth if the KL is far off."""
    missing_eos_penalty: NotNegative | None = None
    """Taken from the score of an answer without an end token."""
    whiten_rewards: bool = False
    """Give rewards a variance of 1 (their mean stays)."""
    whiten_advantages: bool = True
    """Give advantages a mean of 0 and a variance of 1, as TRL always did."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of generalised advantage estimation."""

    # ---- losses and steps ----
    cliprange: Positive = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: NotNegative = 0.1
    """Of the value loss."""
    learning_rate: Positive | None = None
    """None is 1e-4 for adapters and TRL's 3e-6 for whole models."""
    critic_learning_rate: Positive | None = None
    """Of the critic's own weights, on the policy's trunk its head alone; None is ``learning_rate``."""
    lr_scheduler_type: str = "linear"
    """As in ``TrainingArguments``; it steps once an update."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """As in ``TrainingArguments``: what that schedule asks for besides."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates."""
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Positive = 1e-5
    """As in the first PPO for language models (Ziegler et al. 2019), not Adam's own 1e-8."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm, those of policy and critic each for themselves; 0 does not clip."""
    value_model: Literal["adapter", "policy_trunk"] = "adapter"
    """``adapter``: the critic has weights of its own. ``policy_trunk``: it is a head on the policy's hidden states,
    which costs one pass less forwards and backwards, and lets both losses pull at the same weights."""
    bf16: bool | None = None
    """Frozen weights and autocast in bfloat16; trained weights stay float32. None: where the machine has the
    instructions."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    # ---- what is kept and said ----
    save_steps: NotNegative = 0.1
    """Updates between checkpoints; below 1 a part of all updates; 0 saves none."""
    save_total_limit: Count = 1
    num_sample_generations: Annotated[int, Field(ge=0)] = 10
    """How often through training the page of samples gets new answers."""
    stop_on: list[str] = Field(default_factory=list)
    """Findings of the doctor that end the run, or ``all``; the others are warnings, but for ``not_a_number``, which
    always ends it."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        given = values.get("stop_on")
        for index, name in enumerate(given if isinstance(given, list) else ()):
            if name not in (*FINDINGS, "all"):
                near = did_you_mean(str(name), FINDINGS) or list_of((*FINDINGS, "all"))
                yield ("stop_on", index), f"the doctor has no finding {shown(name)}{near}"
        if values.get("lr_scheduler_type") in METRIC_SCHEDULES:
            yield (
                ("lr_scheduler_type",),
                f"{values['lr_scheduler_type']!r} waits for a metric at each step, and PPO has none; use linear, "
                "cosine or constant",
            )
        for name in ("target", "horizon"):
            if (
                not values.get("adap_kl_ctrl")
                and values.get(name) != cls.model_fields[name].default
                and name in values
            ):
                yield (name,), "has no effect without adap_kl_ctrl: true"


class PromptsRecipe(TaskRecipe):
    """Prompts that a policy answers; what is a good answer a reward says."""

    prompt_tokens: Count | None = None
    """Take the first so many tokens of each text, to be gone on from; None takes it whole."""
    ppo: dict[str, Any] = Field(default_factory=dict)
    """Options of :class:`PPOConfig` that suit these prompts; ``--set`` stands over them. Other algorithms take the
    answers' ``response_length`` and ``temperature`` alone."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("prompt", "messages", "reference"))
        for name in values.get("training") or () if isinstance(values.get("training"), dict) else ():
            yield ("training", name), "has no effect on prompts: PPO's options stand under ppo:"
        options = values.get("ppo")
        for name in options if isinstance(options, dict) else ():
            if name not in PPOConfig.model_fields:
                near = did_you_mean(name, PPOConfig.model_fields)
                yield ("ppo", name), f"unknown option of PPO {name!r}{near}"

"""The stages of a pipeline (:mod:`ptft_hf.recipes.pipeline`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ptft_hf.recipes.models import _Strict


class Stage(_Strict):
    """A run of ``ptft train``."""

    task: str
    """Catalogue name or YAML file of a recipe."""
    adapter: str = "lora/r16_all_linear"
    """Of the stages on one base, those with one method of PEFT share it in PPO, where it is loaded once."""
    model: str | None = None
    """Another checkpoint than the pipeline's: a reward model may be a model of its own."""
    set: list[str] = Field(default_factory=list)
    """``key=value`` as after ``--set``."""


class FeedbackStage(_Strict):
    """Answers of the model after fine-tuning, which people compare; the reward model learns what they prefer."""

    task: str
    """Of the family ``prompts``: what is answered."""
    prompts: Annotated[int, Field(ge=1)] | None = 200
    """The first so many of the training split; None is all."""
    answers: Annotated[int, Field(ge=2)] = 2
    """To each prompt; all pairs of them are judged."""
    judged: Annotated[int, Field(ge=1)] | None = None
    """Pairs that must be judged before the pipeline goes on; None is all."""


class PPOStage(_Strict):
    """A run of ``ptft ppo``, from the SFT stage's adapter."""

    task: str
    """Of the family ``prompts``."""
    reward: list[str] = Field(default_factory=list)
    """``[WEIGHT*]SOURCE[#LABEL]``, beside the reward stage's model, if there is one."""
    judge: str | None = None
    """Watched by the doctor, and not trained for."""
    set: list[str] = Field(default_factory=list)
    """Options of PPO as after ``--set``."""


class EvaluationStage(_Strict):
    """The policy against the model that it started from."""

    judge: str
    """A reward that is not trained for, which compares the answers."""
    task: str | None = None
    """Prompts of which the ``test`` split is answered; None is PPO's."""
    prompts: Annotated[int, Field(ge=1)] | None = 200
    """How many at most; None is all."""
    set: list[str] = Field(default_factory=list)
    """Options of PPO (``response_length``, ``temperature``) as after ``--set``; PPO's own, if it is empty."""

"""What a recipe of ``tasks/instruction`` may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from ptft_hf.recipes.faults import Fault, column_faults, generation_faults
from ptft_hf.recipes.models import TaskRecipe
from ptft_hf.recipes.summarization import GENERATION_SET_BY_THE_RUN


class InstructionRecipe(TaskRecipe):
    """Answers to instructions (supervised fine-tuning): conversations, prompts with completions, or plain texts."""

    packing: bool = False
    """Fill each input with several examples, which do not see one another. False: batches are of examples of like
    length, which wastes little already."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """``GenerationConfig`` by name, for use: ``max_new_tokens`` is 128 if absent, and the likeliest token is
    chosen."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("messages", "prompt", "completion", "text"))
        yield from generation_faults(values.get("generation"), GENERATION_SET_BY_THE_RUN)

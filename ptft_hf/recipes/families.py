"""The families of recipes: folders of the catalogue, and what their files may say."""

from __future__ import annotations

from ptft_hf.recipes.bottleneck import BottleneckRecipe
from ptft_hf.recipes.corpora import CausalLMRecipe, MaskedLMRecipe
from ptft_hf.recipes.instruction import InstructionRecipe
from ptft_hf.recipes.models import (
    AdapterRecipe,
    FullRecipe,
    ImageClassificationRecipe,
    PartialRecipe,
    SequenceClassificationRecipe,
    TaskRecipe,
    TokenClassificationRecipe,
)
from ptft_hf.recipes.preference import PreferenceRecipe
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.recipes.summarization import SummarizationRecipe

TASK_FAMILIES: dict[str, type[TaskRecipe]] = {
    "sequence_classification": SequenceClassificationRecipe,
    "image_classification": ImageClassificationRecipe,
    "token_classification": TokenClassificationRecipe,
    "masked_lm": MaskedLMRecipe,
    "causal_lm": CausalLMRecipe,
    "instruction": InstructionRecipe,
    "summarization": SummarizationRecipe,
    "preference": PreferenceRecipe,
    "prompts": PromptsRecipe,
}
ADAPTER_FAMILIES: dict[str, type[AdapterRecipe]] = {
    "full": FullRecipe,
    "partial": PartialRecipe,
    "bottleneck": BottleneckRecipe,
}
PEFT_FAMILIES = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
"""Folders whose name is not their PEFT method's in lower case (``lora`` is ``LORA``)."""

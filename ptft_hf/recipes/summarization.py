"""What a recipe of ``tasks/summarization`` may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ptft_hf.recipes.faults import Fault, column_faults, generation_faults
from ptft_hf.recipes.models import TaskRecipe

DOCUMENT = "{document}"
GENERATION_SET_BY_THE_RUN = {
    "max_length": "it counts the prompt, too: give max_new_tokens",
    "min_length": "it counts the prompt, too: give min_new_tokens",
    "num_return_sequences": "a document has one summary",
    "return_dict_in_generate": "nothing but the summary is kept",
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        "it follows from the checkpoint and its tokenizer",
    ),
}
"""``GenerationConfig`` names that a recipe may not give, and why."""


class SummarizationRecipe(TaskRecipe):
    """A short text for a long one, by encoder-decoders or by decoders."""

    prompt: str | None = None
    """What the model is given, with ``{document}`` in it; None is the usual one of its kind, see
    :data:`ptft_hf.tasks.prompting.PROMPTS`. Where the tokenizer of a decoder has a chat template, it is the
    user's turn."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """``GenerationConfig`` by name, for evaluation and use: ``max_new_tokens`` (128 if absent), ``num_beams`` (1),
    ``min_new_tokens``, ``length_penalty``, ``no_repeat_ngram_size``, ..."""
    generate_rows: Annotated[int, Field(ge=1)] | Literal["all"] = 200
    """How many validation rows are summarized between epochs, spread evenly over the split (the loss is always that
    of all rows). The final figures are always of all rows. 200: generating costs as much as many
    steps, and epochs are compared on the same rows."""
    long_documents: Literal["truncate", "split"] = "truncate"
    """What to do with documents longer than ``model.max_length``: ``truncate`` cuts them; ``split`` summarizes them
    part by part, the parts' summaries joined by newlines. Both train on the first part."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("document", "summary"))
        prompt = values.get("prompt")
        if isinstance(prompt, str) and prompt.count(DOCUMENT) != 1:
            yield ("prompt",), f"{prompt!r} must hold {DOCUMENT} once, which the document takes the place of"
        yield from _generation_faults(values.get("generation"))


def _generation_faults(generation: object) -> Iterator[Fault]:
    if not isinstance(generation, dict):
        return
    yield from generation_faults(generation, GENERATION_SET_BY_THE_RUN)
    for name in ("max_new_tokens", "num_beams"):
        value = generation.get(name, 1)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield ("generation", name), f"expected a whole number of at least 1, got {value!r}"
    if generation.get("do_sample"):
        yield (
            ("generation", "do_sample"),
            "cannot be set here: an evaluation must give the same figures twice; leave it out",
        )

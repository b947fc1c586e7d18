"""The cells: tiny random checkpoints of each architecture, a few rows for each family, the catalogue's methods."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import transformers

from ptft_hf import recipes
from tests import corpus, writers
from tests.conftest import rows
from tests.runs import splits
from tests.test_token_classification_runs import splits as tagged
from tests.tiny import SIZES, make_checkpoint

STANDARD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GROUPED = {**STANDARD, "num_key_value_heads": 2}
MORE: dict[str, dict[str, Any]] = {
    "camembert": STANDARD,
    "ernie": STANDARD,
    "megatron-bert": STANDARD,
    "roformer": {**STANDARD, "embedding_size": 32},
    "convbert": {**STANDARD, "embedding_size": 32, "conv_kernel_size": 3},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gpt_neox": STANDARD,
    "gemma2": {**GROUPED, "head_dim": 16},
    "granite": GROUPED,
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "stablelm": GROUPED,
    "mbart": SIZES["bart"],
    "mt5": SIZES["t5"],
    "pegasus": SIZES["bart"],
}
"""Beside those of ``tests.tiny``."""
ARCHITECTURES = {**SIZES, **MORE}
FAMILIES = ("sequence_classification", "token_classification", "summarization", "causal_lm", "masked_lm")
METHODS: dict[str, dict[str, Any]] = {
    "full/default": {},
    "partial/head_only": {},
    "partial/top_2_layers": {"adapter.top_layers": 1},
    "partial/bias_only": {},
    "lora/r8_attention": {},
    "lora/r16_all_linear": {},
    "lora/dora": {},
    "lora/rslora": {},
    "lora/pissa": {},
    "lora/loraplus": {},
    "adalora/r12_to_8": {},
    "ia3/default": {},
    "vera/r256": {"adapter.r": 8},
    "oft/block32": {"adapter.oft_block_size": 4},
    "ln_tuning/default": {},
    "prefix/tokens20": {},
    "prefix/reparameterised": {},
    "prompt/tokens20": {},
    "p_tuning/tokens20": {},
    "bottleneck/houlsby": {"adapter.reduction_factor": 2},
    "bottleneck/pfeiffer": {"adapter.reduction_factor": 2},
    "bottleneck/parallel": {"adapter.reduction_factor": 2},
}
"""The catalogue but for quantized bases, with fields that fit checkpoints of 32 dimensions and two layers."""
NOT_MERGED = ("full/", "partial/", "prefix/", "prompt/", "p_tuning/", "bottleneck/")


class Cell(NamedTuple):
    architecture: str
    family: str
    method: str

    @property
    def name(self) -> str:
        return " ".join(self)


@cache
def cells() -> list[Cell]:
    """All, in an order in which neighbours differ, so that any stretch of them is a fair sample."""
    found = [
        Cell(architecture, family, method)
        for architecture in ARCHITECTURES
        for family in FAMILIES
        if auto_class(architecture, family) is not None
        for method in METHODS
    ]
    return [found[i * 997 % len(found)] for i in range(len(found))]  # 997 is prime: each comes once


@cache
def auto_class(architecture: str, family: str) -> str | None:
    """The upstream class that has the family's head on this architecture, if any.

    Who writes is a decoder without a head for masks, or an encoder-decoder: upstream has causal heads for encoders
    and for halves of encoder-decoders, too, and nobody writes with these. XLNet's is of permutations. Nor are masks
    filled by an encoder-decoder, which may fill one with any number of tokens.
    """
    config = transformers.AutoConfig.for_model(architecture)
    two = config.is_encoder_decoder
    masked, causal, both = (
        type(config) in getattr(transformers, f"AutoModelFor{head}")._model_mapping
        for head in ("MaskedLM", "CausalLM", "Seq2SeqLM")
    )
    causal = causal and not masked and not two and architecture != "xlnet"
    if family == "summarization":
        return "AutoModelForSeq2SeqLM" if two and both else "AutoModelForCausalLM" if causal else None
    if family == "causal_lm":
        return "AutoModelForCausalLM" if causal else None
    if family == "masked_lm":
        return "AutoModelForMaskedLM" if masked and not two else None
    name = "AutoModelFor" + family.title().replace("_", "")
    return name if type(config) in getattr(transformers, name)._model_mapping else None


def checkpoint(cell: Cell, root: Path) -> Path:
    """A folder of random weights, with a head where the family goes on from a language model's."""
    with_head = cell.family not in ("sequence_classification", "token_classification")
    auto = auto_class(cell.architecture, cell.family) if with_head else "AutoModel"
    assert auto is not None
    folder = root / f"{cell.architecture}-{auto}"
    if not (folder / "tokenizer_config.json").exists():
        make_checkpoint(cell.architecture, folder, sizes=ARCHITECTURES[cell.architecture], auto=auto)
    return folder


@cache
def data(family: str) -> datasets.DatasetDict:
    if family == "sequence_classification":
        return splits(rows(16, 1), validation=rows(8, 2), test=rows(8, 3))
    if family == "token_classification":
        return tagged(16)
    return writers.splits(16) if family == "summarization" else corpus.corpus(train=2, paragraphs=12)


def recipe(family: str) -> recipes.TaskRecipe:
    fields = {"generation": {"max_new_tokens": 4}} if family == "summarization" else {}
    return recipes.task_from_dict({"name": "conformance", "family": family, **fields})

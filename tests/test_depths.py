"""How deep each parameter lies: by hand for every architecture, and the same under PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptft_hf import adapters, models
from ptft_hf.recipes import load_adapter
from tests.conftest import rows
from tests.runs import build, splits
from tests.tiny import SIZES

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Checkpoint = Callable[[str], Path]

STACKS = {
    "bert": [("bert.encoder", 3)],
    "roberta": [("roberta.encoder", 2)],
    "xlm-roberta": [("roberta.encoder", 2)],
    "distilbert": [("distilbert.transformer", 2)],
    "albert": [("albert.encoder", 1)],
    "electra": [("electra.encoder", 2)],
    "deberta": [("deberta.encoder", 2)],
    "deberta-v2": [("deberta.encoder", 2)],
    "modernbert": [("model", 2)],
    "mpnet": [("mpnet.encoder", 2)],
    "xlnet": [("transformer", 2)],
    "xlm": [("transformer", 2)],
    "gpt2": [("transformer", 2)],
    "llama": [("model", 2)],
    "mistral": [("model", 2)],
    "qwen2": [("model", 2)],
    "qwen3": [("model", 2)],
    "gemma": [("model", 2)],
    "opt": [("model.decoder", 2)],
    "bart": [("model.encoder", 2), ("model.decoder", 2)],
    "t5": [("transformer.encoder", 2), ("transformer.decoder", 2)],
}
DEPTHS = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": 0,
        "bert.embeddings.LayerNorm.weight": 0,
        "bert.encoder.layer.0.attention.self.query.weight": 1,
        "bert.encoder.layer.2.output.dense.bias": 3,
        "bert.pooler.dense.weight": 3,
        "classifier.weight": 4,
    },
    "albert": {
        "albert.encoder.embedding_hidden_mapping_in.weight": 0,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": 1,
        "albert.pooler.weight": 1,
        "classifier.weight": 2,
    },
    "electra": {"electra.embeddings_project.weight": 0, "classifier.dense.weight": 3},
    "deberta-v2": {"deberta.encoder.rel_embeddings.weight": 0, "pooler.dense.weight": 3},
    "mpnet": {"mpnet.encoder.relative_attention_bias.weight": 0},
    "modernbert": {
        "model.embeddings.norm.weight": 0,
        "model.layers.0.attn.Wqkv.weight": 1,
        "model.final_norm.weight": 2,
        "head.dense.weight": 3,
    },
    "xlnet": {
        "transformer.mask_emb": 0,
        "transformer.layer.0.rel_attn.q": 1,
        "sequence_summary.summary.weight": 3,
        "logits_proj.weight": 3,
    },
    "xlm": {  # its attentions and feed-forwards are in lists of their own
        "transformer.layer_norm_emb.weight": 0,
        "transformer.ffns.0.lin1.weight": 1,
        "transformer.layer_norm2.0.weight": 1,
        "transformer.attentions.1.q_lin.weight": 2,
        "sequence_summary.summary.weight": 3,
    },
    "gpt2": {"transformer.wpe.weight": 0, "transformer.h.0.ln_1.weight": 1, "transformer.ln_f.weight": 2},
    "llama": {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "score.weight": 3},
    "opt": {"model.decoder.layers.0.fc1.weight": 1, "model.decoder.final_layer_norm.weight": 2},
    "bart": {
        "model.shared.weight": 0,
        "model.encoder.layernorm_embedding.weight": 0,
        "model.encoder.layers.1.fc1.weight": 2,
        "model.decoder.embed_positions.weight": 0,
        "model.decoder.layernorm_embedding.weight": 0,
        "model.decoder.layers.0.fc1.weight": 3,
        "model.decoder.layers.1.fc1.weight": 4,
        "classification_head.dense.weight": 5,
    },
    "t5": {
        "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 1,
        "transformer.encoder.final_layer_norm.weight": 2,
        "transformer.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 3,
        "transformer.decoder.final_layer_norm.weight": 4,
        "classification_head.out_proj.bias": 5,
    },
}


def load(folder: Path) -> models.LoadedModel:
    return models.load_model(
        str(folder), "AutoModelForSequenceClassification", config={"num_labels": 2, "pad_token_id": 0}
    )


@pytest.mark.parametrize("architecture", SIZES)
def test_the_stacks_of_layers_are_found(architecture: str, checkpoint: Checkpoint) -> None:
    assert models.stacks_of(load(checkpoint(architecture)).model) == STACKS[architecture]


@pytest.mark.parametrize("architecture", SIZES)
def test_every_depth_from_the_embeddings_to_the_head_is_inhabited(
    architecture: str, checkpoint: Checkpoint
) -> None:
    loaded = load(checkpoint(architecture))
    depth = models.depths(loaded.model, loaded.head)
    layers = sum(size for _, size in STACKS[architecture])
    assert set(depth.values()) == set(range(layers + 2))
    assert {name for name, d in depth.items() if d == layers + 1} >= loaded.new
    embeddings = loaded.model.get_input_embeddings().weight
    assert {depth[n] for n, p in loaded.model.named_parameters() if p is embeddings} == {0}


@pytest.mark.parametrize("architecture", DEPTHS)
def test_depths_are_as_worked_out_by_hand(architecture: str, checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint(architecture))
    depth = models.depths(loaded.model, loaded.head)
    assert {name: depth[name] for name in DEPTHS[architecture]} == DEPTHS[architecture]


@pytest.mark.parametrize("architecture", ["bert", "bart", "xlm", "gpt2"])
def test_an_adapter_lies_where_the_weight_beside_it_lies(architecture: str, checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint(architecture))
    plain = models.depths(loaded.model, loaded.head)
    method = adapters.build(load_adapter("lora/r16_all_linear"))
    wrapped: Any = method.attach(loaded.model, loaded.head, "SEQ_CLS")
    depth = models.depths(wrapped, loaded.head)
    checked = 0
    for name, d in depth.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if ".lora_" in name:
            assert d == plain[f"{module}.weight"], name
            checked += 1
        elif ".modules_to_save." in name:
            assert d == max(plain.values()), name
            checked += 1
    assert checked == sum(p.requires_grad for p in wrapped.parameters())


def test_learning_rates_fall_with_depth_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    method = {"layerwise_lr_decay": 0.5, "head_learning_rate": 0.3}
    settings = {f"adapter.{name}": value for name, value in method.items()} | {"learning_rate": 0.08}
    trainer, ready = build(checkpoint("bert"), splits(rows(16)), tmp_path / "run", **settings)
    names = {id(p): name for name, p in ready.model.named_parameters()}
    groups = trainer.parameter_groups(ready.model, 0.08)
    rate = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rate.keys() == set(names.values())
    # 3 layers, the head at depth 4: 0.08 x 0.5 ** (4 - depth)
    assert rate["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.005)
    assert rate["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.01)
    assert rate["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(0.02)
    assert rate["bert.encoder.layer.2.output.dense.bias"] == pytest.approx(0.04)
    assert rate["bert.pooler.dense.weight"] == pytest.approx(0.04)
    assert rate["classifier.weight"] == rate["classifier.bias"] == 0.3

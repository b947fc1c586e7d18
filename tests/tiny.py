"""Tiny random checkpoints of many architectures, built without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # encoders
    "bert": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48),
    "roberta": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
    "xlm-roberta": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
    "distilbert": dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "albert": dict(
        hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    ),
    "electra": dict(
        hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    ),
    "deberta": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=32,
    ),
    "deberta-v2": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=32,
    ),
    "modernbert": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        global_attn_every_n_layers=2,
        local_attention=16,
    ),
    "mpnet": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
    "xlnet": dict(d_model=32, n_layer=2, n_head=2, d_inner=48),
    "xlm": dict(emb_dim=32, n_layers=2, n_heads=2),
    # decoders
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2),
    "llama": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
    ),
    "mistral": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
    ),
    "qwen2": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
    ),
    "qwen3": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=16,
    ),
    "gemma": dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=16,
    ),
    "opt": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    ),
    # encoder-decoders
    "bart": dict(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
    "t5": dict(d_model=32, num_layers=2, num_decoder_layers=2, num_heads=2, d_kv=16, d_ff=48),
}
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "mask": 4, "cls": 1, "sep": 2}
TEXT = (
    "the a this film story plot actor scene was is very quite really much so good fine great lovely bad poor "
    "awful dull plain usual common normal 0 1 2 3 4 5 6 7 8 9 . , text another short longer than first one"
)


def make_tokenizer(name: str) -> Any:
    """WordPiece over a few words and all letters; with begin and end marks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *TEXT.split(), *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    padding = {} if name in ("gpt2", "llama") else {"pad_token": "<pad>"}  # as their real tokenizers: without
    inputs = ["input_ids", "attention_mask"] + (
        ["token_type_ids"] if name in ("bert", "albert", "electra") else []
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=64,
        model_input_names=inputs,
        **padding,
    )


def make_checkpoint(
    name: str, folder: Path, *, sizes: dict[str, Any] | None = None, auto: str = "AutoModel", **overrides: Any
) -> Path:
    """Save a random checkpoint, like the ones people start from: without a task head, unless ``auto`` has one."""
    import torch
    import transformers

    tokenizer = make_tokenizer(name)
    ids = {f"{key}_token_id": value for key, value in SPECIAL.items() if key in ("pad", "bos", "eos")}
    if name in ("gpt2", "llama"):
        del ids["pad_token_id"]
    positions = "n_positions" if name == "gpt2" else "max_position_embeddings"
    ids |= {} if name in ("t5", "mt5", "xlnet") else {positions: 72}
    if transformers.AutoConfig.for_model(name).is_encoder_decoder:
        ids |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    config = transformers.AutoConfig.for_model(
        name, vocab_size=len(tokenizer), **{**(sizes or SIZES[name]), **ids, **overrides}
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

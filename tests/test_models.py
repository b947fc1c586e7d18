"""Loading checkpoints: what is refused, what is new, how long inputs may be, where they are padded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from ptft_hf import models
from ptft_hf.errors import ModelError
from ptft_hf.models.caching import PreallocatedLayer, empty_cache
from tests.tiny import SIZES, make_checkpoint, make_tokenizer

Checkpoint = Callable[[str], Path]
CLASSIFIER = "AutoModelForSequenceClassification"


def load(folder: Path, labels: int = 2, **options: Any) -> models.LoadedModel:
    return models.load_model(str(folder), CLASSIFIER, config={"num_labels": labels}, **options)


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy with other values in its ``config.json``."""
    shutil.copytree(folder, to)
    values = json.loads((to / "config.json").read_text("utf-8"))
    (to / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
    return to


# ---- what is refused ----


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent: no such folder here, and not to be had from the Hub"):
        load(tmp_path / "absent")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ModelError, match="file: a file; a checkpoint is a folder"):
        load(tmp_path / "file")


def test_a_folder_without_config_is_no_checkpoint_and_its_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no config.json, so it is no checkpoint; it holds .*notes.txt"):
        load(tmp_path)


def test_half_a_file_of_weights_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    broken = copied(checkpoint("bert"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="broken: the folder cannot be read as a checkpoint"):
        load(broken)


def test_an_architecture_without_this_head_is_named(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"has no {CLASSIFIER} for the architecture 'vit'"):
        load(tmp_path)


def test_an_unknown_architecture_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    strange = copied(checkpoint("bert"), tmp_path / "strange", model_type="bortolotti")
    with pytest.raises(ModelError, match="bortolotti"):
        load(strange)


@pytest.mark.parametrize("name", ["float33", "int8", "nn"])
def test_what_is_no_dtype_is_named(name: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match=f"model.dtype: '{name}' is no dtype"):
        load(checkpoint("bert"), dtype=name)


def test_a_trunk_of_other_sizes_is_refused_not_made_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wrong = copied(checkpoint("bert"), tmp_path / "wrong", intermediate_size=64)
    with pytest.raises(ModelError, match=r"lacks \(or has in other sizes\) 9 weights of the trunk"):
        load(wrong)  # 3 layers x (intermediate weight, intermediate bias, output weight)


def test_the_weights_of_another_architecture_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wrong = copied(checkpoint("bert"), tmp_path / "wrong")
    shutil.copy(checkpoint("gpt2") / "model.safetensors", wrong)
    with pytest.raises(ModelError, match=r"do its config.json and its weights belong together\?"):
        load(wrong)


def test_a_missing_layer_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights of the trunk, such as bert.encoder.layer.3"):
        load(copied(checkpoint("bert"), tmp_path / "deeper", num_hidden_layers=4))


# ---- what is new ----


def test_a_checkpoint_without_a_head_gets_a_new_one(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("bert"))
    assert loaded.new == {"classifier.weight", "classifier.bias"}
    assert loaded.head == ("classifier",)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training


def test_a_head_for_as_many_labels_is_kept_and_still_a_head(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = load(checkpoint("distilbert"), 2).model
    first.save_pretrained(tmp_path)
    again = load(tmp_path, 2)
    assert again.new == set()
    assert again.head == ("pre_classifier", "classifier")
    assert torch.equal(again.model.classifier.weight, first.classifier.weight)


def test_a_head_for_another_number_of_labels_is_made_anew(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = load(checkpoint("distilbert"), 2).model
    first.save_pretrained(tmp_path)
    again = load(tmp_path, 3)
    assert again.new == {"classifier.weight", "classifier.bias"}  # the layer before it fits
    assert again.model.classifier.weight.shape == (3, 32)
    assert torch.equal(again.model.pre_classifier.weight, first.pre_classifier.weight)


@pytest.mark.parametrize("architecture", SIZES)
def test_no_weight_of_the_trunk_is_new(architecture: str, checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint(architecture))
    assert loaded.new
    assert all(name.startswith(tuple(f"{module}." for module in loaded.head)) for name in loaded.new)
    trunk = {id(p) for p in models.trunk_of(loaded.model).parameters()}
    assert not trunk & {id(p) for name, p in loaded.model.named_parameters() if name in loaded.new}


# ---- fingerprint ----


def test_the_fingerprint_is_of_what_the_checkpoint_holds(checkpoint: Checkpoint) -> None:
    torch.manual_seed(1)
    one = load(checkpoint("bert"))
    torch.manual_seed(2)
    other = load(checkpoint("bert"))
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != load(checkpoint("bert"), dtype="bfloat16").fingerprint
    assert one.fingerprint != load(checkpoint("roberta")).fingerprint


def test_one_bit_of_one_weight_changes_the_fingerprint(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint("bert"))
    weight = loaded.model.bert.encoder.layer[1].output.dense.bias
    with torch.no_grad():
        weight.view(torch.int32)[0] ^= 1
    assert models.fingerprint(loaded.model, loaded.new) != loaded.fingerprint


# ---- references ----


def test_a_revision_is_split_off_unless_the_whole_is_a_path(tmp_path: Path) -> None:
    assert models.split_revision("org/name@v1") == ("org/name", "v1")
    assert models.split_revision("org/name") == ("org/name", None)
    (tmp_path / "a@b").mkdir()
    assert models.split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)


# ---- length ----


# 72 positions in each configuration; RoBERTa counts from its padding id (0 here) + 1, MPNet from 1 + 1.
@pytest.mark.parametrize(
    ("architecture", "limit"),
    [
        ("bert", 72),
        ("roberta", 71),
        ("xlm-roberta", 71),
        ("mpnet", 70),
        ("bart", 72),
        ("opt", 72),
        ("gpt2", 72),
    ],
)
def test_the_longest_input_is_the_last_that_the_positions_have_room_for(
    architecture: str, limit: int, checkpoint: Checkpoint
) -> None:
    model = load(checkpoint(architecture)).model
    tokenizer = make_tokenizer(architecture)
    models.ensure_padding(model, tokenizer)
    tokenizer.model_max_length = 10**30  # what a tokenizer says that knows no limit
    assert models.longest_input(model, tokenizer, None) == limit
    assert models.longest_input(model, tokenizer, limit) == limit
    with pytest.raises(ModelError, match=f"max_length: {limit + 1} is more than the {limit} positions"):
        models.longest_input(model, tokenizer, limit + 1)
    ids = torch.tensor([[9] * (limit - 1) + [2]])
    assert torch.isfinite(model(input_ids=ids)[0]).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[9] * limit + [2]]))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("t5", {"n_positions": 72}), ("xlnet", {}), ("deberta-v2", {"position_biased_input": False})],
)
def test_relative_positions_set_no_limit(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = load(make_checkpoint(architecture, tmp_path, **config)).model
    tokenizer = make_tokenizer(architecture)
    assert models.longest_input(model, tokenizer, 100) == 100
    assert torch.isfinite(model(input_ids=torch.tensor([[1, *[9] * 98, 2]]))[0]).all()
    tokenizer.model_max_length = 10**30
    assert models.longest_input(model, tokenizer, None) == models.DEFAULT_MAX_LENGTH


def test_a_rotary_model_has_the_positions_it_was_made_for(checkpoint: Checkpoint) -> None:
    model, tokenizer = load(checkpoint("llama")).model, make_tokenizer("llama")
    with pytest.raises(ModelError, match="73 is more than the 72 positions"):
        models.longest_input(model, tokenizer, 73)
    assert models.longest_input(model, tokenizer, None) == 64  # the tokenizer's own limit


# ---- padding ----

TEXTS = ["good film", "the story was really very bad and the plot is awful so much", "a"]


@pytest.mark.parametrize("architecture", SIZES)
def test_a_row_s_logits_do_not_depend_on_its_batch(architecture: str, checkpoint: Checkpoint) -> None:
    model, tokenizer = load(checkpoint(architecture)).model, make_tokenizer(architecture)
    models.ensure_padding(model, tokenizer)
    with torch.no_grad():
        together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))[0]
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt"))[0] for text in TEXTS])
    spread = (alone[0] - alone[1]).abs().max()  # another text gives other logits
    assert (together - alone).abs().max() < 0.01 * spread


def test_xlnet_padded_on_the_right_pools_padding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Upstream's summary takes the last position, whatever stands there."""
    model, tokenizer = load(checkpoint("xlnet")).model, make_tokenizer("xlnet")
    tokenizer.padding_side = "right"
    with torch.no_grad():
        together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"))[0]
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt"))[0] for text in TEXTS])
    assert (together - alone).abs().max() > (alone[0] - alone[1]).abs().max()
    models.ensure_padding(model, tokenizer)
    assert tokenizer.padding_side == "left"
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).padding_side == "left"  # as the finished run is used


def test_a_decoder_without_a_padding_token_takes_its_end_token_and_says_so(checkpoint: Checkpoint) -> None:
    model, tokenizer = load(checkpoint("gpt2")).model, make_tokenizer("gpt2")
    assert tokenizer.pad_token is None
    note = models.ensure_padding(model, tokenizer)
    assert note == "the tokenizer has no padding token: its end token '</s>' is used"
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id == 2
    assert models.ensure_padding(model, tokenizer) is None


def test_a_tokenizer_with_neither_padding_nor_end_token_is_refused(checkpoint: Checkpoint) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding token nor an end token"):
        models.ensure_padding(load(checkpoint("gpt2")).model, tokenizer)


def test_a_padding_token_that_the_model_has_no_embedding_for_is_refused(checkpoint: Checkpoint) -> None:
    tokenizer = make_tokenizer("gpt2")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    with pytest.raises(
        ModelError, match=f"'<added>' is number {size}, and the model has embeddings for {size}"
    ):
        models.ensure_padding(load(checkpoint("gpt2")).model, tokenizer)


# ---- the cache of keys and values ----


def test_a_preallocated_layer_holds_what_upstream_s_holds() -> None:
    """Through everything that upstream does to a layer between two tokens."""
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    changes: list[Callable[[Any], Any]] = [
        lambda layer: None,
        lambda layer: layer.reorder_cache(torch.tensor([1, 0, 2, 2])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_select_indices(torch.arange(3)),
        lambda layer: layer.batch_select_indices(slice(0, 2)),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reset(),
    ]
    rows = 4
    torch.manual_seed(0)
    for change in changes:
        for length in (5, *[1] * 70):
            new = torch.randn(2, rows, 2, length, 4)
            found, expected = ours.update(*new), theirs.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        change(ours), change(theirs)
        rows = rows if theirs.keys is None else len(theirs.keys)
        assert theirs.keys is None or torch.equal(ours.keys, theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_preallocated_layer_copies_what_it_has_only_when_its_room_is_full() -> None:
    layer, places, kept = PreallocatedLayer(), set(), []
    for _ in range(129):
        layer.update(*torch.randn(2, 1, 1, 1, 4))
        places.add(layer.keys.data_ptr())
        kept.append(layer.keys)  # so that no later room takes its place
    assert len(places) == 2


@pytest.mark.parametrize(
    ("architecture", "has"), [("llama", True), ("gpt2", True), ("mistral", False), ("bart", False)]
)
def test_only_plain_layers_are_replaced(architecture: str, has: bool, checkpoint: Checkpoint) -> None:
    """Mistral's attend to a window."""
    auto: Any = getattr(transformers, f"AutoModelFor{'Seq2SeqLM' if architecture == 'bart' else 'CausalLM'}")
    model = auto.from_pretrained(checkpoint(architecture))
    cache = empty_cache(model)
    assert (cache is not None) is has
    assert cache is None or len(cache.layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("auto", ["AutoModelForSequenceClassification", "AutoModelForCausalLM"])
def test_a_model_of_a_gguf_file_is_rebuilt_whether_it_writes_or_not(auto: str, checkpoint: Checkpoint) -> None:
    from ptft_hf.models.loading import unpacked

    model = models.load_model(str(checkpoint("llama")), auto, config={}).model
    model.config.quantization_config = object()  # as transformers leaves it when it has unpacked such a file
    plain = unpacked(model)
    assert not hasattr(plain.config, "quantization_config")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert hasattr(plain, "generation_config") == (auto == "AutoModelForCausalLM")


def test_what_an_architecture_fixes_stays_fixed(tmp_path: Path) -> None:
    """Upstream's from_pretrained forgets that Pegasus' positions are no weights to be trained."""
    options = {f"{side}_{name}": size for side in ("encoder", "decoder")
               for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = transformers.PegasusConfig(vocab_size=50, d_model=16, max_position_embeddings=20, **options)
    transformers.PegasusForConditionalGeneration(config).save_pretrained(tmp_path)
    model = transformers.PegasusForConditionalGeneration.from_pretrained(tmp_path)
    fixed = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert all(parameter.requires_grad for parameter in model.parameters())  # upstream's
    model.requires_grad_(False)
    assert models.unfreeze(model) is model
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == fixed
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

"""PEFT's methods: each recipe trained, proven, reloaded; what upstream gets wrong, and that we do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file

import ptft_hf
from ptft_hf import adapters, models
from ptft_hf.errors import AdapterError, ModelError, RecipeError
from ptft_hf.recipes import PeftRecipe, load_adapter
from tests.conftest import rows
from tests.runs import build, short_run, splits
from tests.test_round_trip import load_plainly

pytestmark = [
    # PEFT asks a transformers model for an attribute that was renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Loaded by PEFT alone: false alarms, which our path keeps to itself.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
Checkpoint = Callable[[str], Path]
METHODS = (
    "lora/dora",
    "lora/rslora",
    "lora/pissa",
    "lora/loraplus",
    "adalora/r12_to_8",
    "ia3/default",
    "vera/r256",
    "oft/block32",
    "ln_tuning/default",
    "prompt/tokens20",
    "p_tuning/tokens20",
)
SMALL = {"oft/block32": {"adapter.oft_block_size": 4}, "vera/r256": {"adapter.r": 8}}
TEXTS = ["a good film", "this story was really very bad and the plot is so awful", "dull"]


def run(base: Path, method: Any, folder: Path, resume: bool = False, **settings: Any) -> Any:
    small = SMALL.get(method, {}) if isinstance(method, str) else {}
    steps = {"max_steps": 6, "learning_rate": 0.01, "bf16": False}
    return short_run(base, method, folder, count=24, resume=resume, **{**steps, **small, **settings})


def attached(base: Path, method: Any, **overrides: Any) -> Any:
    loaded = models.load_model(str(base), "AutoModelForSequenceClassification", config={"num_labels": 2})
    found = load_adapter(method, overrides) if isinstance(method, str) else method
    return adapters.build(found).attach(loaded.model, loaded.head, "SEQ_CLS")


def logits(trained: Any) -> torch.Tensor:
    batch = trained.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return trained.model(**batch)[0]  # type: ignore[no-any-return]


# ---- every recipe ----


def test_casts_are_left_out_under_autocast_where_there_are_any(checkpoint: Checkpoint) -> None:
    """PEFT's own context fails on VeRA's layers and on tuned norms, which know no such casts."""
    for method, fails in (("lora/r8_attention", False), ("vera/r256", True), ("ln_tuning/default", True)):
        recipe = load_adapter(method)
        loaded = models.load_model(
            str(checkpoint("bert")), "AutoModelForSequenceClassification", config={"num_labels": 2}
        )
        method_ = adapters.build(recipe)
        wrapped = method_.attach(loaded.model, loaded.head, "SEQ_CLS")
        if fails:
            with pytest.raises(AttributeError), disable_input_dtype_casting(wrapped):
                pass
        switches = [m for m in wrapped.modules() if hasattr(m, "cast_input_dtype_enabled")]
        assert bool(switches) is not fails
        with method_.while_training(wrapped, autocast=True):
            assert not any(m.cast_input_dtype_enabled for m in switches)
        assert all(m.cast_input_dtype_enabled for m in switches)
        with method_.while_training(wrapped, autocast=False):
            assert all(m.cast_input_dtype_enabled for m in switches)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_a_recipe_trains_reloads_and_predicts(
    method: str, name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trained = run(checkpoint(name), method, tmp_path / "run")
    assert trained.run["proof"] == {"max_difference": 0.0, "examples": 8}
    expected = logits(trained)
    assert torch.equal(logits(ptft_hf.load(tmp_path / "run")), expected)
    assert {p["label"] for p in trained.predict(TEXTS)} <= {"neg", "pos"}
    trained.model = load_plainly(tmp_path / "run", checkpoint(name))
    assert torch.equal(logits(trained), expected)


def test_the_catalogue_names_a_rate_and_a_paper_for_every_peft_recipe() -> None:
    root = Path(ptft_hf.__file__).parents[1] / "adapters"
    files = [f for f in root.glob("*/*.yaml") if f.parent.name not in ("full", "partial")]
    assert {f"{f.parent.name}/{f.stem}" for f in files} >= {*METHODS}
    for file in files:
        method = load_adapter(f"{file.parent.name}/{file.stem}")
        assert method.training["learning_rate"] > 0
        assert any(line.startswith("# ") and " 20" in line for line in file.read_text("utf-8").splitlines())


# ---- heads ----


@pytest.mark.parametrize("method", ["prompt/tokens20", "p_tuning/tokens20", "ia3/default"])
def test_the_head_is_saved_by_what_was_new(method: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """DeBERTa's head is its pooler too, which PEFT does not know."""
    run(checkpoint("deberta-v2"), method, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("pooler" in name for name in saved)
    assert any("classifier" in name for name in saved)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bart", "cannot be run"), ("gpt2", "the length of its neighbours"), ("llama", "neighb")],
)
def test_prompts_that_would_be_wrong_are_refused_before_training(
    name: str, reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"prompt/tokens20: PROMPT_TUNING on .*{reason}"):
        run(checkpoint(name), "prompt/tokens20", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_takes_its_positions_from_the_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), "prompt/tokens20", tmp_path / "run")  # 72 positions
    assert trained.run["model"]["max_length"] == 72 - 20
    trained.predict([" ".join(["film"] * 100)])
    with pytest.raises(ModelError, match=r"more than the 52 positions .* 20 of the adapter's prompt"):
        run(checkpoint("bert"), "prompt/tokens20", tmp_path / "new", **{"model.max_length": 60})


def test_a_prompt_is_trained_further_which_peft_refuses(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint("bert"), "prompt/tokens20", tmp_path / "first")
    run(checkpoint("bert"), tmp_path / "first", tmp_path / "second", max_steps=1, learning_rate=1e-12)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert one.keys() == other.keys()
    assert any("classifier" in name for name in one)
    assert any("prompt" in name for name in one)
    assert all(torch.allclose(one[name], other[name], atol=1e-9) for name in one)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint("bert"))
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(base, str(tmp_path / "first"), is_trainable=True)


def test_an_adapter_can_be_taken_out_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The base under it and its first head; PEFT fails beside a head of several layers."""
    for method in ("ia3/default", "prefix/tokens20", "prompt/tokens20", "bottleneck/pfeiffer"):
        wrapped = attached(checkpoint("roberta"), method)
        plain = models.load_model(
            str(checkpoint("roberta")), "AutoModelForSequenceClassification", config={"num_labels": 2}
        ).model
        unloaded = adapters.unload(wrapped)
        assert type(unloaded) is type(plain)
        assert unloaded.config._attn_implementation == plain.config._attn_implementation
        assert unloaded.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(unloaded.state_dict())
        ids = torch.tensor([[1, 9, 10, 2]])
        assert torch.equal(plain.eval()(ids).logits, unloaded.eval()(ids).logits)
        assert all(p.requires_grad for p in unloaded.parameters())


# ---- merging ----


@pytest.mark.parametrize(
    "method", ["ia3/default", "oft/block32", "vera/r256", "lora/dora", "lora/pissa", "ln_tuning/default"]
)
def test_what_can_be_merged_is_merged_under_a_composite_head(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trained = run(checkpoint("roberta"), method, tmp_path / "run")
    merged = trained.merge()
    assert models.adapter_kind(merged.model) is None
    assert (logits(merged) - logits(trained)).abs().max() < 1e-5
    if method in ("ia3/default", "oft/block32", "vera/r256"):
        with pytest.raises(AttributeError, match=r"RobertaClassificationHead.* no attribute 'weight'"):
            load_plainly(tmp_path / "run", checkpoint("roberta")).merge_and_unload()


# ---- PiSSA ----


def test_peft_reloads_a_pissa_of_random_svd_on_another_base(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its decomposition is made anew, and not the same; ours, below, is on the unchanged base."""
    method = PeftRecipe(
        name="mine", family="lora", peft_type="LORA", config={"init_lora_weights": "pissa_niter_4", "r": 8}
    )
    torch.manual_seed(1)
    wrapped = attached(checkpoint("bert"), method).eval()
    ids = torch.tensor([[1, 9, 10, 2]])
    wrapped.save_pretrained(tmp_path / "plain")
    models.plain_model(wrapped).config.save_pretrained(tmp_path / "plain")
    again = load_plainly(tmp_path / "plain", checkpoint("bert"))
    assert (
        again(input_ids=ids).logits - wrapped(input_ids=ids).logits
    ).abs().max() > 1e-5  # rounding is 1e-8


def test_a_trained_pissa_is_a_plain_lora_of_twice_the_rank_on_the_unchanged_base(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trained = run(checkpoint("bert"), "lora/pissa", tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text("utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (16, 16, True)
    base = transformers.AutoModel.from_pretrained(checkpoint("bert"))
    query = models.plain_model(trained.model).bert.encoder.layer[0].attention.self.query
    assert torch.equal(query.base_layer.weight, base.encoder.layer[0].attention.self.query.weight)


def test_the_fast_svd_s_iterations_stand_in_the_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """``pissa_niter_16``, which is documented upstream and missing in its annotation."""
    fast = {"adapter.init_lora_weights": "pissa_niter_4"}
    trained = run(checkpoint("bert"), "lora/r8_attention", tmp_path / "run", **fast)
    assert trained.run["proof"]["max_difference"] == 0.0
    for wrong in ("pissa_niter_", "pissa_niter_x", "pissa_niter_0"):
        with pytest.raises(RecipeError, match=f"init_lora_weights: '{wrong}' is not right"):
            run(checkpoint("bert"), "lora/r8_attention", tmp_path / wrong, **{next(iter(fast)): wrong})


def test_pissa_begins_where_the_base_is(checkpoint: Checkpoint) -> None:
    ids = torch.tensor([[1, 9, 10, 2]])
    wrapped = attached(checkpoint("bert"), "lora/pissa").eval()
    weight = models.plain_model(wrapped).bert.encoder.layer[0].attention.self.query.base_layer.weight.clone()
    loaded = models.load_model(
        str(checkpoint("bert")), "AutoModelForSequenceClassification", config={"num_labels": 2}
    )
    before = loaded.model.bert(input_ids=ids)[0]
    after = models.plain_model(wrapped).bert(input_ids=ids)[0]
    assert (before - after).abs().max() < 1e-5
    assert not torch.equal(weight, loaded.model.bert.encoder.layer[0].attention.self.query.weight)


# ---- AdaLoRA ----


def test_adalora_s_ranks_are_cut_in_the_run_s_steps(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(
        checkpoint("bert"), "adalora/r12_to_8", tmp_path / "run", max_steps=20, load_best_model_at_end=False
    )
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text("utf-8"))
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (20, 2, 8)
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 8 * len(ranks) == 8 * 6
    sizes = [m.lora_A["default"].shape[0] for m in trained.model.modules() if hasattr(m, "lora_E")]
    assert sorted(sizes) == sorted(ranks)


def test_a_loaded_adalora_takes_labels_which_fails_in_peft(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), "adalora/r12_to_8", tmp_path / "run")
    inputs = {"input_ids": torch.tensor([[1, 9, 2]]), "labels": torch.tensor([0])}
    assert torch.isfinite(trained.model(**inputs).loss)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        load_plainly(tmp_path / "run", checkpoint("bert"))(**inputs)


def test_the_penalty_is_the_one_that_peft_adds_to_a_model_s_own_loss(checkpoint: Checkpoint) -> None:
    from ptft_hf.adapters.peft_training import orthogonal_factors, penalty

    model = attached(checkpoint("bert"), "adalora/r12_to_8").eval()
    inputs = {"input_ids": torch.tensor([[1, 9, 2]]), "labels": torch.tensor([0])}
    plain = torch.nn.functional.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
    assert torch.allclose(model(**inputs).loss - plain, 0.1 * penalty(orthogonal_factors(model)), atol=1e-6)


def test_adalora_s_steps_must_leave_room(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"9 first and 3 last steps leave none of the run's 6"):
        run(
            checkpoint("bert"),
            "adalora/r12_to_8",
            tmp_path / "a",
            **{"adapter.tinit": 9, "adapter.tfinal": 3},
        )
    with pytest.raises(AdapterError, match="total_step: 99 is not the 6 steps"):
        run(checkpoint("bert"), "adalora/r12_to_8", tmp_path / "b", **{"adapter.total_step": 99})


# ---- LoRA+ ----


def test_loraplus_has_two_rates(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = splits(rows(16, 1), validation=rows(8, 2), test=rows(8, 3))
    trainer, ready = build(checkpoint("bert"), data, tmp_path, adapter="lora/loraplus", learning_rate=1e-4)
    rates = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    parts = {name: round(rates[id(p)], 9) for name, p in ready.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in parts.items() if "lora_A" in name} == {1e-4}
    assert {rate for name, rate in parts.items() if "lora_B" in name} == {16e-4}


def test_loraplus_is_lora_s(checkpoint: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="loraplus_lr_ratio: is of LoRA alone"):
        load_adapter("ia3/default", {"loraplus_lr_ratio": 4.0})
    with pytest.raises(RecipeError, match="cannot be combined with loraplus_lr_ratio"):
        load_adapter("lora/loraplus", {"layerwise_lr_decay": 0.9})


# ---- resuming ----


@pytest.mark.parametrize("method", ["adalora/r12_to_8", "p_tuning/tokens20", "lora/pissa"])
def test_a_checkpoint_holds_what_is_trained(method: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """PEFT saves p-tuning without its network and AdaLoRA with its ranks cut."""
    from ptft_hf.adapters.states import load_state, save_state

    one, other = attached(checkpoint("bert"), method), attached(checkpoint("bert"), method)
    names = frozenset(name for name, p in one.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_state(one, names, tmp_path)
    load_state(other, tmp_path)
    values = dict(other.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in one.named_parameters() if name in names)


def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of each kind of adapter one whose checkpoints hold more than is needed for use, or what PEFT cannot load."""
    for method in ("adalora/r12_to_8", "p_tuning/tokens20", "prefix/reparameterised", "bottleneck/pfeiffer"):
        whole, stopped = tmp_path / method / "whole", tmp_path / method / "stopped"
        settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
        settings["save_total_limit"] = 9
        expected = run(checkpoint("bert"), method, whole, **settings)
        (stopped / "checkpoints").mkdir(parents=True)
        shutil.copy(whole / "settings.json", stopped)
        shutil.copytree(whole / "checkpoints" / "checkpoint-4", stopped / "checkpoints" / "checkpoint-4")
        assert torch.equal(
            logits(run(checkpoint("bert"), method, stopped, True, **settings)), logits(expected)
        )


def test_what_was_dropped_cannot_be_trained_further(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint("bert"), "p_tuning/tokens20", tmp_path / "run")
    with pytest.raises(AdapterError, match="P_TUNING cannot be trained further"):
        run(checkpoint("bert"), str(tmp_path / "run"), tmp_path / "new")


def test_any_other_method_by_its_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    method = PeftRecipe(name="mine", family="loha", peft_type="LOHA", config={"target_modules": ["query"]})
    assert run(checkpoint("bert"), method, tmp_path / "run").run["proof"]["max_difference"] == 0.0
    assert peft.LoHaConfig().peft_type.value == "LOHA"

"""What each method trains, PEFT's own configs, training on from an earlier run, and half-precision bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import ptft_hf
from ptft_hf import adapters, models, preparing
from ptft_hf.errors import AdapterError, RecipeError
from ptft_hf.recipes import PartialRecipe, load_adapter
from ptft_hf.recipes.models import PEFT_SET_BY_THE_RUN
from tests.runs import recipe
from tests.runs import short_run as run
from tests.tiny import make_checkpoint

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Checkpoint = Callable[[str], Path]


def attached(base: Path, method: Any, given: Any = None, **options: Any) -> Any:
    loaded = models.load_model(
        str(base), "AutoModelForSequenceClassification", config={"num_labels": 2}, **options
    )
    if isinstance(method, str):
        method = load_adapter(method)
    return adapters.build(method, given).attach(loaded.model, loaded.head, "SEQ_CLS")


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[1, 9, 10, 11, 2], [1, 12, 13, 14, 2]])
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]  # type: ignore[no-any-return]


# ---- what is trained ----

HEAD = {"classifier.weight", "classifier.bias"}


def test_full_trains_every_weight(checkpoint: Checkpoint) -> None:
    model = attached(checkpoint("bert"), "full/default")
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_head_only_trains_the_head(checkpoint: Checkpoint) -> None:
    assert trained(attached(checkpoint("bert"), "partial/head_only")) == HEAD


def test_top_2_layers_trains_two_of_three_and_the_pooler_above_them(checkpoint: Checkpoint) -> None:
    model = attached(checkpoint("bert"), "partial/top_2_layers")
    above = ("bert.encoder.layer.1.", "bert.encoder.layer.2.", "bert.pooler.", "classifier.")
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(above)}


def test_top_2_layers_of_an_encoder_decoder_are_the_decoder_s(checkpoint: Checkpoint) -> None:
    names = trained(attached(checkpoint("bart"), "partial/top_2_layers"))
    assert {name.split(".")[1] for name in names} == {"decoder", "dense", "out_proj"}
    assert not any("embed" in name for name in names)


def test_bias_only_trains_every_bias_and_the_head(checkpoint: Checkpoint) -> None:
    model = attached(checkpoint("bert"), "partial/bias_only")
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert trained(model) == biases | HEAD
    assert "bert.embeddings.LayerNorm.bias" in biases


def test_xlnet_s_biases_have_names_of_their_own(checkpoint: Checkpoint) -> None:
    names = trained(attached(checkpoint("xlnet"), "partial/bias_only"))
    assert "transformer.layer.0.rel_attn.r_w_bias" in names
    assert "transformer.layer.0.rel_attn.q" not in names


def test_a_table_called_bias_is_none(checkpoint: Checkpoint) -> None:
    """MPNet's relative_attention_bias is an embedding of distances."""
    assert not any("relative" in name for name in trained(attached(checkpoint("mpnet"), "partial/bias_only")))


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("lora/r8_attention", ("query", "value")),
        ("lora/r16_all_linear", ("query", "key", "value", "dense")),
    ],
)
def test_lora_trains_its_matrices_and_the_head(
    method: str, layers: tuple[str, ...], checkpoint: Checkpoint
) -> None:
    names = trained(attached(checkpoint("bert"), method))
    head = {f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert head <= names
    kinds = {name.partition(".lora_")[0].rpartition(".")[2] for name in names - head}
    assert kinds == set(layers)
    # 3 layers x A and B on each: query and value; or query, key, value and three called dense, and the pooler
    assert len(names - head) == (3 * 2 * 2 if len(layers) == 2 else 3 * 6 * 2 + 2)


def test_chosen_parameters_are_trained_beside_the_head(checkpoint: Checkpoint) -> None:
    method = PartialRecipe(name="mine", family="partial", parameters=[r"bert\.embeddings\.LayerNorm\..*"])
    norm = {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}
    assert trained(attached(checkpoint("bert"), method)) == HEAD | norm


def test_all_faults_of_a_partial_recipe_are_named_together(checkpoint: Checkpoint) -> None:
    method = PartialRecipe(
        name="mine", family="partial", top_layers=5, bias=True, parameters=["norm", "classifer"]
    )
    with pytest.raises(AdapterError) as caught:
        attached(checkpoint("llama"), method)
    assert len(caught.value.problems) == 4
    assert "mine: top_layers: 5 of this model's 2 layers" in caught.value.problems[0]
    assert "'norm' matches none" in caught.value.problems[1]


# ---- PeftConfig objects ----


def test_a_config_becomes_a_recipe_of_what_was_chosen() -> None:
    config = peft.LoraConfig(r=4, target_modules=["value", "query"], task_type="SEQ_CLS", inference_mode=True)
    config.base_model_name_or_path, config.revision = "somewhere", "main"
    method = adapters.recipe_of_config(config)
    assert (method.name, method.family, method.peft_type) == ("LoraConfig", "lora", "LORA")
    assert method.config == {"r": 4, "target_modules": ["query", "value"]}
    assert not PEFT_SET_BY_THE_RUN & method.config.keys()


def test_a_config_without_defaults_for_all_its_fields_becomes_a_recipe() -> None:
    with pytest.raises(ValueError, match="total_step"):
        peft.AdaLoraConfig()
    assert adapters.recipe_of_config(peft.AdaLoraConfig(total_step=9)).config == {"total_step": 9}


def test_the_recipe_of_a_config_is_plain_json() -> None:
    config = peft.LoraConfig(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5), modules_to_save=("x",)
    )
    fields = adapters.recipe_of_config(config).config
    assert json.loads(json.dumps(fields)) == fields
    assert fields["eva_config"]["rho"] == 1.5


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(RecipeError, match="neither a recipe's name or file, nor an AdapterRecipe"):
        adapters.recipe_of_config({"r": 8})


@pytest.mark.parametrize(
    ("config", "rate"), [(peft.LoraConfig(), 1e-3), (peft.IA3Config(), 3e-3), (peft.LNTuningConfig(), 1e-3)]
)
def test_a_bare_config_has_a_learning_rate_of_its_method(config: Any, rate: float) -> None:
    assert adapters.build(adapters.recipe_of_config(config), config).learning_rate == rate


def test_a_config_is_trained_as_it_is_and_left_as_it_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["key"], task_type="SEQ_CLS", inference_mode=False)
    before = config.to_dict()
    result = run(checkpoint("bert"), config, tmp_path / "run")
    assert result.run["proof"]["max_difference"] == 0.0
    assert result.run["adapter"]["config"] == {"r": 3, "target_modules": ["key"]}
    assert result.run["settings"]["learning_rate"] == 1e-3
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text("utf-8"))
    assert (saved["r"], saved["target_modules"]) == (3, ["key"])
    assert "classifier" in saved["modules_to_save"]
    assert config.to_dict() == before


def test_a_setting_changes_a_field_of_a_config(checkpoint: Checkpoint) -> None:
    plan = preparing.make_plan(
        str(checkpoint("bert")), recipe(), peft.LoraConfig(r=4, lora_alpha=2), {"adapter.r": 8}
    )
    assert plan.adapter.config == {"lora_alpha": 2, "r": 8}  # 8 is PEFT's default, and still asked for
    model = attached(checkpoint("bert"), plan.adapter, plan.config)
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (8, 2)


def test_targets_that_match_nothing_are_an_error_before_training(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(
        AdapterError, match="LoraConfig: PEFT cannot put LORA on BertForSequenceClassification"
    ):
        run(checkpoint("bert"), peft.LoraConfig(target_modules=["nowhere"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- training on ----


@pytest.fixture(scope="module")
def earlier(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on BART, whose head plain PEFT would lose."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run(checkpoint("bart"), "lora/r8_attention", folder, learning_rate=0.05)
    return folder


def test_training_on_begins_where_the_earlier_run_ended(
    earlier: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    before = logits(ptft_hf.load(earlier).model)
    # Steps of 1e-30 change no weight, so that the outcome is the beginning.
    still = run(checkpoint("bart"), str(earlier), tmp_path / "still", learning_rate=1e-30, weight_decay=0.0)
    assert torch.equal(logits(still.model), before)
    moved = run(checkpoint("bart"), earlier, tmp_path / "moved", learning_rate=0.05)
    assert moved.run["proof"]["max_difference"] == 0.0
    assert not torch.equal(logits(moved.model), before)
    assert moved.run["adapter"]["name"] == "lora/r8_attention"
    assert torch.equal(logits(ptft_hf.load(earlier).model), before)


def test_training_on_trains_adapter_and_head(earlier: Path, checkpoint: Checkpoint) -> None:
    fresh = trained(attached(checkpoint("bart"), "lora/r8_attention"))
    loaded = models.load_model(
        str(checkpoint("bart")),
        "AutoModelForSequenceClassification",
        config=models.head_config(earlier, {}),
    )
    method = adapters.build(load_adapter("lora/r8_attention"), earlier)
    assert trained(method.attach(loaded.model, loaded.head, "SEQ_CLS")) == fresh


def test_training_on_refuses_what_it_would_not_do(
    earlier: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"adapter.r: cannot be changed when .* it is 8"):
        run(checkpoint("bart"), str(earlier), tmp_path / "new", **{"adapter.r": 4})
    with pytest.raises(AdapterError, match=r"\['neg', 'pos'\], and the data is for .* \['neutral', 'pos'\]"):
        run(checkpoint("bart"), str(earlier), tmp_path / "new", ("neutral", "pos"))
    with pytest.raises(AdapterError, match="was trained on another base"):
        other = make_checkpoint("bart", tmp_path / "other", init_std=0.03)
        run(other, str(earlier), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- half-precision bases ----


@pytest.mark.parametrize("method", ["lora/r8_attention", "partial/top_2_layers", "full/default"])
def test_head_and_adapter_are_in_float32_on_a_bfloat16_base(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = attached(checkpoint("bert"), method, dtype="bfloat16")
    parts = {name: parameter for name, parameter in model.named_parameters()}
    head = [p.dtype for name, p in parts.items() if "classifier" in name and p.requires_grad]
    assert head == [torch.float32, torch.float32]
    assert models.plain_model(model).bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    if method != "full/default":  # which trains the base itself, as it was asked for
        assert all(p.dtype == torch.float32 for p in parts.values() if p.requires_grad)
    settings = {"model.dtype": "bfloat16", "bf16": True, "learning_rate": 0.01}
    result = run(checkpoint("bert"), method, tmp_path / "run", **settings)
    assert result.run["proof"]["max_difference"] == 0.0
    # A head that was rounded to bfloat16 on its way would have no bits below the upper 16.
    weights = dict(models.plain_model(result.model).classifier.named_parameters())
    weight = weights.get("modules_to_save.default.weight", weights.get("weight")).detach()
    assert (weight != weight.bfloat16().float()).any()


def test_a_bfloat16_base_without_autocast_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs autocast"):
        run(
            checkpoint("bert"),
            "lora/r8_attention",
            tmp_path / "run",
            **{"model.dtype": "bfloat16"},
            bf16=False,
        )

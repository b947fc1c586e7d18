"""What bottleneck adapters compute, train and leave alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, relu, silu

from ptft_hf import adapters, models
from ptft_hf.adapters.bottleneck import DEFAULT, BottleneckModel
from ptft_hf.adapters.hook_points import HOOK_POINTS
from ptft_hf.errors import AdapterError, RecipeError
from ptft_hf.recipes import BottleneckConfig, load_adapter
from tests.tiny import SIZES

Checkpoint = Callable[[str], Path]
VARIANTS = ("houlsby", "pfeiffer", "parallel")
ARCHITECTURES = sorted(HOOK_POINTS.keys() & SIZES.keys())
IDS = torch.tensor([[1, 9, 10, 11, 2], [1, 12, 13, 14, 2]])
LABELS = torch.tensor([0, 1])


def base(folder: Path, **options: Any) -> models.LoadedModel:
    torch.manual_seed(3)  # of the head
    config = {"num_labels": 2, "pad_token_id": 0}
    return models.load_model(str(folder), "AutoModelForSequenceClassification", config=config, **options)


def attached(folder: Path, method: str = "bottleneck/houlsby", **fields: Any) -> BottleneckModel:
    loaded = base(folder)
    model = adapters.build(load_adapter(method, fields)).attach(loaded.model, loaded.head, "SEQ_CLS")
    return model.eval()  # type: ignore[no-any-return]


def randomised(model: BottleneckModel, seed: int = 0) -> BottleneckModel:
    """With adapters as if they were trained."""
    torch.manual_seed(seed)
    names = [name for adapter in model.configs for name in model.names_of(adapter).values()]
    with torch.no_grad():
        for name in names:
            model.base_model.state_dict()[name].normal_(0, 0.3)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


# ---- identity and formula ----


def test_the_table_has_every_architecture_that_was_promised() -> None:
    promised = (
        "bert roberta distilbert albert electra deberta-v2 modernbert xlm-roberta gpt2 llama qwen2 qwen3 mistral "
        "gemma t5 bart vit"
    )
    assert {*promised.split()} <= HOOK_POINTS.keys()
    assert {*ARCHITECTURES} == {*promised.split()} - {"vit"}  # whose parity with AdapterHub's is tested


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(
    architecture: str, checkpoint: Checkpoint
) -> None:
    expected = logits(base(checkpoint(architecture)).model)
    for variant in VARIANTS:
        model = attached(checkpoint(architecture), f"bottleneck/{variant}")
        assert (logits(model) - expected).abs().max() <= 1e-6
        assert (logits(randomised(model)) - expected).abs().max() > 1e-5
        model.activate()
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bert_layer_computes_the_paper_s_formula(variant: str, checkpoint: Checkpoint) -> None:
    model = randomised(attached(checkpoint("bert"), f"bottleneck/{variant}"))
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
        for number, layer in enumerate(model.bert.encoder.layer):
            x = hidden[number]
            y = layer.attention.output.dense(layer.attention.self(x)[0])
            if variant == "houlsby":
                y = y + adapter(layer.mh_adapter, y, silu)
            middle = layer.attention.output.LayerNorm(x + y)
            y = layer.output.dense(layer.intermediate(middle))
            norm = layer.output.LayerNorm
            if variant == "houlsby":
                y = y + adapter(layer.output_adapter, y, silu)
            elif variant == "pfeiffer":
                y = y + adapter(layer.output_adapter, norm(middle + y), relu)
            else:
                y = y + 4.0 * adapter(layer.output_adapter, middle, relu)
            assert (norm(middle + y) - hidden[number + 1]).abs().max() < 1e-6
            assert (hasattr(layer, "mh_adapter")) == (variant == "houlsby")


def adapter(place: Any, h: torch.Tensor, activation: Any) -> torch.Tensor:
    weights = place.state_dict()
    down, up = (
        [weights[f"{DEFAULT}.{part}.{kind}"] for kind in ("weight", "bias")] for part in ("down", "up")
    )
    return linear(activation(linear(h, *down)), *up)


def test_the_size_is_hidden_over_reduction_factor_and_layers_are_left_out(checkpoint: Checkpoint) -> None:
    model = attached(checkpoint("bert"), reduction_factor=5, leave_out=[1])
    assert model.bert.encoder.layer[0].mh_adapter[DEFAULT].down.weight.shape == (6, 32)
    assert [hasattr(layer, "mh_adapter") for layer in model.bert.encoder.layer] == [True, False, True]


def test_cross_adapters_stand_in_the_decoder_alone(checkpoint: Checkpoint) -> None:
    for architecture, encoder, decoder in (
        ("bart", "model.encoder.layers", "model.decoder.layers"),
        ("t5", "transformer.encoder.block", "transformer.decoder.block"),
    ):
        model = randomised(attached(checkpoint(architecture), cross_adapter=True, mh_adapter=False))
        assert not hasattr(model.base_model.get_submodule(f"{encoder}.0"), "cross_adapter")
        assert hasattr(model.base_model.get_submodule(f"{decoder}.1"), "cross_adapter")
        assert all(
            p.grad is not None for n, p in after_backward(model).named_parameters() if "cross_adapter" in n
        )


# ---- training ----


def after_backward(model: Any) -> Any:
    cross_entropy(model(input_ids=IDS).logits, LABELS).backward()
    return model


@pytest.mark.parametrize("options", [{}, {"scaling": "learned", "ln_before": True, "ln_after": True}])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama", "t5", "bart", "albert"])
def test_every_adapter_weight_and_no_other_learns(
    architecture: str, variant: str, options: dict[str, Any], checkpoint: Checkpoint
) -> None:
    model = attached(checkpoint(architecture), f"bottleneck/{variant}", reduction_factor=2, **options)
    own = {name for name in model.own_state()}
    before = {n: v.clone() for n, v in model.base_model.state_dict().items()}
    trained = {n: p for n, p in model.base_model.named_parameters() if p.requires_grad}
    assert trained.keys() == own
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        after_backward(model)
        optimizer.step()
    assert {n for n, p in model.base_model.named_parameters() if p.grad is not None} == own
    assert [n for n, p in trained.items() if not p.grad.abs().max() > 0] == []
    after = model.base_model.state_dict()
    assert all(torch.equal(after[n], v) == (n not in own) for n, v in before.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, checkpoint: Checkpoint) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = randomised(attached(checkpoint(architecture), "bottleneck/pfeiffer"))
        for (
            module
        ) in model.modules():  # checkpointing happens in training mode alone, where dropout would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        model.train()
        model.config.use_cache = False
        after_backward(model)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


def test_copies_and_pickles_run_their_own_adapters(checkpoint: Checkpoint) -> None:
    model = randomised(attached(checkpoint("bert")))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        randomised(other, seed=1)
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)


def test_the_model_keeps_its_class_and_the_names_of_its_weights(checkpoint: Checkpoint) -> None:
    loaded = base(checkpoint("bert"))
    names, kinds = {*loaded.model.state_dict()}, [type(m) for _, m in loaded.model.named_modules()]
    model = BottleneckModel(loaded.model, loaded.head)
    model.add_adapter("one", BottleneckConfig())
    assert names < {*model.base_model.state_dict()}
    assert [type(m) for n, m in model.base_model.named_modules() if "adapter" not in n] == kinds
    assert all("_adapter.one." in name for name in {*model.base_model.state_dict()} - names)
    assert (
        models.depths(model, loaded.head)["base_model.bert.encoder.layer.1.output_adapter.one.up.weight"] == 2
    )


def test_adapters_and_head_are_in_float32_on_a_bfloat16_base(checkpoint: Checkpoint) -> None:
    loaded = base(checkpoint("bert"), dtype="bfloat16")
    model = adapters.build(load_adapter("bottleneck/houlsby")).attach(loaded.model, loaded.head, "SEQ_CLS")
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        after_backward(model)
    with torch.no_grad():
        assert model.bert(IDS)[0].dtype == torch.bfloat16  # without autocast


# ---- several on one base ----


@pytest.fixture
def two(checkpoint: Checkpoint) -> BottleneckModel:
    loaded = base(checkpoint("bert"))
    model = BottleneckModel(loaded.model, loaded.head)
    for name in ("a", "b"):
        model.add_adapter(name, BottleneckConfig(mh_adapter=True))
    return randomised(model)


def test_switching_by_name_and_back_to_the_base(two: BottleneckModel, checkpoint: Checkpoint) -> None:
    bare = logits(two)
    results = {}
    for name in ("a", "b", "a"):
        two.activate(name)
        assert torch.equal(results.setdefault(name, logits(two)), logits(two))
    assert not torch.equal(results["a"], results["b"])
    two.activate()
    assert torch.equal(logits(two), bare)


def test_a_stack_runs_one_after_the_other(two: BottleneckModel) -> None:
    two.activate("a", "b")
    layer = two.bert.encoder.layer[0]
    y = torch.randn(2, 5, 32)
    with torch.no_grad():
        middle = y + adapter_of(layer.output_adapter["a"], y)
        expected = middle + adapter_of(layer.output_adapter["b"], middle)
        layer.intermediate(y)  # where the residual stream is taken up
        result = layer.output.dropout(y)
    assert torch.allclose(result, expected, atol=1e-6)
    stacked = logits(two)
    two.activate("b", "a")
    assert not torch.equal(logits(two), stacked)


def adapter_of(one: Any, h: torch.Tensor) -> torch.Tensor:
    return one.up(relu(one.down(h)))  # type: ignore[no-any-return]


def test_an_average_by_weight_is_the_mean_of_the_weights(two: BottleneckModel) -> None:
    two.average("mean", {"a": 3.0, "b": 1.0})
    state = two.base_model.state_dict()
    for (path, rest), name in two.names_of("mean").items():
        expected = 0.75 * state[f"{path}.a.{rest}"] + 0.25 * state[f"{path}.b.{rest}"]
        assert torch.allclose(state[name], expected, atol=1e-7)
    two.average("only_a", {"a": 2.0})
    two.activate("a")
    expected = logits(two)
    two.activate("only_a")
    assert torch.equal(logits(two), expected)


def test_unloading_gives_the_base_back(checkpoint: Checkpoint) -> None:
    loaded = base(checkpoint("bert"))
    expected, names = logits(loaded.model), {*loaded.model.state_dict()}
    model = BottleneckModel(loaded.model, loaded.head)
    model.add_adapter("a", BottleneckConfig())
    model.activate("a")
    with torch.no_grad():
        randomised(model).classifier.weight.add_(1)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert {*plain.state_dict()} == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


def test_several_are_saved_and_loaded_and_one_is_taken_over(
    two: BottleneckModel, tmp_path: Path, checkpoint
) -> None:
    from ptft_hf.adapters import bottleneck

    two.activate("b", "a")
    expected = logits(two)
    two.save_pretrained(tmp_path / "both")
    loaded = bottleneck.load(base(checkpoint("bert")).model, tmp_path / "both")
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(AdapterError, match="holds 2 active adapters"):
        loaded.load_adapter(tmp_path / "both", "c")
    two.activate("b")
    two.save_pretrained(tmp_path / "b")
    loaded.load_adapter(tmp_path / "b", "c")
    loaded.activate("c")
    assert torch.equal(logits(loaded), logits(two))
    loaded.delete_adapter("c")
    assert loaded.active == () and not any(".c." in name for name in loaded.state_dict())


def test_names_and_weights_that_make_no_sense_are_refused(two: BottleneckModel) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'aa' \(did you mean 'a'\?\)"):
        two.activate("aa")
    for name in ("a", "with space", "keys"):
        with pytest.raises(AdapterError, match="taken, or no name"):
            two.add_adapter(name, BottleneckConfig())
    with pytest.raises(AdapterError, match="do not sum to more than zero"):
        two.average("c", {"a": 1, "b": -1})
    two.add_adapter("wide", BottleneckConfig(reduction_factor=2))
    with pytest.raises(AdapterError, match="differ in their configuration"):
        two.average("c", {"a": 1, "wide": 1})


# ---- refusals ----


def test_an_unknown_architecture_gets_the_names_to_choose_from(checkpoint: Checkpoint) -> None:
    with pytest.raises(AdapterError) as caught:
        attached(checkpoint("mpnet"))
    text = str(caught.value)
    assert "bottleneck/houlsby: bottleneck adapters: the architecture 'mpnet' is unknown" in text
    assert "Modules of mpnet.encoder.layer.0 to choose from: attention, attention.attn, " in text
    assert "output.LayerNorm" in text


MPNET = {
    "mh_adapter": {"output": "attention.dropout", "input": "attention", "norm": "attention.LayerNorm"},
    "output_adapter": {"output": "output.dropout", "input": "intermediate", "norm": "output.LayerNorm"},
}


def test_hook_points_of_a_recipe_open_any_architecture(checkpoint: Checkpoint) -> None:
    expected = logits(base(checkpoint("mpnet")).model)
    model = attached(checkpoint("mpnet"), hook_points=MPNET)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(randomised(model)), expected)
    assert len([n for n in model.own_state() if n.endswith("adapter.default.up.bias")]) == 4


def test_what_the_model_lacks_is_named(checkpoint: Checkpoint) -> None:
    wrong = {"output_adapter": {"output": "nowhere", "input": "intermediate"}}
    with pytest.raises(
        AdapterError, match=r"no layer of MPNet\w+ holds all of intermediate, nowhere\. Modules of"
    ):
        attached(checkpoint("mpnet"), "bottleneck/pfeiffer", hook_points=wrong)
    with pytest.raises(AdapterError) as caught:
        attached(checkpoint("bert"), cross_adapter=True, leave_out=[3])
    assert len(caught.value.problems) == 2
    assert "cross_adapter: BertForSequenceClassification has no such place" in str(caught.value)
    assert "leave_out: 3 of this model's 3 layers" in str(caught.value)
    with pytest.raises(AdapterError, match="leaves no layer"):
        attached(checkpoint("bert"), leave_out=[0, 1, 2])
    with pytest.raises(AdapterError, match=r"no activation 'rellu' \(did you mean 'relu'"):
        attached(checkpoint("bert"), non_linearity="rellu")


def test_all_faults_of_a_recipe_are_named_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load_adapter(
            "bottleneck/parallel",
            {
                "reduction_factor": 0,
                "scaling": "big",
                "original_ln_before": True,
                "dropuot": 0.1,
                "leave_out": [-1],
            },
        )
    text = str(caught.value)
    for fault in (
        "reduction_factor: expected a number greater than 0",
        "scaling: expected",
        "original_ln_before: true has no meaning for a parallel adapter",
        "unknown key 'dropuot' (did you mean 'dropout'?)",
        "leave_out.0: expected a number of at least 0",
    ):
        assert fault in text
    with pytest.raises(RecipeError, match="output_adapter: there is no place left"):
        load_adapter("bottleneck/pfeiffer", {"output_adapter": False})

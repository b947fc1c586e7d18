"""Adapters that AdapterHub's library saved: the same logits and gradients as it computed from them.

What it computed is stored; ``tests/references/make_adapterhub.py`` made it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from ptft_hf.adapters import adapterhub
from ptft_hf.adapters.bottleneck import BottleneckModel
from ptft_hf.errors import AdapterError
from tests.references.sine_weights import LABELS, build, config_fields, image_inputs, sine, text_inputs

STORED = Path(__file__).parent / "references" / "adapterhub"
CELLS = sorted(path.name for path in STORED.iterdir() if path.is_dir())


def base(cell: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    name = cell.rpartition("-")[0]
    if name != "vit":
        return build(name, AutoModelForSequenceClassification), text_inputs()
    shapes = json.loads((STORED / "vit_weights.json").read_text("utf-8"))
    AutoConfig.for_model(name, **config_fields(name)).save_pretrained(folder / "vit")
    weights = {weight: sine(weight, shape) for weight, shape in shapes.items()}
    save_file(weights, folder / "vit" / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForImageClassification.from_pretrained(folder / "vit").eval(), image_inputs()


def wrapped(cell: str, folder: Path) -> tuple[BottleneckModel, dict[str, torch.Tensor]]:
    model, inputs = base(cell, folder)
    model = BottleneckModel(model, ["classifier"] if hasattr(model, "classifier") else [])
    model.load_adapter(STORED / cell, "task", with_head=True)
    model.activate("task")
    return model.eval(), inputs


def test_the_references_are_as_wide_as_promised() -> None:
    variants = ("houlsby", "pfeiffer", "parallel")
    assert {f"{a}-{v}" for a in ("bert", "roberta", "bart", "t5", "gpt2") for v in variants} <= {*CELLS}


@pytest.mark.parametrize("cell", CELLS)
def test_logits_and_gradients_are_those_of_adapterhub(cell: str, tmp_path: Path) -> None:
    model, inputs = wrapped(cell, tmp_path)
    expected = load_file(STORED / cell / "expected.safetensors")
    logits = model(**inputs).logits
    with torch.no_grad():
        bare = base(cell, tmp_path)[0](**inputs).logits
    assert (logits - bare).abs().max() > 1e-3  # the adapter matters
    # The stored numbers were computed on another machine, whose kernels round otherwise (4e-6 for GPT-2 here).
    assert torch.allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
    assert expected["gradients"].abs().max() > 1e-4
    # Their gradients as an adapter's weights, so that reading it tells which is which.
    folder = shutil.copytree(STORED / cell, tmp_path / "gradients")
    pickled = folder / "pytorch_adapter.bin"
    weights = torch.load(pickled) if pickled.exists() else load_file(folder / "adapter.safetensors")
    pickled.unlink(missing_ok=True)
    # Under ln_before the library registers the layer norm a second time, as adapter_down.0.
    names = [k for k in sorted(weights) if not (cell.endswith("options") and ".adapter_down.0." in k)]
    parts = expected["gradients"].split([weights[name].numel() for name in names])
    gradients = {k: part.reshape(weights[k].shape) for k, part in zip(names, parts, strict=True)}
    save_file({k: v.clone() for k, v in gradients.items()}, folder / "adapter.safetensors")
    model.load_adapter(folder, "gradients")
    state = model.base_model.state_dict()
    ours = dict(model.base_model.named_parameters())
    for (path, rest), name in model.names_of("task").items():
        theirs = state[f"{path}.gradients.{rest}"]
        assert torch.allclose(ours[name].grad, theirs, rtol=0, atol=1e-5), name


# ---- reading ----


def test_a_head_of_the_same_shape_comes_along_if_asked_for(tmp_path: Path) -> None:
    model, _ = base("bert-houlsby", tmp_path)
    with torch.no_grad():
        model.classifier.weight.zero_()
    model = BottleneckModel(model, ["classifier"])
    model.load_adapter(STORED / "bert-houlsby", "without")
    assert not model.classifier.weight.any()
    model.load_adapter(STORED / "bert-houlsby", "with_it", with_head=True)
    assert torch.equal(
        model.classifier.weight, build("bert", AutoModelForSequenceClassification).classifier.weight
    )


def changed(folder: Path, cell: str, **options: Any) -> Path:
    shutil.copytree(STORED / cell, folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["config"] |= options
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_other_methods_are_refused_by_name_all_at_once(tmp_path: Path) -> None:
    folder = changed(
        tmp_path / "a", "bert-pfeiffer", inv_adapter="nice", phm_layer=True, reduction_factor={"1": 2}
    )
    with pytest.raises(AdapterError) as caught:
        adapterhub.read_config(folder)
    assert len(caught.value.problems) == 3
    assert "inv_adapter: 'nice' is not read, only None" in str(caught.value)


def test_albert_s_attention_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="feeds it the attention's input instead of its output"):
        adapterhub.read_config(changed(tmp_path / "a", "albert-pfeiffer", mh_adapter=True))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model, _ = base("bert-pfeiffer", tmp_path)
    folder = changed(tmp_path / "a", "bert-pfeiffer", reduction_factor=8, mh_adapter=True)
    with pytest.raises(AdapterError) as caught:
        BottleneckModel(model, []).load_adapter(folder, "task")
    text = str(caught.value)
    assert "encoder.layer.0.attention_adapters.adapters.task.adapter_down.0.weight is missing" in text
    assert (
        "encoder.layer.0.output.adapters.task.adapter_up.weight has the shape (32, 2) instead of (32, 4)"
        in text
    )


def test_a_folder_without_weights_or_with_another_method_is_refused(tmp_path: Path) -> None:
    model = BottleneckModel(base("bert-pfeiffer", tmp_path)[0], [])
    folder = changed(tmp_path / "a", "bert-pfeiffer")
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"holds neither adapter\.safetensors nor pytorch_adapter\.bin"):
        model.load_adapter(folder, "task")
    with pytest.raises(AdapterError, match="holds no bottleneck adapter"):
        model.load_adapter(tmp_path, "task")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    folder = changed(tmp_path / "a", "bert-houlsby")
    (folder / "pytorch_adapter.bin").unlink()
    torch.save({"weight": Evil(str(tmp_path / "ran"))}, folder / "pytorch_adapter.bin")
    model = BottleneckModel(base("bert-houlsby", tmp_path)[0], [])
    with pytest.raises(AdapterError, match="cannot be read"):
        model.load_adapter(folder, "task")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")

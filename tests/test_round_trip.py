"""Every architecture x every method: what is saved is what was trained, or a refusal before training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ptft_hf
from ptft_hf.errors import AdapterError
from tests.conftest import rows
from tests.runs import recipe, splits
from tests.tiny import SIZES

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = (
    "full/default",
    "partial/head_only",
    "partial/top_2_layers",
    "partial/bias_only",
    "lora/r8_attention",
    "lora/r16_all_linear",
)
NO_BIAS = "has no bias terms below its head"
REFUSED = {
    ("albert", "partial/top_2_layers"): "2 of this model's 1 layers",  # all its layers are one, shared
    ("modernbert", "partial/bias_only"): NO_BIAS,
    ("llama", "partial/bias_only"): NO_BIAS,
    ("mistral", "partial/bias_only"): NO_BIAS,
    ("qwen3", "partial/bias_only"): NO_BIAS,
    ("gemma", "partial/bias_only"): NO_BIAS,
    ("t5", "partial/bias_only"): NO_BIAS,
    ("xlnet", "lora/r8_attention"): "no linear query and value projections",  # they are bare tensors
}
HEADS_THAT_PEFT_LOSES = ("bart", "t5", "xlnet", "xlm", "deberta-v2")
SAMPLE = {
    *(("bert", method) for method in METHODS),
    *((name, method) for name in HEADS_THAT_PEFT_LOSES for method in ("full/default", "lora/r16_all_linear")),
    *((name, "lora/r8_attention") for name in ("bart", "deberta-v2")),
    *REFUSED,
}
"""What CI runs; the other cells are slow."""
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in SAMPLE else pytest.mark.slow)
    for name in SIZES
    for method in METHODS
]
TEXTS = ["a good film", "this story was really very bad and the plot is so awful", "dull"]


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Outcomes of the cells that ran; one line of pytest's report."""
    outcomes: Counter[str] = Counter()
    yield outcomes
    words = ", ".join(f"{outcomes[word]} {word}" for word in ("passed", "refused", "failed"))
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nround trip: {words}; {outcomes.total()} of {len(CELLS)} cells ran")


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained_or_the_method_is_refused(
    architecture: str,
    method: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    tally: Counter[str],
) -> None:
    base, output = checkpoint(architecture), tmp_path / "run"
    tally["failed"] += 1  # taken back below
    if (architecture, method) in REFUSED:
        with pytest.raises(AdapterError, match=REFUSED[architecture, method]):
            run(base, method, output)
        assert not output.exists()
    else:
        before = digests(base)
        trained = run(base, method, output)
        assert trained.run["proof"] == {"max_difference": 0.0, "examples": 8}
        expected = logits(trained)
        assert torch.isfinite(expected).all()
        assert not torch.equal(expected[0], expected[1])
        assert torch.equal(logits(ptft_hf.load(output)), expected)
        trained.model = load_plainly(output, base)
        assert torch.equal(logits(trained), expected)
        assert digests(base) == before
        check_what_changed(architecture, method, base, output, trained.run["model"]["head"])
    tally["failed"] -= 1
    tally["refused" if (architecture, method) in REFUSED else "passed"] += 1


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(SIZES) >= 16
    assert {*HEADS_THAT_PEFT_LOSES} <= {*SIZES}
    assert {(name, method) for name in SIZES for method in METHODS} >= SAMPLE


def run(base: Path, method: str, output: Path) -> Any:
    return ptft_hf.train(
        model=str(base),
        task=recipe(),
        adapter=method,
        output_dir=output,
        data=splits(rows(16, 1), validation=rows(8, 2), test=rows(8, 3)),
        settings={"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0},
    )


def logits(trained: Any) -> torch.Tensor:
    batch = trained.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return trained.model(**batch)[0]  # type: ignore[no-any-return]


def load_plainly(folder: Path, base: Path) -> Any:
    """By ``transformers`` and ``peft`` alone."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not (folder / "adapter_config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


BELOW_THE_TOP_2 = {"bert": "encoder.layer.0.", "bart": "encoder.", "t5": "encoder."}
"""Of 3 layers, and of 2 + 2; the other tiny checkpoints have no more than 2 layers."""


def check_what_changed(architecture: str, method: str, base: Path, output: Path, head: list[str]) -> None:
    """The method's own weights have moved, and no other weight of the checkpoint has."""
    if method.startswith("lora/"):
        saved = load_file(output / "adapter_model.safetensors")
        inside = tuple(f"base_model.model.{name}." for name in head)
        assert all(".lora_" in name or name.startswith(inside) for name in saved)
        assert all(any(name.startswith(one) for name in saved) for one in inside)
        updates = [value for name, value in saved.items() if ".lora_B." in name]  # zero before training
        assert updates
        assert any(value.any() for value in updates)
        return
    from transformers import AutoModel

    before = dict(AutoModel.from_pretrained(base, dtype=torch.float32).named_parameters())
    trunk = getattr(load_plainly(output, base), "base_model", None)
    assert trunk is not None
    after = dict(trunk.named_parameters())
    shared = before.keys() & after.keys()
    moved = {name for name in shared if not torch.equal(before[name], after[name])}
    assert len(shared) >= 0.9 * len(before)
    if method == "partial/head_only":
        assert not moved
    else:
        assert moved
    if method == "partial/bias_only":
        assert all(name.endswith("bias") for name in moved)
    if method == "partial/top_2_layers":
        tables = {name for name, module in trunk.named_modules() if isinstance(module, torch.nn.Embedding)}
        in_layers = {name for name in tables if "relative_attention_bias" in name}  # T5 has them in block 0
        assert not moved & {f"{name}.weight" for name in tables - in_layers}
        assert not any(name.startswith(BELOW_THE_TOP_2.get(architecture, "?")) for name in moved)

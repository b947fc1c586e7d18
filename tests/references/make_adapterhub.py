"""Writes ``adapterhub/``: adapters saved by AdapterHub's library, with the logits and gradients it computes.

For an environment of its own, since ``adapters`` 1.3.0 pins transformers 4.57::

    python3.11 -m venv hub && hub/bin/pip install adapters==1.3.0 torch==2.13.0
    PYTHONPATH=. hub/bin/python -m tests.references.make_adapterhub
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from tests.references.sine_weights import LABELS, build, image_inputs, text_inputs

FOLDER = Path(__file__).parent / "adapterhub"
VARIANTS = {
    "houlsby": DoubleSeqBnConfig(),
    "pfeiffer": SeqBnConfig(),
    "parallel": ParBnConfig(reduction_factor=8),
}
OPTIONS = BnConfig(
    mh_adapter=True, output_adapter=True, cross_adapter=True, reduction_factor=16, non_linearity="gelu",
    original_ln_before=True, ln_before=True, ln_after=True, scaling="learned", dropout=0.1, leave_out=[1, 2],
)  # fmt: skip
CELLS = [
    *((name, variant) for name in ("bert", "roberta", "bart", "t5", "gpt2") for variant in VARIANTS),
    *((name, "houlsby") for name in ("distilbert", "deberta-v2", "llama", "vit")),
    ("albert", "pfeiffer"),
    ("bart", "options"),
]
PICKLED = {("bert", "houlsby"), ("gpt2", "parallel"), ("bart", "options")}
"""The library's default. Safetensors cannot hold the layer norm that it registers twice under ``ln_before``."""


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for number, (name, variant) in enumerate(CELLS):
        is_image = name == "vit"
        auto = AutoModelForImageClassification if is_image else AutoModelForSequenceClassification
        model: Any = build(name, auto)
        if is_image:  # later transformers name its weights otherwise, and rename them when they load a file
            shapes = {n: list(v.shape) for n, v in model.state_dict().items()}
            (FOLDER / "vit_weights.json").write_text(json.dumps(shapes), encoding="utf-8")
        adapters.init(model)
        model.add_adapter("task", config=VARIANTS.get(variant, OPTIONS))
        model.train_adapter("task")
        model.eval()
        torch.manual_seed(number)
        own = {n: p for n, p in model.named_parameters() if ".task." in n}
        for parameter in own.values():
            parameter.data += 0.2 * torch.randn_like(parameter)
        logits = model(**(image_inputs() if is_image else text_inputs())).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
        folder = FOLDER / f"{name}-{variant}"
        folder.mkdir(parents=True)
        safe = (name, variant) not in PICKLED
        model.save_adapter(str(folder), "task", use_safetensors=safe, with_head=number < 2)
        # By AdapterHub's names, sorted: the names themselves would take more room than the numbers.
        gradients = torch.cat([own[n].grad.flatten() for n in sorted(own)])
        save_file({"logits": logits.detach(), "gradients": gradients}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()

"""One cell, run: trained by a real run, and each promise of it looked at."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers

import ptft_hf
from ptft_hf import models, preparing, report, training
from ptft_hf.errors import CheckpointError, PtftError
from tests.conformance.matrix import METHODS, NOT_MERGED, Cell, checkpoint, data, recipe

ROOT = Path(tempfile.gettempdir()) / "ptft-conformance"
STEPS = 3
SETTINGS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "bf16": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "model.max_length": 32,
}
KEY_BIASES = ("key.bias", "k_proj.bias", "k_lin.bias", "key_proj.bias", "key_global.bias")
"""A key's bias adds the same to all scores of a query, and softmax takes no notice: its gradient is 0, up to
rounding."""
UNUSED = {
    "xlnet": ("mask_emb", "seg_embed", "r_s_bias"),  # read with target mappings and segments alone
    "roformer": ("embed_positions",),  # fixed sinusoids
}
"""By architecture: parameters that the family's loss does not depend on, whatever is trained."""
NOT_CONTINUED = ("adalora/", "p_tuning/")
"""What served their training alone is not kept: the ranks that were cut, the prompt's network."""


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Which weights had a gradient by the last step, and whether the frozen ones are what they were."""

    def __init__(self) -> None:
        self.seen: dict[str, bool] = {}
        self.strays: set[str] = set()
        self.frozen: dict[str, torch.Tensor] = {}
        self.changed: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.frozen = {name: p.detach().clone() for name, p in named if not p.requires_grad}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for name, parameter in model.named_parameters():
            has = parameter.grad is not None and bool(parameter.grad.any())
            if parameter.requires_grad:
                self.seen[name] = self.seen.get(name, False) or has
            elif parameter.grad is not None:
                self.strays.add(name)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        after = dict(model.named_parameters())
        self.changed = [
            n for n, value in self.frozen.items() if n in after and not torch.equal(value, after[n])
        ]


def run_cell(cell: Cell, root: Path) -> dict[str, Any]:
    """``status``: passed; refused, with the reason, before anything was written; or failed, with what was wrong."""
    start, folder = time.perf_counter(), root / cell.name.replace("/", "-").replace(" ", "--")
    found: dict[str, Any] = {"cell": cell.name}
    try:
        with report.silence():
            found |= checked(cell, checkpoint(cell, root), folder)
    except Exception as error:  # whatever it is belongs in the table
        found |= {
            "status": "failed",
            "problems": [f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"],
        }
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def run_alone(cell: Cell) -> dict[str, Any]:
    """A cell in a process that may run several, one thread each; checkpoints are kept between them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root = ROOT / str(os.getpid())
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        found = run_cell(cell, root)
    for folder in root.glob("*--*"):
        shutil.rmtree(folder)
    return found


def checked(cell: Cell, base: Path, folder: Path) -> dict[str, Any]:
    watch = Watch()
    try:
        trained = train(cell, str(base), cell.method, folder, STEPS, watch)
    except PtftError as error:
        if folder.exists():
            raise
        return {"status": "refused", "reason": " ".join(error.problems[0].split())}
    problems: list[str] = []
    problems += [f"no gradient: {n}" for n, seen in watch.seen.items() if not seen and not idle(cell, n)]
    problems += [f"a gradient, though frozen: {name}" for name in sorted(watch.strays)]
    problems += [f"changed, though frozen: {name}" for name in watch.changed]
    if trained.run["proof"]["max_difference"] != 0.0:
        problems.append(f"proof: {trained.run['proof']}")
    batch = probe(trained)
    expected = logits(trained.model, batch)
    if not torch.equal(logits(ptft_hf.load(folder).model, batch), expected):
        problems.append("loaded again, its logits are others")
    adapter = models.adapter_kind(trained.model) is not None
    merged = None
    if not cell.method.startswith(NOT_MERGED):
        difference = logits(trained.merge().model, batch) - expected
        merged = float(difference.abs().max() / expected.abs().max().clamp(min=1.0))
        if not merged <= 1e-5:
            problems.append(f"merged, its logits are {merged:.1e} away")
    elif adapter:
        problems += refuses(trained.merge)
    if adapter:
        problems += differs_unloaded(base, trained, batch)
    start, again = (str(base), str(folder)) if adapter else (str(folder), cell.method)
    problems += goes_not_on(cell, start, again, folder.with_name(f"{folder.name}--on"))
    trainable = trained.run["parameters"]["trainable"]
    status = "failed" if problems else "passed"
    return {"status": status, "problems": problems[:8], "merged": merged, "trainable": trainable}


def train(
    cell: Cell, model: str, adapter: Any, folder: Path, steps: int, watch: Watch
) -> ptft_hf.TrainedModel:
    """As :func:`ptft_hf.train` does it, with one more callback, and without the test set."""
    fields = METHODS[cell.method] if adapter == cell.method else {}
    settings = {**SETTINGS, "max_steps": steps, **fields}
    plan = preparing.make_plan(model, recipe(cell.family), adapter, settings)
    ready = preparing.prepare(plan, copy.copy(data(cell.family)), seed=1)
    arguments = preparing.training_arguments(plan, ready, folder, seed=1)
    return training.run(
        plan,
        ready,
        arguments,
        folder,
        resume=False,
        overwrite=False,
        evaluated=("validation",),
        callbacks=[watch],
    )


def goes_not_on(cell: Cell, model: str, adapter: str, folder: Path) -> list[str]:
    """One more step from what was saved."""
    refusal = cell.method.startswith(NOT_CONTINUED)
    try:
        proof = train(cell, model, adapter, folder, 1, Watch()).run["proof"]
    except PtftError as error:
        return [] if refusal and not folder.exists() else [f"training on: {error.problems[0]}"]
    if refusal:
        return ["trained on, though what it needs is not kept"]
    return [] if proof["max_difference"] == 0.0 else [f"training on: proof: {proof}"]


def idle(cell: Cell, name: str) -> bool:
    """Whether a weight has no gradient by mathematics, or is not read at all."""
    plain = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
    return plain.endswith(KEY_BIASES) or any(part in plain for part in UNUSED.get(cell.architecture, ()))


def probe(trained: ptft_hf.TrainedModel) -> dict[str, Any]:
    rows = trained.task.encode(data(trained.run["task"]["family"])["validation"], trained.tokenizer, 32)[0]
    batch = trained.task.collator(trained.tokenizer)(rows.select(range(min(4, len(rows)))).to_list())
    return {name: value for name, value in batch.items() if name != "labels" and torch.is_tensor(value)}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model.eval()(**batch)[0]  # type: ignore[no-any-return]


def refuses(act: Callable[[], Any]) -> list[str]:
    try:
        act()
    except CheckpointError:
        return []
    return ["merged, though it cannot be"]


def differs_unloaded(base: Path, trained: ptft_hf.TrainedModel, batch: dict[str, Any]) -> list[str]:
    """Without its adapter the model is its base again, to the last bit; its head is the one that it was given."""
    plain = models.load_model(str(base), trained.task.auto_class, config=trained.task.config()).model.eval()
    # A run may have chosen the token.
    plain.config.pad_token_id = models.plain_model(trained.model).config.pad_token_id
    unloaded = ptft_hf.adapters.unload(copy.deepcopy(trained.model)).eval()
    if type(unloaded) is not type(plain):
        return [f"unloaded, it is a {type(unloaded).__name__}"]
    theirs, ours = plain.state_dict(), unloaded.state_dict()
    head = tuple(f"{name}." for name in trained.run["model"]["head"])
    if theirs.keys() != ours.keys():
        return [f"unloaded, its weights have other names: {sorted(theirs.keys() ^ ours.keys())[:3]}"]
    if other := [n for n, v in theirs.items() if not n.startswith(head) and not torch.equal(v, ours[n])]:
        return [f"unloaded, its weights are others: {other[:3]}"]
    plain.load_state_dict({n: v for n, v in ours.items() if n.startswith(head)}, strict=False)
    same = torch.equal(logits(plain, batch), logits(unloaded, batch))
    return [] if same else ["unloaded, its logits are others"]

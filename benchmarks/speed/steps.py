"""Training steps of one epoch, by hand and by ``ptft_hf.train``, over the same batches; and their comparison.

The hand-written loop is plain PyTorch with every saving a careful author would make: dynamic padding of batches of
like length, bf16 autocast where the CPU has the instructions, SDPA, plain peft, upstream's own loss, AdamW with
linear decay, gradients clipped at 1.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_mb

from ptft_hf import preparing, training
from ptft_hf.sampling import EpochSampler


def order_of(encoded: Any, batch_size: int, seed: int) -> list[list[int]]:
    """The rows of each batch, as ours has them."""
    order = list(EpochSampler(len(encoded), batch_size, seed, lengths=encoded["length"][:]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def by_hand(
    model: Any, batches: Iterator[Mapping[str, Any]], steps: int, rate: float, bf16: bool | None = None
) -> dict[str, Any]:
    """Seconds and losses; ``batches`` are made within the clock. ``bf16``: by default where the CPU has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if bf16 is None else bf16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        model(input_ids=torch.tensor([[1, 2, 3]]))  # ours has run once, too, before its clock starts
    model.train()
    losses, start = [], time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {**figures(losses, time.perf_counter() - start), "peak_memory_mb": peak_memory_mb()}


def by_ours(
    model: str, recipe: Any, adapter: Any, data: Any, seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Seconds, losses and tokens of a run with our defaults for what the job does not set."""
    fixed = {
        "num_train_epochs": 1,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as folder:
        plan = preparing.make_plan(model, recipe, adapter, {**fixed, **settings})
        ready = preparing.prepare(plan, data, seed)
        arguments = preparing.training_arguments(plan, ready, Path(folder), seed)
        run = training.run(plan, ready, arguments, Path(folder), resume=False, overwrite=False).run
        curve = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    memory = run["training"]["peak_memory_mb"]
    return {
        **figures(losses, run["training"]["seconds"]),
        "tokens": tokens_of(ready.encoded["train"]),
        "peak_memory_mb": memory,
    }


def padded(ids: list[list[int]], labels: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """A batch ``[B, T]``, padded on the right to its longest row."""
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids]),
        "labels": torch.tensor([[*row, *[-100] * (width - len(row))] for row in labels]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }


def figures(losses: list[float], seconds: float) -> dict[str, Any]:
    """The first losses are equal if the batches are the same."""
    return {"seconds": seconds, "first_loss": losses[0], "loss": sum(losses[-5:]) / len(losses[-5:])}


def tokens_of(encoded: Any) -> int:
    return sum(encoded["length"][:])


def ran_one(args: Any, contestants: Mapping[str, Callable[[Any], dict[str, Any]]]) -> bool:
    """Whether this process is that of one contestant (``--one``), whose line it has then printed."""
    if not args.one:
        return False
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the one line
        result = contestants[args.one](args)
    print(json.dumps(result), flush=True)
    return True


def run_once(name: str, seed: int) -> dict[str, Any]:
    """One contestant of the calling script in a fresh process; the JSON line it printed."""
    command = [sys.executable, *sys.argv, "--one", name, "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps({"contestant": name, **result})[:200], file=sys.stderr, flush=True)
    return {"contestant": name, **result}

"""Forward passes of a finished model over encoded rows: batches of rows of like length, answers in row order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ptft_hf import models, report

BATCH_SIZE = 32
"""Rows a batch in prediction and final evaluation. On CPUs more are slower (measured: 16 to 64; MiniLM)."""

LOGITS = 2**27
"""Logits of a language model that a batch may have: half a gigabyte in float32."""


def fitting(model: Any, batch_size: int, length: int) -> int:
    """``batch_size``, or as many rows of ``length`` tokens as a language model's logits leave memory for."""
    words = models.plain_model(model).get_output_embeddings()
    return batch_size if words is None else max(1, min(batch_size, LOGITS // (length * words.weight.shape[0])))


def first_logits(outputs: Any) -> torch.Tensor:
    """``outputs.logits``, whether upstream gives an object, a dictionary or a tuple; of several heads the first's."""
    return logits_of_heads(outputs)[0]


def logits_of_heads(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The logits of each head: one of most models; of BERT's for pre-training, those of tokens and of the pair."""
    if not isinstance(outputs, Mapping):
        return (outputs[0],)
    if "logits" in outputs:
        return (outputs["logits"],)
    return tuple(value for name, value in outputs.items() if name.endswith("_logits"))


def longest_first(encoded: Any, batch_size: int) -> list[np.ndarray]:
    """The rows' numbers of each batch: rows of like length, and memory runs out at once or never."""
    order = np.argsort(-np.array(encoded["length"][:]), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def passes(
    model: Any, encoded: Any, collate: Callable[..., Any], batch_size: int, progress: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor], Any]]:
    """The rows' numbers, the batch as it was collated, and what the model says, as and where it says it; the longest
    rows come first. The model is not given the labels."""
    model.eval()
    device = next(model.parameters()).device
    ordered = longest_first(encoded, batch_size)
    bar = report.bar(len(ordered), "Predicting", "batch", stays=False, show=progress)
    with torch.inference_mode(), bar:
        for rows in ordered:
            batch = collate(encoded.select(rows).to_list())
            yield rows, batch, model(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
            bar.update()


def batches(
    model: Any, encoded: Any, collate: Callable[..., Any], batch_size: int, progress: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor], torch.Tensor]]:
    """The rows' numbers, inputs and logits (float32, on the CPU) of each batch; the longest rows come first."""
    for rows, batch, outputs in passes(model, encoded, collate, batch_size, progress):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        yield rows, inputs, first_logits(outputs).float().cpu()


def logits_of(
    model: Any, encoded: Any, collate: Callable[..., Any], batch_size: int, progress: bool = False
) -> np.ndarray:
    """Logits ``[N, C]`` of models that give one vector a row."""
    found = [(rows, logits) for rows, _, logits in batches(model, encoded, collate, batch_size, progress)]
    logits = torch.cat([values for _, values in found]).numpy()
    restored = np.empty_like(logits)
    restored[np.concatenate([rows for rows, _ in found])] = logits
    return restored


def token_logits_of(
    model: Any, encoded: Any, collate: Callable[..., Any], batch_size: int, progress: bool = False
) -> list[np.ndarray]:
    """Logits ``[T, C]`` of each row, without padding, of models that give one vector a token."""
    found: dict[int, np.ndarray] = {}
    for rows, batch, logits in batches(model, encoded, collate, batch_size, progress):
        for row, values, mask in zip(rows, logits, batch["attention_mask"].bool(), strict=True):
            found[int(row)] = values[mask].numpy()
    return [found[row] for row in range(len(encoded))]


def shared_outputs(
    task: Any, model: Any, rows: Any, tokenizer: Any, batch_size: int, progress: bool = False
) -> Any:
    """``task.outputs`` of all rows, in their order, on every process; each computes its share of them."""
    state, count = PartialState(), len(rows)
    index, world = state.process_index, state.num_processes
    # As many rows, and so batches, for each process: a sharded model's forward passes go in step.
    share = [i % count for i in range(index, -(-count // world) * world, world)]
    part = task.outputs(model, rows.select(share), tokenizer, batch_size, progress=progress and index == 0)
    return in_order(gather_object([part]) if world > 1 else [part], count)


def in_order(parts: Sequence[Any], count: int) -> Any:
    """What several processes found, each for every ``len(parts)``-th row, as one: the first ``count`` rows."""
    if len(parts) == 1:
        return parts[0][:count]
    rows = [parts[i % len(parts)][i // len(parts)] for i in range(count)]
    return np.stack(rows) if isinstance(parts[0], np.ndarray) else rows

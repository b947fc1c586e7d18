"""The reference: a plain PyTorch training loop by hand, with every saving a careful author would make.

Batches bucketed by length, dynamic padding, bf16 autocast where the CPU has the instructions, SDPA, dropout
as in the checkpoint, AdamW with linear decay, gradients clipped at 1. LoRA is plain peft. No Trainer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import common
import torch
from torch.nn.utils import clip_grad_norm_


def bucketed(lengths: list[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """One epoch of batches of row numbers: shuffled, then sorted by length within buckets of 50 batches."""
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        bucket = sorted(order[start : start + 50 * batch_size], key=lengths.__getitem__)
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(batches)
    return iter(batches)


def collate(rows: list[list[int]], labels: list[int], pad: int) -> dict[str, torch.Tensor]:
    """Token ids [B, T] padded to the longest row of the batch, their mask [B, T], labels [B]."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
        "labels": torch.tensor(labels),
    }


def train(model: Any, ids: list[list[int]], labels: list[int], pad: int, args: Any) -> tuple[float, float]:
    """Train in place; the seconds, and the mean loss of the last ten steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=common.learning_rate(args), weight_decay=0.0)
    steps = args.epochs * -(-len(ids) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    lengths, rng, losses = [len(row) for row in ids], random.Random(args.seed), []
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() and not args.fp32

    model.train()
    start = time.perf_counter()
    for _ in range(args.epochs):
        for batch in bucketed(lengths, args.batch_size, rng):
            inputs = collate([ids[i] for i in batch], [labels[i] for i in batch], pad)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(**inputs).loss
            loss.backward()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return time.perf_counter() - start, sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    args = parser.parse_args()

    rows = common.read_rows("train", args.rows)
    model, tokenizer = common.load(args, lora=not args.full, attn_implementation="sdpa")
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=common.MAX_LENGTH)["input_ids"]
    labels = [row["label"] for row in rows]
    seconds, loss = train(model, ids, labels, tokenizer.pad_token_id, args)
    memory = common.peak_memory_mb()
    right = common.accuracy(model, tokenizer, common.read_rows("test")) if args.evaluate else None
    common.report(
        "loop",
        args,
        rows=len(rows),
        seconds=seconds,
        peak_memory=memory,
        final_loss=loss,
        test_accuracy=right,
    )


if __name__ == "__main__":
    main()

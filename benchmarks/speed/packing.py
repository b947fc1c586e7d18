"""Linear layers of SmolLM2's shapes with few rows: ``nn.Linear`` against the same with packed weights.

    python benchmarks/speed/packing.py [--rows 1 8 32] [--repeats 5]

Forty layers of each shape (two of the output layer), so that weights come from memory as they do in a model; the best
of the repeats, microseconds a layer. Nothing else should use the machine. Writes packing.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ptft_hf.models import packed_linears

SHAPES = {"attention": (576, 576), "up": (576, 1536), "down": (1536, 576), "output": (576, 49152)}


def microseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return 1e6 * min(found)


@torch.no_grad()
def measure(shape: tuple[int, int], rows: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    layers = nn.ModuleList(nn.Linear(*shape, bias=False, dtype=dtype) for _ in range(2 if shape[1] > 10_000 else 40))
    inputs = torch.randn(rows, shape[0], dtype=dtype)

    def run() -> None:
        for layer in layers:
            layer(inputs)

    plain = microseconds(run, repeats) / len(layers)
    with packed_linears(layers):
        packed = microseconds(run, repeats) / len(layers)
    return {"plain": plain, "packed": packed, "times": plain / packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found = {
        str(dtype).removeprefix("torch."): {
            f"{name}, {rows} rows": measure(shape, rows, dtype, args.repeats)
            for name, shape in SHAPES.items()
            for rows in args.rows
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    result = {"threads": torch.get_num_threads(), "microseconds": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for dtype, cells in found.items():
        for name, cell in cells.items():
            print(f"{dtype:9} {name:20} {cell['plain']:8.0f} {cell['packed']:8.0f}  {cell['times']:.2f} times")


if __name__ == "__main__":
    main()

"""Memory that oneDNN's code takes for each new shape of a product in bfloat16, measured alone.

    python -m benchmarks.planning.kernels [--threads 1] [--shapes 200]

It is ``kernels`` of :class:`ptft_hf.planning.memory.Calibration`. Each kind of product runs in so many shapes, in a
process of its own; *trimmed* is without what the allocator keeps of freed results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from ptft_hf.allocator import give_back_freed_memory
from ptft_hf.planning.machine import resident

WIDTH = 384
KINDS = ("forward", "of inputs", "of weights", "with bias", "batched")


def product(kind: str, rows: int, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if kind == "forward":
        return x[:rows] @ w.t()
    if kind == "of inputs":
        return x[:rows] @ w
    if kind == "of weights":
        return x[:rows].t() @ x[:rows]
    if kind == "with bias":
        return torch.addmm(w[0], x[:rows], w.t())
    return torch.bmm(x[: 32 * rows].view(32, rows, WIDTH), w.expand(32, WIDTH, WIDTH))


def measure(kind: str, shapes: int) -> str:
    x, w = torch.randn(32 * (shapes + 100), WIDTH).bfloat16(), torch.randn(WIDTH, WIDTH).bfloat16()
    product(kind, 99, x, w)
    before = resident()
    for rows in range(100, 100 + shapes):
        product(kind, rows, x, w)
    grown = resident() - before
    give_back_freed_memory()
    return f"{kind}: {grown / shapes / 1e6:.2f} MB a shape, trimmed {(resident() - before) / shapes / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind:
        print(measure(args.kind, args.shapes))
        return
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.planning.kernels", "--kind", kind]
        subprocess.run([*command, "--threads", str(args.threads), "--shapes", str(args.shapes)], check=True)


if __name__ == "__main__":
    main()

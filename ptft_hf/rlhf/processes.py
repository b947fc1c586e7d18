"""What the processes of a run share out among themselves, and how they put it together again."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptft_hf import forward


class Processes:
    """Each process has its share of an update's rows; all of them hold the whole update's numbers.

    Args:
        accelerator: accelerate's.
        bf16: Whether :meth:`autocast` is on.
    """

    def __init__(self, accelerator: Any, bf16: bool) -> None:
        self.accelerator, self.bf16 = accelerator, bf16
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        if self.device.type == "cpu":  # of several processes cpu:0, which fake tensors take for another device
            self.device = torch.device("cpu")

    def share(self, rows: range) -> range:
        """This process's rows."""
        return rows[self.rank :: self.world]

    def gathered(self, own: list[Any], count: int) -> list[Any]:
        """What all processes found for their shares, in the rows' order."""
        if self.world == 1:
            return own
        from accelerate.utils import gather_object

        return list(forward.in_order(gather_object([own]), count))

    def summed(self, value: Tensor) -> Tensor:
        """Added up over all processes."""
        return value if self.world == 1 else self.accelerator.reduce(value, "sum")

    def anyone(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.summed(torch.tensor(float(here), device=self.device)) > 0)

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """In one message. Parts on one base take turns in it, which DistributedDataParallel could not follow."""
        if self.world == 1 or not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.summed(torch.cat([g.flatten() for g in gradients]))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):  # type: ignore[no-untyped-call]
            gradient.copy_(total.view_as(gradient))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def run_as(verb: str) -> None:
    """``torchrun -m MODULE ...`` becomes ``ptft VERB ...``, with the messages and exit codes of the command."""
    sys.argv.insert(1, verb)
    runpy.run_module("ptft_hf", run_name="__main__")

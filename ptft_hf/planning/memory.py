"""From a run's sums to the most memory that its process will hold: plain arithmetic, stage by stage.

Training keeps weights ``W``, gradients ``G``, the optimizer's state ``O`` and what the backward pass needs. The
largest batch of the first step comes before there is a state, those of later steps after it::

    peak = baseline + W + max(first, O + later, G + O)

and with accumulated gradients ``G`` is there from a step's second batch on. ``first`` and ``later`` are counted, not
estimated (:mod:`ptft_hf.planning.counting`); what a count cannot see is added by :class:`Calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ptft_hf.planning.counting import GRADIENTS, OPTIMIZER, WEIGHTS, Counted
from ptft_hf.planning.machine import KEPT_KERNELS
from ptft_hf.planning.sums import Sums

BASELINE, CACHE, KERNELS, ALLOCATOR, LIBRARIES, TEXTS, READ, KEPT, LOADED, COMPARED = (
    "baseline",
    "frozen layers' activations",
    "kernels' code",
    "allocator",
    "libraries' buffers",
    "texts being written",
    "files being read",
    "held before",
    "weights loaded back",
    "logits that are compared",
)
"""Beside the kinds that are counted."""
Stage = dict[str, int]


class Calibration(NamedTuple):
    """What no count sees. The first two are fitted to measured runs (``python -m benchmarks.planning.run``).

    Attributes:
        libraries: Bytes of code and buffers that the first real step brings into memory.
        holes: The part that is lost of holes between what is held (:attr:`ptft_hf.planning.counting.Counted.holes`).
        kernels: Bytes of code for each half-precision product of matrices, of each shape: with oneDNN 0.5 to 0.7 MB,
            with one thread and two (``python -m benchmarks.planning.kernels``).
    """

    libraries: float
    holes: float
    kernels: float

    def terms(self, holes: float, products: int) -> Stage:
        """What it comes to, of bytes of holes, and shapes of products."""
        return {
            KERNELS: round(self.kernels * products),
            ALLOCATOR: round(self.holes * holes),
            LIBRARIES: round(self.libraries),
        }


HALF = Calibration(libraries=76e6, holes=0.27, kernels=0.5e6)
FLOAT = Calibration(libraries=20e6, holes=0.85, kernels=0.0)
"""Of runs in half precision and in float32 on a CPU."""
CUDA = Calibration(libraries=0.0, holes=0.05, kernels=0.0)
"""Not fitted: torch's allocator on a device counts what is allocated, in blocks of 512 bytes and more."""


def calibration_of(device: str, half: bool) -> Calibration:
    """Of a type of device, and of whether products are of half precision."""
    return CUDA if device != "cpu" else HALF if half else FLOAT


def stages(sums: Sums, baseline: int, calibration: Calibration = FLOAT, reads: int = 0) -> dict[str, Stage]:
    """Bytes of each term at the peak of each stage of a run, in their order.

    Args:
        sums: Of the run.
        baseline: Of the process with its libraries, data and tokenizer, before there is a model.
        calibration: See :func:`calibration_of`.
        reads: Bytes that are held of the checkpoint's files while its weights are loaded.
    """
    shared = {BASELINE: baseline}
    step, freed = largest(sums)
    training = {**shared, **step, CACHE: sums.cache}
    training |= calibration.terms(sums.holes, min(KEPT_KERNELS, sums.products))
    evaluated = {**shared, WEIGHTS: sums.weights, OPTIMIZER: sums.optimizer, CACHE: sums.cache}
    evaluated |= _above(sums.evaluation)
    evaluated |= {TEXTS: max(0, sums.written - (sums.evaluation.peak - sums.weights))} if sums.written else {}
    evaluated |= {name: training[name] for name in (KERNELS, LIBRARIES)}
    # What is freed in small pieces the allocator keeps; files are mapped into memory beside it.
    kept = sum(training.values()) - freed
    found = {
        "loading": {**shared, WEIGHTS: sums.weights, READ: reads},
        "training": training,
        "evaluation": evaluated,
        "best checkpoint": {KEPT: kept, READ: sums.saved} if sums.reads_best else {},
    }
    # The optimizer's state is let go, and what the allocator kept handed back.
    in_float32 = {**shared, WEIGHTS: sums.parameters, **{name: training[name] for name in (KERNELS, LIBRARIES)}}
    evaluated = in_float32 | _above(sums.evaluation.scaled(2 if sums.half else 1))
    proven = {**in_float32, COMPARED: sums.compared, LOADED: sums.parameters, READ: reads}
    return {**found, "proof": max(evaluated, proven, key=lambda terms: sum(terms.values()))}


def largest(sums: Sums) -> tuple[Stage, int]:
    """The terms of the step that takes most, see the module; and what of it goes back to the system at its end."""
    candidates = [(_with(sums.first, 0, sums), sums.first.large)]
    later = [one for one in (sums.later, sums.short) if one is not None]
    candidates += [(_with(one, sums.optimizer, sums), one.large) for one in later]
    step = {WEIGHTS: sums.weights, GRADIENTS: sums.gradients, OPTIMIZER: sums.optimizer}
    found, large = max([*candidates, (step, sums.stepping.large)], key=lambda pair: sum(pair[0].values()))
    return {name: size for name, size in found.items() if size}, large


def _with(counted: Counted, optimizer: int, sums: Sums) -> Stage:
    terms = {WEIGHTS: sums.weights, GRADIENTS: 0, OPTIMIZER: optimizer, **_above(counted)}
    if sums.schedule.micro > 1:
        terms[GRADIENTS] = sums.gradients
    return terms


def _above(counted: Counted) -> Stage:
    """What is held beside the weights."""
    return {kind: size for kind, size in counted.kinds.items() if kind != WEIGHTS}


def peak(found: Mapping[str, Stage], *, proof: bool = False) -> int:
    """Bytes of the largest stage; that of the proof and of the evaluation before it, which come when a run's peak has
    been taken, on demand."""
    return max(sum(terms.values()) for name, terms in found.items() if proof or name != "proof")

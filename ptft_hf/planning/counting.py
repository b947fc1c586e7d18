"""What a computation holds in memory and multiplies, counted without carrying it out.

Inside :class:`Counter` floating-point tensors have shapes and no values (torch's ``FakeTensorMode``), so that neither
weights nor activations take memory or time. The real model, loss, backward pass and optimizer run on them, and every
storage is counted from its making to its end: the sums are those of any architecture and method, and of what autograd
saves for them, without a formula for each.
"""

from __future__ import annotations

import bisect
import math
import warnings
import weakref
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
COPIES, LOGITS, ACTIVATIONS = "precision copies", "logits", "activations"
FIXED = (WEIGHTS, GRADIENTS, OPTIMIZER, COPIES)
"""Kinds that do not grow with a batch."""
LARGE = 32 << 20
"""Bytes from which on glibc hands freed memory back to the system; smaller pieces it keeps for the next."""
HALF = (torch.bfloat16, torch.float16)

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward)
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (0, 1, 2, 1.0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 2, 3, 2.5),
}
"""Where query, key and value stand, and products beside those of a forward pass; torch knows the CUDA ones."""


class Counted(NamedTuple):
    """What one stretch of work took.

    Attributes:
        peak: Most bytes that were held at a time, what was there before included.
        kinds: Bytes of each kind at that time.
        large: Those of them, weights and optimizer left out, in pieces of 32 MiB and more.
        holes: Bytes of smaller pieces that were freed by that time below something made after them that was still
            held: an aligned piece asks for more than it keeps and often does not fit into the hole that one of its
            size has left, so that glibc's heap grows.
            No more than what was held, between which they lie.
        freed: Bytes of all smaller pieces that were freed by that time.
        flops: Floating-point operations of products of matrices, two for each multiplication and addition.
        moved: Bytes that all operations read and wrote.
        operations: How many there were.
        products: Products of matrices in half precision, by what and of which shapes: a CPU keeps code for each.
    """

    peak: int
    kinds: dict[str, int]
    large: int
    holes: int
    freed: int
    flops: float
    moved: float
    operations: int
    products: frozenset[Any]


    def scaled(self, factor: float) -> Counted:
        """The same work on so many times as much, the weights staying what they are."""
        kinds = {kind: size if kind in FIXED else round(size * factor) for kind, size in self.kinds.items()}
        return self._replace(
            peak=sum(kinds.values()),
            kinds=kinds,
            large=round(self.large * factor),
            holes=round(self.holes * factor),
            freed=round(self.freed * factor),
            flops=self.flops * factor,
            moved=self.moved * factor,
        )


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode of torch; see the module.

    Integers, truth values and all that is made of them alone (ids, positions, masks) stay real, so that code may ask
    for their values. A question for the value of a number that is not there is answered with 1; whether two tensors
    that are not there are near each other, with yes, and whether they are equal, with no.

    Attributes:
        kind: What storages that are made now count as.
        vocabulary: The last dimension of logits, which are told by it; 0 where there are none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kind = WEIGHTS
        self.vocabulary = 0
        self._held: dict[int, tuple[Any, int, str]] = {}
        self._live: Tally[str] = Tally()
        self._large: Tally[str] = Tally()
        self._start()

    def __enter__(self) -> Any:
        nn.Module._apply = _moved  # type: ignore[method-assign]
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # upstream's own deep copies
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        nn.Module._apply = _apply  # type: ignore[method-assign]
        self._warnings.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Upstream's guard against being compiled, which costs more than most of what is counted."""
        return False

    # ---- reading ----

    @property
    def live(self) -> int:
        """Bytes that are held now."""
        return sum(self._live.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes of each kind that are held now."""
        return {kind: size for kind, size in self._live.items() if size}

    @contextmanager
    def counting(self, kind: str = ACTIVATIONS) -> Iterator[Callable[[], Counted]]:
        """Count what is done inside, its storages as of this kind; the function gives the result so far."""
        before, self.kind = self.kind, kind
        self._start()
        try:
            yield self.counted
        finally:
            self.kind = before

    def counted(self) -> Counted:
        return Counted(
            self._peak,
            {kind: size for kind, size in self._at_peak.items() if size},
            sum(size for kind, size in self._large_at_peak.items() if kind not in (WEIGHTS, OPTIMIZER)),
            *self._holes_and_freed(),
            self._flops,
            self._moved,
            self._operations,
            frozenset(self._products),
        )

    def call(self, kind: str, *tensors: torch.Tensor) -> None:
        """Count the storages of these as of a kind from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (entry := self._held.get(storage._cdata)) is not None:
                reference, size, before = entry
                self._add(before, -size)
                self._add(kind, size)
                self._held[storage._cdata] = (reference, size, kind)
            else:
                self._hold(storage, kind)

    def forget_kinds(self) -> None:
        """Count all that is held now as weights: what stays when a model has been built."""
        for key, (reference, size, _) in list(self._held.items()):
            self._held[key] = (reference, size, WEIGHTS)
        self._live, self._large = Tally({WEIGHTS: self.live}), Tally({WEIGHTS: sum(self._large.values())})

    # ---- counting ----

    def _start(self) -> None:
        self._peak, self._at_peak, self._large_at_peak = self.live, dict(self._live), dict(self._large)
        self._made: dict[int, list[float]] = {}
        self._pieces: list[list[float]] = []
        self._time = self._time_of_peak = 0
        self._flops = self._moved = 0.0
        self._operations = 0
        self._products: set[Any] = set()

    def _hold(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            if (entry := self._held.pop(key, None)) is not None:
                self._add(entry[2], -entry[1])
                self._time += 1
                self._made.pop(key, [0, 0, 0])[1] = self._time

        self._held[key] = (weakref.ref(storage, freed), size, kind)
        self._add(kind, size)
        self._time += 1
        if size < LARGE:
            self._made[key] = [self._time, math.inf, size]  # until when is not known
            self._pieces.append(self._made[key])
        if (live := self.live) > self._peak:
            self._peak, self._at_peak, self._large_at_peak = live, dict(self._live), dict(self._large)
            self._time_of_peak = self._time

    def _holes_and_freed(self) -> tuple[int, int]:
        """See :attr:`Counted.holes`."""
        peak = self._time_of_peak
        held = [made for made, freed, _ in self._pieces if made <= peak < freed]
        holes = total = 0.0
        for made, freed, size in self._pieces:
            if freed <= peak:
                total += size
                above = bisect.bisect_right(held, made)
                holes += size if above < len(held) and held[above] < freed else 0
        most = sum(size for kind, size in self._at_peak.items() if kind not in (WEIGHTS, OPTIMIZER))
        return int(min(holes, most)), int(total)

    def _add(self, kind: str, size: int) -> None:
        self._live[kind] += size
        if abs(size) >= LARGE:
            self._large[kind] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # by far the most frequent question
            return getattr(args[0], "fake_device", None) or func(*args)
        kwargs = dict(kwargs or {})
        inputs = list(_tensors((args, kwargs)))
        result = self._run(func, types, args, kwargs, inputs)
        self._see(func, args, inputs, result)
        return result

    def _run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> Any:
        if not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            if inputs:
                return func(*args, **kwargs)
            made = self.fake.dispatch(func, types, args, kwargs)
            floating = [t.is_floating_point() or t.is_complex() for t in _tensors(made)]
            return made if any(floating) else func(*args, **kwargs)
        name = func._schema.name
        if name.endswith("_") and isinstance(args[0], FakeTensor):  # changed in place, and nothing is made
            return args[0] if func._schema.returns else None
        if func is aten._local_scalar_dense.default:
            return 1.0 if inputs[0].is_floating_point() else 1
        if func in (aten.allclose.default, aten.equal.default):
            return func is aten.allclose.default
        if func in (aten.index.Tensor, aten.index_put.default):
            args = (args[0], _places(args[1]), *args[2:])
        return self.fake.dispatch(func, types, args, kwargs)

    def _see(self, func: Any, args: Sequence[Any], inputs: list[torch.Tensor], result: Any) -> None:
        self._operations += 1
        new = 0
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._hold(storage, self._kind_of(func, inputs, tensor))
                new += storage.nbytes()
        packet = func._overloadpacket
        if new or func._schema.is_mutable:
            self._moved += new + sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        if packet in PRODUCTS:
            self._flops += flop_registry[packet](*args, out_val=result)
            if inputs[0].dtype in HALF:
                self._products.add((packet.__name__, *(tuple(tensor.shape) for tensor in inputs[-2:])))
        elif packet in ATTENTION:
            q, k, v, times = ATTENTION[packet]
            rows, heads, length, size = args[q].shape
            self._flops += times * 2 * rows * heads * length * args[k].shape[2] * (size + args[v].shape[3])
        elif packet in flop_registry:
            self._flops += flop_registry[packet](*args, out_val=result)

    def _kind_of(self, func: Any, inputs: list[torch.Tensor], made: torch.Tensor) -> str:
        if self.kind != ACTIVATIONS:
            return self.kind
        if self.vocabulary and made.dim() > 1 and made.shape[-1] == self.vocabulary:
            return LOGITS
        if func is aten._to_copy.default:
            source = self._held.get(inputs[0].untyped_storage()._cdata)
            return COPIES if source is not None and source[2] == WEIGHTS else ACTIVATIONS
        return ACTIVATIONS


_apply: Callable[..., nn.Module] = nn.Module._apply


def _moved(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """What ``to``, ``float`` and their like do. Upstream's swaps tensors without values for others and fails, since
    torch itself keeps weak references to some."""
    if not any(isinstance(p, FakeTensor) for p in module._parameters.values()):
        return _apply(module, change, recurse)
    for child in module.children() if recurse else ():
        child._apply(change)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in [p for p in module._parameters.values() if p is not None]:
            if (made := change(parameter)) is not parameter:
                parameter.data = made
                parameter.fake_device = made.fake_device  # type: ignore[attr-defined]
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else change(value)
    return module


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _places(indices: Sequence[Any]) -> list[Any]:
    """Indices of which real masks are spelled out, so that the result's shape is known."""
    found: list[Any] = []
    for index in indices:
        real = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if real and index.dtype is torch.bool else [index]
    return found


def size_of(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

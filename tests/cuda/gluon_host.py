"""Gluon kernels for Hopper on the host: their own source runs, a thread for each warpgroup, over host tensors.

Triton's interpreter does not know Gluon. Here a kernel's functions run as plain Python with stand-ins for what Gluon
offers: layouts mean nothing, memory barriers count arrivals and bytes as the hardware's do, and products are made when
they are waited for, as late as the hardware may: a stage of shared memory that is given back too early shows. Not seen:
which thread holds what, and what a compiler does.
"""

from __future__ import annotations

import builtins
import ctypes
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "u8": torch.uint8}
#: Seconds after which a barrier that nobody completes is a deadlock.
PATIENCE = 30.0
_changed = threading.Condition()
_of_thread = threading.local()


def memory(address: int, count: int, kind: torch.dtype) -> Tensor:
    """Host memory as a flat tensor."""
    return torch.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(address), dtype=kind)


class Map:
    """A tensor map: blocks are read with zeros outside the tensor, and written inside it alone."""

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int], form: tuple[list[int], str]) -> None:
        self.block, self.dtype = form[0], KINDS[form[1]]
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self.tensor = memory(address, count, self.dtype).as_strided(tuple(shape), tuple(strides))
        size = self.dtype.itemsize
        for n in self.block:
            size *= n
        self.block_type, self.layout = types.SimpleNamespace(nbytes=size), None

    def _cut(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        starts = [int(x) for x in at]
        sizes = [
            max(min(n, total - start), 0) for n, total, start in zip(self.block, self.tensor.shape, starts, strict=True)
        ]
        there = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        return there, tuple(slice(0, size) for size in sizes)

    def read(self, at: Sequence[Any]) -> Tensor:
        there, here = self._cut(at)
        block = torch.zeros(self.block, dtype=self.dtype)
        block[here] = self.tensor[there]
        return block

    def write(self, at: Sequence[Any], block: Tensor, add: bool = False) -> None:
        there, here = self._cut(at)
        with _changed:
            self.tensor[there] = self.tensor[there] + block[here] if add else block[here]


class Shared:
    """A part of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), int(length)))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert (value.dtype, value.shape) == (self.dtype, self.data.shape)
        self.data.copy_(value)


class Barrier:
    """A memory barrier: its phase ends when all arrivals and all bytes that were announced have come."""

    def __init__(self, parts: list[Barrier] | None = None) -> None:
        self.parts = parts or []
        self.count = self.pending = self.bytes = self.phase = 0

    def index(self, place: Any) -> Barrier:
        return self.parts[int(place)]

    def first(self) -> Barrier:
        return self.parts[0] if self.parts else self

    def change(self, arrivals: int, size: int) -> None:
        with _changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than the barrier was made for"
            if not self.pending and not self.bytes:
                self.phase, self.pending = self.phase + 1, self.count
                _changed.notify_all()

    def wait(self, parity: Any) -> None:
        with _changed:
            assert _changed.wait_for(lambda: self.phase % 2 != int(parity), PATIENCE), "no one completes a barrier"


class Pointer(NamedTuple):
    """Global memory: its numbers, and which of them are meant."""

    numbers: Tensor
    place: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.numbers, self.place + more)


class Product:
    """a b + sums, not yet made."""

    def __init__(self, a: Any, b: Shared, sums: Any) -> None:
        self.given, self.value, self.dtype = (a, b, sums), torch.empty(0), torch.float32

    def make(self) -> None:
        a, b, sums = (x.value if isinstance(x, Product) else x.data if isinstance(x, Shared) else x for x in self.given)
        self.value = sums + a.float() @ b.float()


def warpgroup_mma(a: Any, b: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    made = Product(a, b, sums if use_acc else torch.zeros_like(sums))
    _of_thread.products.append(made)
    return made


def warpgroup_mma_wait(left: int, deps: Sequence[Any]) -> Any:
    waiting = _of_thread.products
    while len(waiting) > left:
        waiting.pop(0).make()
    done = [x.value if isinstance(x, Product) and x not in waiting else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def _to_shared(source: Map, at: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    target.store(source.read(at))
    barrier.first().change(0, -source.block_type.nbytes)


def _init(barrier: Barrier, count: int) -> None:
    one = barrier.first()
    one.count = one.pending = count


MBARRIER = types.SimpleNamespace(
    MBarrierLayout=lambda: Barrier,
    init=_init,
    expect=lambda barrier, size: barrier.first().change(1, int(size)),
    arrive=lambda barrier, count: barrier.first().change(count, 0),
    wait=lambda barrier, parity, pred=True: barrier.first().wait(parity) if pred else None,
)
TMA = types.SimpleNamespace(
    async_copy_global_to_shared=_to_shared,
    async_copy_shared_to_global=lambda target, at, source: target.write(at, source.data),
    store_wait=lambda left: None,
)


def _tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


def _counted(*bounds: Any) -> Iterator[Tensor]:
    return (torch.tensor(n) for n in builtins.range(*(int(n) for n in bounds)))


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    place = _tensor(at.place).long()
    if mask is None:
        return at.numbers[place]
    return torch.where(mask, at.numbers[torch.where(mask, place, 0)], other)


def _atomic_add(at: Pointer, value: Tensor, sem: str) -> None:
    with _changed:
        at.numbers.view(-1).index_put_((_tensor(at.place).long(),), value, accumulate=True)


def _asm(text: Any, constraints: Any, args: Sequence[Any], **options: Any) -> Any:
    assert "global" not in str(text), "sums in order are not emulated"
    return args[0]


def _allocate(kind: Any, shape: Sequence[int], layout: Any) -> Any:
    if layout is Barrier:
        return Barrier([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(list(shape), 77, dtype=kind))  # what is read before it is written shows


def _specialize(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    failures: list[BaseException] = []

    def run(part: Callable[..., None], given: tuple[Any, ...]) -> None:
        _of_thread.products = []
        try:
            part(*given)
            assert not _of_thread.products, "a product that nobody waits for"
        except BaseException as failure:  # raised again where the threads are joined
            failures.append(failure)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _layout(*given: Any, **named: Any) -> None:
    return None


_layout.get_default_for = _layout  # type: ignore[attr-defined]
_LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "NVMMASharedLayout")
PROGRAM = [0]
GL = types.SimpleNamespace(
    **dict.fromkeys(_LAYOUTS, _layout),
    **{str(kind)[6:]: kind for kind in (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64)},
    constexpr=lambda x: x,
    static_range=builtins.range,
    program_id=lambda axis: torch.tensor(PROGRAM[0]),
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    inline_asm_elementwise=_asm,
    to_tensor=lambda x: x,
    zeros=lambda shape, kind, layout: torch.zeros(list(shape), dtype=kind),
    arange=lambda first, end, layout: torch.arange(first, end),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    exp2=torch.exp2,
    abs=torch.abs,
    where=lambda where, a, b: torch.where(_tensor(where), a, b),
    maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
    minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
    load=_load,
    atomic_add=_atomic_add,
)
_STAND_INS: dict[str, Any] = {
    "gl": GL,
    "gluon": gluon,
    "mbarrier": MBARRIER,
    "tma": TMA,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
    "reduce_add": lambda target, at, source: target.write(at, source.data, add=True),
    "range": _counted,
}


def on_host(kernel: Any, modules: Sequence[str]) -> Callable[..., None]:
    """The kernel as a Python function; modules: the names of all that hold its functions."""
    spaces = {name: dict(sys.modules[name].__dict__) | _STAND_INS for name in modules}
    made: dict[int, Any] = {}
    for name, space in spaces.items():
        for each in sys.modules[name].__dict__.values():
            if isinstance(each, GluonJITFunction) and each.fn.__module__ == name:
                made[id(each)] = types.FunctionType(each.fn.__code__, space, each.fn.__name__, each.fn.__defaults__)
    for space in spaces.values():
        for name, value in list(space.items()):
            if name not in _STAND_INS:
                space[name] = made.get(id(value), value.value if type(value).__name__ == "constexpr" else value)
    return made[id(kernel)]  # type: ignore[no-any-return]


class HostKernel:
    """In place of a compiled kernel, `binaries.Kernel`: maps: block and type of each tensor map."""

    def __init__(
        self, function: Callable[..., None], signature: dict[str, str], config: Any, sizes: dict[str, int]
    ) -> None:
        self._function, self._config, self._signature, self._sizes = function, config, signature, sizes
        found = (re.match(r"tensordesc<(\w+)\[([\d, ]+)\]", kind) for kind in signature.values())
        self.maps = [([int(n) for n in each[2].split(",")], each[1]) for each in found if each]

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: Sequence[Any]) -> None:
        given: list[Any] = []
        for (name, kind), value in zip(self._signature.items(), arguments, strict=False):
            if kind.startswith("*"):
                given.append(Pointer(memory(value, self._sizes.get(name, 1 << 20), KINDS[kind[1:]])) if value else None)
            else:
                given.append(value if isinstance(value, (Map, float)) else torch.tensor(value))
        for program in range(grid[0]):
            PROGRAM[0] = program
            self._function(*given, self._config)

"""Fields on periodic grids by the compiled kernels: the flows and the Euler characteristic of hal-compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .call import NativeRefusal, refuse
from .library import ISAS, load, share_torchs_threads

#: Fields that a step of each kernel moves; none: it counts.
FIELDS = {"reaction_diffusion": 2, "ricci": 1, "euler": 0}


def fields_workspace_bytes(name: str, shape: tuple[int, int, int], threads: int) -> int:
    """Bytes of workspace that a kernel of `FIELDS` needs for fields [systems, height, width].

    Raises:
        NativeRefusal: a shape or a number of threads that is not taken, or there is no library.
    """
    needed = int(_library().hal_cpu_native_fields_workspace(FIELDS[name], *shape, threads))
    return needed if needed >= 0 else refuse(-needed)


def reaction_diffusion(
    u: Tensor,
    v: Tensor,
    numbers: Sequence[float],
    *,
    steps: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Explicit steps of an activator and an inhibitor, as hal-compute's kernel reaction_diffusion_step takes them.

    Args:
        u, v: [..., height, width], float32, contiguous. numbers: dt, diffusion of u and of v, reaction, epsilon, decay,
            offset; their limits are the caller's to check.
        steps: how many. out: written and returned, like u and v; None: new tensors.
        workspace: contiguous, of at least `fields_workspace_bytes`, aligned to 64 bytes; None: allocated.
        threads: at most so many; None: as many as torch uses. The result does not depend on them.
        isa: one of `instruction_sets()`; None: the fastest.

    Raises:
        NativeRefusal: the kernels do not take the call, or are not there.
    """
    library, out = _library(), out or (torch.empty_like(u), torch.empty_like(v))
    if len(numbers) != 7:
        raise NativeRefusal(f"{len(numbers)} numbers were given: 7 are taken, dt to offset")
    shape = _shape(u, v, *out)
    threads, memory = _prepared("reaction_diffusion", shape, workspace, threads)
    _done(
        library.hal_cpu_native_reaction_diffusion(
            *(t.data_ptr() for t in (u, v, *out, memory)),
            memory.nbytes,
            *shape,
            steps,
            (ctypes.c_double * 7)(*numbers),
            threads,
            _number_of(isa),
        )
    )
    return out


def ricci(
    phi: Tensor,
    dt: float,
    *,
    steps: int = 1,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """Explicit steps of Ricci flow of exp(2 phi) * identity, as hal-compute's kernel ricci_flow_step takes them.

    Args:
        phi: [..., height, width], float32, contiguous. dt: its limit is the caller's to check. The others are those of
            `reaction_diffusion`.

    Raises:
        NativeRefusal: the kernels do not take the call, or are not there.
    """
    library, out = _library(), torch.empty_like(phi) if out is None else out
    shape = _shape(phi, out)
    threads, memory = _prepared("ricci", shape, workspace, threads)
    pointers = phi.data_ptr(), out.data_ptr(), memory.data_ptr(), memory.nbytes
    _done(library.hal_cpu_native_ricci(*pointers, *shape, steps, dt, threads, _number_of(isa)))
    return out


def euler(
    field: Tensor,
    levels: Tensor,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """Corners minus edges plus pixels of the closed pixels of at least a level, by rows of the grid of corners: their
    sum over rows is the Euler characteristic.

    Args:
        field: [..., height, width], float32, contiguous; NaN belongs to no set. levels: [T], float32, contiguous.
        out: written and returned, int32 [..., T, height + 1], contiguous; None: a new tensor. The others are those of
            `reaction_diffusion`.

    Raises:
        NativeRefusal: the kernels do not take the call, or are not there.
    """
    library, shape = _library(), _shape(field)
    if levels.dtype != torch.float32 or levels.dim() != 1 or not len(levels) or not levels.is_contiguous():
        raise NativeRefusal(
            f"levels {list(levels.shape)} of {levels.dtype} were given: contiguous float32 [T] is taken"
        )
    wanted = (*field.shape[:-2], len(levels), shape[1] + 1)
    out = torch.empty(wanted, dtype=torch.int32) if out is None else out
    if out.dtype != torch.int32 or out.shape != wanted or not out.is_contiguous():
        raise NativeRefusal(f"out {list(out.shape)} of {out.dtype} was given: contiguous int32 {list(wanted)} is taken")
    threads, memory = _prepared("euler", shape, workspace, threads)
    pointers = field.data_ptr(), levels.data_ptr(), out.data_ptr(), memory.data_ptr(), memory.nbytes
    _done(library.hal_cpu_native_euler(*pointers, shape[0], len(levels), *shape[1:], threads, _number_of(isa)))
    return out


def _library() -> ctypes.CDLL:
    library, why, _ = load()
    if library is None:
        raise NativeRefusal(why)
    return library


def _shape(*fields: Tensor) -> tuple[int, int, int]:
    """(systems, height, width) of fields that lie alike."""
    first = fields[0]
    for field in fields:
        if field.dtype != torch.float32 or field.device.type != "cpu" or not field.is_contiguous():
            raise NativeRefusal(
                f"a field of {field.dtype} on {field.device} was given: contiguous float32 on the CPU is taken"
            )
        if field.shape != first.shape or field.dim() < 2 or not field.numel():
            given = f"fields {list(first.shape)} and {list(field.shape)} were given"
            raise NativeRefusal(f"{given}: one shape [..., height, width] is taken")
    height, width = first.shape[-2:]
    return first.numel() // (height * width), height, width


def _prepared(
    name: str, shape: tuple[int, int, int], workspace: Tensor | None, threads: int | None
) -> tuple[int, Tensor]:
    share_torchs_threads()
    threads = torch.get_num_threads() if threads is None else threads
    if workspace is None:
        workspace = torch.empty(fields_workspace_bytes(name, shape, threads), dtype=torch.uint8)
    return threads, workspace


def _number_of(isa: str | None) -> int:
    if isa is not None and isa not in ISAS:
        raise NativeRefusal(f"instruction set {isa!r} is unknown: {', '.join(ISAS)} are known")
    return 0 if isa is None else ISAS[isa]


def _done(status: int) -> None:
    if status:
        refuse(status)

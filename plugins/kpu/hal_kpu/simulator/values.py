"""Values of products from the PEs: inside `array_values`, torch's matrix products and convolutions run on the stepped
array.

Whatever an opcode does besides, bias and shapes for instance, stays torch's. Convolutions become products over gathered
windows, their gradients too. Complex products stay torch's: no array of the machine multiplies them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..profiles.profile import Profile
from .array import Dataflow, multiply

aten = torch.ops.aten


@attrs.define
class Counted:
    """What the PEs did. products: how many; active_macs, firings: as in `Wavefront`; array_cycles: tiles one by one."""

    products: int = 0
    active_macs: int = 0
    firings: int = 0
    array_cycles: int = 0


@contextmanager
def array_values(profile: Profile, dataflow: Dataflow = "os", *, dtype: str | None = None) -> Iterator[Counted]:
    """Products inside run on one array of the profile, tile after tile, every PE stepped.

    Args:
        dtype: of the operands, which chooses the kind of array, where they are held in a wider type; None: their own.
    """
    mode = _ArrayMode(profile, dataflow, dtype)
    with mode:
        yield mode.counted


class _ArrayMode(TorchDispatchMode):
    def __init__(self, profile: Profile, dataflow: Dataflow, dtype: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.profile, self.dataflow, self.counted = profile, dataflow, Counted()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        given = [item for item in args if isinstance(item, Tensor)]
        plain = all(item.device.type == "cpu" and not item.is_complex() and item.numel() for item in given)
        if rule is None or not plain:
            return func(*args, **(kwargs or {}))
        return rule(self, *args, **(kwargs or {}))

    def product(self, a: Tensor, b: Tensor, exact: bool = False) -> Tensor:
        """[batch, M, K] by [batch, K, N], in the operands' type; in the accumulators' type where `exact`."""
        rows, cols, _ = self.profile.arrays(self.dtype or str(a.dtype).removeprefix("torch."))
        wide = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (a, b)]
        done = multiply(wide[0].numpy(), wide[1].numpy(), rows, cols, self.dataflow)
        self.counted.products += 1
        self.counted.active_macs += done.active_macs
        self.counted.firings += done.firings
        self.counted.array_cycles += int(done.tile_cycles.sum())
        found = torch.from_numpy(done.product)
        return found if exact else found.to(a.dtype)


def _mm(mode: _ArrayMode, a: Tensor, b: Tensor) -> Tensor:
    return mode.product(a[None], b[None])[0]


def _int_mm(mode: _ArrayMode, a: Tensor, b: Tensor) -> Tensor:
    return mode.product(a[None], b[None], exact=True)[0]


def _bmm(mode: _ArrayMode, a: Tensor, b: Tensor) -> Tensor:
    return mode.product(a, b)


def _bmm_out(mode: _ArrayMode, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(mode.product(a, b))


def _mv(mode: _ArrayMode, a: Tensor, v: Tensor) -> Tensor:
    return mode.product(a[None], v[None, :, None])[0, :, 0]


def _dot(mode: _ArrayMode, a: Tensor, b: Tensor) -> Tensor:
    return mode.product(a[None, None], b[None, :, None])[0, 0, 0]


def _addmm(mode: _ArrayMode, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _baddbmm(mode, start, a[None], b[None], beta=beta, alpha=alpha)[0]


def _baddbmm(mode: _ArrayMode, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    total = mode.product(a, b, exact=True) * alpha
    return (total + start * beta if beta else total).to(a.dtype)


def _windows(x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """[n, c, *space] -> [n, c, *positions, *window], a view."""
    space, steps = x.shape[2:], x.stride()[2:]
    axes = list(zip(space, size, stride, dilation, strict=True))
    positions = [(extent - d * (k - 1) - 1) // s + 1 for extent, k, s, d in axes]
    shape = [*x.shape[:2], *positions, *size]
    strides = [*x.stride()[:2], *(a * s for a, s in zip(steps, stride, strict=True))]
    return x.as_strided(shape, [*strides, *(a * d for a, d in zip(steps, dilation, strict=True))], x.storage_offset())


def _pad(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    pairs = list(itertools.chain.from_iterable(reversed(list(zip(before, after, strict=True)))))
    return F.pad(x, pairs).contiguous()


def _direct(
    mode: _ArrayMode, x: Tensor, w: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """A convolution without padding, as `groups` products [positions, window] by [window, channels]."""
    size, (n, channels) = w.shape[2:], x.shape[:2]
    view = _windows(x.contiguous(), size, stride, dilation)
    positions = view.shape[2 : 2 + len(size)]
    view = view.reshape(n, groups, channels // groups, math.prod(positions), math.prod(size))
    gathered = view.permute(1, 0, 3, 2, 4).reshape(groups, n * math.prod(positions), -1)
    weights = w.reshape(groups, w.shape[0] // groups, -1).transpose(1, 2)
    out = mode.product(gathered, weights, exact=True).reshape(groups, n, math.prod(positions), -1)
    return out.permute(1, 0, 3, 2).reshape(n, w.shape[0], *positions)


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Zeros between the elements of each axis of space."""
    size = [(extent - 1) * s + 1 for extent, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros([*x.shape[:2], *size])
    out[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return out


def _flipped(w: Tensor, groups: int) -> Tensor:
    """Weights of the opposite direction: mirrored windows, [in, out] for [out, in] in every group."""
    mirrored = w.flip(list(range(2, w.dim())))
    split = mirrored.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2)
    return split.reshape(groups * w.shape[1], w.shape[0] // groups, *w.shape[2:])


def _transposed(mode: _ArrayMode, x: Tensor, w: Tensor, conv: _Convolution) -> Tensor:
    reach = [d * (k - 1) for d, k in zip(conv.dilation, w.shape[2:], strict=True)]
    before = [r - p for r, p in zip(reach, conv.padding, strict=True)]
    after = [b + more for b, more in zip(before, conv.output_padding, strict=True)]
    return _direct(
        mode,
        _pad(_spread(x, conv.stride), before, after),
        _flipped(w, conv.groups),
        [1] * len(reach),
        conv.dilation,
        conv.groups,
    )


@attrs.frozen
class _Convolution:
    """How a convolution goes over its input."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def run(self, mode: _ArrayMode, x: Tensor, w: Tensor) -> Tensor:
        if self.transposed:
            return _transposed(mode, x, w, self)
        return _direct(mode, _pad(x, self.padding, self.padding), w, self.stride, self.dilation, self.groups)


def _convolution(mode: _ArrayMode, x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    out = _Convolution(*_axes(how, x.dim() - 2)).run(mode, x, w)
    if bias is not None:
        out = out + bias.reshape(-1, *[1] * (x.dim() - 2))
    return out.to(x.dtype)


def _axes(how: Sequence[Any], number: int) -> list[Any]:
    """(stride, padding, dilation, transposed, output_padding, groups) with one entry for each axis of space."""
    return [list(item) * number if isinstance(item, (list, tuple)) and len(item) == 1 else item for item in how]


def _convolution_backward(
    mode: _ArrayMode,
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    conv = _Convolution(*_axes((stride, padding, dilation, transposed, output_padding, groups), x.dim() - 2))
    grad_x = _input_gradient(mode, grad, x, w, conv).to(x.dtype) if mask[0] else None
    grad_w = _weight_gradient(mode, grad, x, w, conv).to(w.dtype) if mask[1] else None
    grad_bias = grad.sum([0, *range(2, grad.dim())]) if mask[2] else None
    return grad_x, grad_w, grad_bias


def _input_gradient(mode: _ArrayMode, grad: Tensor, x: Tensor, w: Tensor, conv: _Convolution) -> Tensor:
    if conv.transposed:
        found = _direct(mode, _pad(grad, conv.padding, conv.padding), w, conv.stride, conv.dilation, conv.groups)
        for axis, size in enumerate(x.shape[2:]):  # output_padding may leave room for one more
            found = found.narrow(2 + axis, 0, size)
        return found
    axes = zip(x.shape[2:], grad.shape[2:], conv.stride, conv.padding, conv.dilation, w.shape[2:], strict=True)
    left = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in axes]
    return _transposed(mode, grad, w, attrs.evolve(conv, output_padding=left))


def _weight_gradient(mode: _ArrayMode, grad: Tensor, x: Tensor, w: Tensor, conv: _Convolution) -> Tensor:
    """Windows of the larger side times the smaller side, summed over positions."""
    wide, narrow = (grad, x) if conv.transposed else (x, grad)
    size, groups, n = w.shape[2:], conv.groups, x.shape[0]
    view = _windows(_pad(wide, conv.padding, conv.padding), size, conv.stride, conv.dilation)
    for axis, extent in enumerate(narrow.shape[2:]):
        view = view.narrow(2 + axis, 0, extent)
    positions = math.prod(narrow.shape[2:])
    view = view.reshape(n, groups, wide.shape[1] // groups, positions, math.prod(size))
    a = view.permute(1, 2, 4, 0, 3).reshape(groups, -1, n * positions)
    b = narrow.reshape(n, groups, -1, positions).permute(1, 0, 3, 2).reshape(groups, n * positions, -1)
    found = mode.product(a, b, exact=True).reshape(groups, wide.shape[1] // groups, *size, -1)
    return found.movedim(-1, 1).reshape(w.shape)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten._int_mm.default: _int_mm,
    aten.bmm.default: _bmm,
    aten.bmm.out: _bmm_out,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}

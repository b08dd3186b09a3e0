"""Kernels beside attention in torch's operators, which share rows among threads, by bands of rows that fit the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory import ScratchMemory, Workspace

#: Elements of a field that are worked on at once: the operands of a step then stay in a core's second-level cache.
BAND = 1 << 16


class ExtraKernelRunner:
    """Runs what `hal_compute.extra_kernels` asks for. Temporary memory comes from the session's pool."""

    def __init__(self, memory: ScratchMemory) -> None:
        self._memory = memory

    def reduction_parts(self, count: int) -> int:
        return 1

    def __call__(
        self,
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        integers: Sequence[int],
        floats: Sequence[float] = (),
        *,
        extent: tuple[int, int, int],
        what: str,
        repeats: int = 1,
    ) -> None:
        """See `hal_compute.extra_kernels.Runner`."""
        if name == "vector_add":
            torch.add(*inputs, out=outputs[0])
        elif name == "reduce_sum":
            outputs[0][0] = inputs[0].detach().sum(dtype=torch.float64)
        elif name == "matmul":
            torch.matmul(*(t.detach() for t in inputs), out=outputs[0])
        elif name == "euler_characteristic":
            with Workspace(self._memory) as workspace:
                field = inputs[0].detach().reshape(-1, *integers[:2])
                _euler(field, inputs[1].tolist(), outputs[0], workspace)
        else:
            with Workspace(self._memory) as workspace:
                _flow(_STEPS[name](*floats), [t.detach() for t in inputs], outputs, workspace, repeats)


def _euler(field: Tensor, levels: Sequence[float], parts: Tensor, workspace: Workspace) -> None:
    """Corners minus edges plus pixels of each row of the grid of corners."""
    count, height, width = field.shape
    inside = workspace.take((count, height + 2, width + 2), torch.bool).zero_()
    top, left, corners = (workspace.take((count, height + 1, width + 1), torch.bool) for _ in range(3))
    right, below, pixel = inside[:, :-1, 1:], inside[:, 1:, :-1], inside[:, 1:, 1:]
    for n, level in enumerate(levels):
        torch.ge(field, level, out=inside[:, 1:-1, 1:-1])
        torch.logical_or(right, pixel, out=top)
        torch.logical_or(below, pixel, out=left)
        torch.logical_or(top, below, out=corners).logical_or_(inside[:, :-1, :-1])
        counts = [torch.count_nonzero(each, -1) for each in (corners, top, left, pixel)]
        parts[:, n] = counts[0] - counts[1] - counts[2] + counts[3]


Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def _flow(step: Step, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Workspace, repeats: int) -> None:
    """Repeat a step of fields on a periodic grid: between two sets of fields that are framed by their neighbours.

    `step` is given bands of the old fields with their frame, rows of the new fields, and as many temporary arrays.
    """
    height, width = inputs[0].shape[-2:]
    shape = (inputs[0].numel() // (height * width), height, width)
    sets = [[workspace.take((shape[0], height + 2, width + 2), torch.float32) for _ in inputs] for _ in range(2)]
    for field, framed in zip(inputs, sets[0], strict=True):
        framed[:, 1:-1, 1:-1] = field.reshape(shape)
    rows = max(BAND // width, 1)
    fields = max(BAND // (height * width), 1)
    scratch = [workspace.take((min(fields, shape[0]), min(rows, height) + 2, width), torch.float32) for _ in inputs]
    for _ in range(repeats):
        for framed in sets[0]:
            _frame(framed)
        for f in range(0, shape[0], fields):
            for y in range(0, height, rows):
                last = min(y + rows, height)
                here = slice(f, f + fields)
                old = [framed[here, y : last + 2] for framed in sets[0]]
                new = [framed[here, y + 1 : last + 1, 1:-1] for framed in sets[1]]
                step(old, new, [t[: old[0].shape[0], : last - y + 2] for t in scratch])
        sets.reverse()
    for result, framed in zip(outputs, sets[0], strict=True):
        result.view(shape).copy_(framed[:, 1:-1, 1:-1])


def _frame(field: Tensor) -> None:
    """The other side's rows and columns around a periodic field."""
    field[:, 0, 1:-1], field[:, -1, 1:-1] = field[:, -2, 1:-1], field[:, 1, 1:-1]
    field[..., 0], field[..., -1] = field[..., -2], field[..., 1]


def _reaction_diffusion(
    dt: float, diffusion_u: float, diffusion_v: float, reaction: float, epsilon: float, decay: float, offset: float
) -> Step:
    # The nine-point average minus the middle is the product of two (1, 2, 1) sums / 12, minus 4 / 3 of the middle.
    r, s = dt * reaction, dt * reaction * epsilon

    def diffuse(old: Tensor, new: Tensor, lines: Tensor, rate: float, more: float) -> Tensor:
        torch.add(old[..., :-2], old[..., 2:], out=lines).add_(old[..., 1:-1], alpha=2)
        torch.add(lines[:, :-2], lines[:, 2:], out=new).add_(lines[:, 1:-1], alpha=2).mul_(rate / 12)
        middle = old[:, 1:-1, 1:-1]
        new.add_(middle, alpha=1 - 4 / 3 * rate + more)
        return middle

    def step(old: Sequence[Tensor], new: Sequence[Tensor], scratch: Sequence[Tensor]) -> None:
        (u, v), (new_u, new_v) = old, new
        a = diffuse(u, new_u, scratch[0], dt * diffusion_u, r)
        b = diffuse(v, new_v, scratch[1], dt * diffusion_v, -s * decay)
        if reaction:
            square = torch.mul(a, a, out=scratch[0][:, 1:-1])
            new_u.addcmul_(square, a, value=-r).add_(b, alpha=-r)
            new_v.add_(a, alpha=s)
            if offset:
                new_v.add_(s * offset)

    return step


def _ricci(dt: float) -> Step:
    def step(old: Sequence[Tensor], new: Sequence[Tensor], scratch: Sequence[Tensor]) -> None:
        (phi,), (result,) = old, new
        middle, factor = phi[:, 1:-1, 1:-1], scratch[0][:, 1:-1]
        torch.mul(middle, -2, out=factor).exp_().mul_(dt)
        torch.add(phi[:, :-2, 1:-1], phi[:, 2:, 1:-1], out=result).add_(phi[:, 1:-1, :-2]).add_(phi[:, 1:-1, 2:])
        result.add_(middle, alpha=-4).mul_(factor).add_(middle)

    return step


_STEPS: dict[str, Callable[..., Step]] = {"reaction_diffusion_step": _reaction_diffusion, "ricci_flow_step": _ricci}

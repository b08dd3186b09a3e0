"""Kernels beside attention in torch's operators, which share rows among threads, by bands of rows that fit the cache.
Where hal-cpu-native is, its kernels step and count fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory import ScratchMemory, Workspace
from ..paths import compiled_kernels
from . import compiled_fields

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
        if name in compiled_fields.NAMES and compiled_kernels():
            compiled_fields.run(name, inputs, outputs, integers, floats, repeats, self._memory)
        elif name == "vector_add":
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


Step = Callable[[], None]
#: (old fields with their frame, new fields, temporary array) -> the step from one to the other. The first dimension is
#: that of a system's fields; each view is made once, since making it takes as long as a step of a small field.
Plan = Callable[[Tensor, Tensor, Tensor], Step]


def _flow(plan: Plan, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: Workspace, repeats: int) -> None:
    """Repeat a step of fields on a periodic grid: between two sets of fields that are framed by their neighbours, in
    bands that fit the cache.
    """
    height, width = inputs[0].shape[-2:]
    count, systems = len(inputs), inputs[0].numel() // (height * width)
    sets = [workspace.take((count, systems, height + 2, width + 2), torch.float32) for _ in range(2)]
    for field, framed in zip(inputs, sets[0], strict=True):
        framed[:, 1:-1, 1:-1] = field.reshape(systems, height, width)
    rows, together = min(max(BAND // width, 1), height), min(max(BAND // (height * width), 1), systems)
    scratch = workspace.take((count, together, rows + 2, width), torch.float32)
    turns: list[list[Step]] = []
    for old, new in (sets, sets[::-1])[: min(repeats, 2)]:
        steps = [_frame(old)]
        for f in range(0, systems, together):
            here = slice(f, min(f + together, systems))
            for y in range(0, height, rows):
                last = min(y + rows, height)
                free = scratch[:, : here.stop - here.start, : last - y + 2]
                steps.append(plan(old[:, here, y : last + 2], new[:, here, y + 1 : last + 1, 1:-1], free))
        turns.append(steps)
    for n in range(repeats):
        for step in turns[n % 2]:
            step()
    for result, framed in zip(outputs, sets[repeats % 2], strict=True):
        result.view(systems, height, width).copy_(framed[:, 1:-1, 1:-1])


def _frame(field: Tensor) -> Step:
    """Copies the other side's rows and columns around periodic fields."""
    top, bottom, left, right = field[..., 0, 1:-1], field[..., -1, 1:-1], field[..., 0], field[..., -1]
    first, last, west, east = field[..., 1, 1:-1], field[..., -2, 1:-1], field[..., 1], field[..., -2]

    def step() -> None:
        top.copy_(last)
        bottom.copy_(first)
        left.copy_(east)
        right.copy_(west)

    return step


def _reaction_diffusion(
    dt: float, diffusion_u: float, diffusion_v: float, reaction: float, epsilon: float, decay: float, offset: float
) -> Plan:
    # The nine-point average minus the middle is the product of two (1, 2, 1) sums / 12, minus 4 / 3 of the middle.
    r, s = dt * reaction, dt * reaction * epsilon
    rates = [dt * diffusion_u, dt * diffusion_v]
    shares = [1 - 4 / 3 * rates[0] + r, 1 - 4 / 3 * rates[1] - s * decay]
    rate = torch.tensor(rates, dtype=torch.float32).div_(12).view(2, 1, 1, 1)
    share = torch.tensor(shares, dtype=torch.float32).view(2, 1, 1, 1)

    def plan(old: Tensor, new: Tensor, lines: Tensor) -> Step:
        west, centre, east = old[..., :-2], old[..., 1:-1], old[..., 2:]
        above, here, below = lines[..., :-2, :], lines[..., 1:-1, :], lines[..., 2:, :]
        middle = centre[..., 1:-1, :]
        (a, b), (new_u, new_v), square = middle, new, here[0]

        def step() -> None:
            torch.add(west, east, out=lines)
            lines.add_(centre, alpha=2)
            torch.add(above, below, out=new)
            new.add_(here, alpha=2)
            new.mul_(rate)
            new.addcmul_(middle, share)
            if reaction:
                torch.mul(a, a, out=square)
                new_u.addcmul_(square, a, value=-r)
                new_u.add_(b, alpha=-r)
                new_v.add_(a, alpha=s)
                if offset:
                    new_v.add_(s * offset)

        return step

    return plan


def _ricci(dt: float) -> Plan:
    def plan(old: Tensor, new: Tensor, lines: Tensor) -> Step:
        up, down = old[..., :-2, 1:-1], old[..., 2:, 1:-1]
        left, right = old[..., 1:-1, :-2], old[..., 1:-1, 2:]
        middle, factor = old[..., 1:-1, 1:-1], lines[..., 1:-1, :]

        def step() -> None:
            torch.mul(middle, -2, out=factor)
            factor.exp_()
            factor.mul_(dt)
            torch.add(up, down, out=new)
            new.add_(left)
            new.add_(right)
            new.add_(middle, alpha=-4)
            new.mul_(factor)
            new.add_(middle)

        return step

    return plan


_STEPS: dict[str, Callable[..., Plan]] = {"reaction_diffusion_step": _reaction_diffusion, "ricci_flow_step": _ricci}

"""Attention on cooperative matrices (forward_nv2.comp, forward_khr.comp): how a call is cut, and its commands."""

from __future__ import annotations

from typing import NamedTuple

from hal_compute.problem import LAYOUT, Call, Problem

from .commands import Operand, VulkanCommandBuffer
from .ladder import MatrixStep

_STRANDS = 4  # invocations that share the splits of a result


class Cut(NamedTuple):
    """How the work is cut: invocations of a work group, keys of a tile, matrices of rows in a subgroup.

    `alone`: subgroups share their rows and have keys of their own, for calls of few rows. `ahead`: the scores of the next
    tile are made beside this one's weights, with two sets of tiles in shared memory (1) or one (2).
    """

    step: MatrixStep
    threads: int
    keys: int
    height: int
    alone: bool
    ahead: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a work group."""
        return self.height * self.step.side * (1 if self.alone else self.threads // self.step.subgroup)

    @property
    def stride(self) -> int:
        """Keys between two tiles of a subgroup."""
        return self.keys * (self.threads // self.step.subgroup if self.alone else 1)

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: the shaders' own sums."""
        side, subgroups, pitch = self.step.side, self.threads // self.step.subgroup, dim // 8 + 1
        tall = subgroups * self.height * side
        tiles = self.keys * pitch * (subgroups if self.alone else 4 if self.ahead == 1 else 2)
        ending = tall * ((dim if self.alone else side) // 4 + 1)
        weights = 0 if self.step.name == "nv2" else tall * (self.keys // 4 + (3 if self.keys < 24 else 1))
        return 16 * (max(tiles, self.rows * pitch, ending) + weights) + 8 * tall

    def fits(self, dim: int) -> bool:
        """Whether shared memory holds it, and every invocation loads as many pieces of 16 bytes of a tile."""
        loaders = self.step.subgroup if self.alone else self.threads
        return self.shared_bytes(dim) <= self.step.shared and self.keys * dim // 8 % loaders == 0


def cuts(step: MatrixStep, dim: int, *, alone: bool) -> list[Cut]:
    """Cuts worth trying, best first: the fastest on an H200, then what smaller shared memories hold."""
    # (subgroups, matrices of keys in a tile, matrices of rows in a subgroup, ahead)
    shapes = [(4, 4, 1, 0), (4, 2, 1, 0), (2, 2, 1, 0), (1, 2, 1, 0), (1, 1, 1, 0)]
    if step.name == "nv2" and not alone:
        shapes = [(4, 2, 2, 1) if dim <= 64 else (8, 2, 1, 1), *shapes]
    elif alone:
        shapes = shapes[1:]
    made = (
        Cut(step, groups * step.subgroup, tiles * step.side, height, alone, early)
        for groups, tiles, height, early in shapes
    )
    return [cut for cut in made if cut.fits(dim)]


def cut(step: MatrixStep, setting: Problem) -> Cut | None:
    """The best cut that fits the device and the call; None where plain tiles are the way."""
    alone = setting.unit_rows <= step.side
    block = None if setting.ranges is None or setting.ranges.block_q >= setting.len_q else setting.ranges.block_q
    fitting = cuts(step, setting.dim, alone=alone)
    return next((cut for cut in fitting if block is None or block % cut.rows == 0), None)


def record(commands: VulkanCommandBuffer, cut: Cut, setting: Problem, call: Call, to: Operand, to_lse: Operand) -> None:
    """The step's shader, and the merge where the keys are split."""
    dim, rows, numbers = setting.dim, setting.units * setting.unit_rows, setting.numbers
    general = numbers["has_mask"] or numbers["softcap"] or numbers["scale"] <= 0
    splits = setting.split(cut.rows, cut.stride, wanted=512, least=4 * cut.stride)
    setting.score_in_bits()
    operands = [commands.stage(tensor, dim) for tensor in call[:3]]
    part = commands.space(splits * rows * dim * 4 if splits > 1 else 256)
    part_lse = commands.space(splits * rows * 4) if splits > 1 else to_lse
    step = cut.step
    constants = (dim, cut.threads, cut.keys, step.side, step.subgroup, cut.height, cut.alone, bool(general), cut.ahead)
    commands.dispatch(
        f"forward_{step.name}.{setting.dtype}", [int(number) for number in constants],
        [*operands, *setting.tables, to, part_lse, part], setting.values(), LAYOUT,
        (-(-setting.unit_rows // cut.rows), setting.units, splits),
    )  # fmt: skip
    if splits > 1:
        threads = 64
        commands.dispatch(
            f"merge.{setting.dtype}", (dim, threads, _STRANDS), [part, part_lse, to, to_lse], setting.values(unit_rows=rows),
            LAYOUT, (-(-rows * dim // 4 * _STRANDS // threads), 1, 1),
        )  # fmt: skip

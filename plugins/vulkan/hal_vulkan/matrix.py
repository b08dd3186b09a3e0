"""Attention on cooperative matrices (forward_nv2.comp, forward_khr.comp): how a call is cut, and its commands."""

from __future__ import annotations

from typing import NamedTuple

from hal_compute.problem import LAYOUT, Call

from .commands import Operand, VulkanCommandBuffer
from .ladder import MatrixStep
from .setting import Parts, Setting

_WANTED = 128  # work groups that keep a large device busy; twice as many where they read short rows


class Cut(NamedTuple):
    """How the work is cut: invocations of a work group, keys of a tile, matrices of rows in a subgroup.

    `alone`: subgroups share their rows and have keys of their own, for calls of few rows. `ahead`: the scores of the
    next tile are made beside this one's weights, with two sets of tiles in shared memory (1) or one (2).
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
        """Whether shared memory holds it, and every invocation has as many pieces of a tile and of a row of scores.

        Pieces of a tile are 16 bytes. Only forward_khr.comp hands rows of scores out, by twice 4 of them.
        """
        loaders = self.step.subgroup if self.alone else self.threads
        evenly = self.keys * dim // 8 % loaders == 0
        if self.step.name == "khr":
            evenly &= self.keys % (8 * self.step.subgroup // self.step.side) == 0
        return evenly and self.shared_bytes(dim) <= self.step.shared


# (subgroups, matrices of keys in a tile, matrices of rows in a subgroup, ahead)
_FASTEST = {
    32: (4, 4, 2, 2),
    64: (4, 2, 2, 1),
    96: (8, 4, 1, 2),
    128: (8, 2, 1, 1),
    192: (6, 2, 1, 2),
    256: (4, 1, 1, 2),
}
_AHEAD = [(4, 4, 1, 2), (4, 2, 1, 2)]
_PLAIN = [(4, 4, 1, 0), (4, 2, 1, 0), (2, 2, 1, 0), (1, 2, 1, 0), (1, 1, 1, 0)]


def cuts(step: MatrixStep, dim: int, *, alone: bool) -> list[Cut]:
    """Cuts that fit, best first: the fastest of those tried on an H200, then what more rows or less memory leave."""
    shapes = [_FASTEST[dim], *_AHEAD, *_PLAIN] if step.name == "nv2" else _PLAIN
    made = (
        Cut(step, groups * step.subgroup, tiles * step.side, height, alone, ahead)
        for groups, tiles, height, ahead in (_PLAIN[1:] if alone else shapes)
    )
    return [cut for cut in made if cut.fits(dim)]


def cut(step: MatrixStep, setting: Setting) -> Cut | None:
    """The best cut that fits the device and the call; None where plain tiles are the way."""
    alone = setting.unit_rows <= step.side
    block = None if setting.ranges is None or setting.ranges.block_q >= setting.len_q else setting.ranges.block_q
    fitting = cuts(step, setting.dim, alone=alone)
    return next((cut for cut in fitting if block is None or block % cut.rows == 0), None)


def record(commands: VulkanCommandBuffer, cut: Cut, setting: Setting, call: Call, to: Operand, to_lse: Operand) -> None:
    """The step's shader, and the merge where the keys are split."""
    wanted = 2 * _WANTED if cut.alone and setting.dim <= 64 else _WANTED
    setting.split(cut.rows, cut.stride, wanted=wanted, least=4 * cut.stride)
    setting.score_in_bits()
    operands = [commands.stage(tensor, setting.dim) for tensor in call[:3]]
    parts, step = Parts(commands, setting, to, to_lse), cut.step
    blocks, units = -(-setting.unit_rows // cut.rows), setting.units
    fits = blocks <= commands.most_groups[1]
    turned = setting.causal and not cut.alone and fits  # the longest rows of all units first
    constants = (
        setting.dim,
        cut.threads,
        cut.keys,
        step.side,
        step.subgroup,
        cut.height,
        cut.alone,
        setting.changes_scores,
        cut.ahead,
        turned,
    )
    commands.dispatch(
        f"forward_{step.name}.{setting.dtype}",
        [int(number) for number in constants],
        [*operands, *setting.tables, to, parts.lse, parts.sums],
        setting.values(),
        LAYOUT,
        (*((units, blocks) if turned else (blocks, units)), setting.numbers["splits"]),
    )
    parts.merge()

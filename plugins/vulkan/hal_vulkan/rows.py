"""Attention of few query rows (forward_rows.comp): how a call is cut, and its commands."""

from __future__ import annotations

from typing import NamedTuple

from hal_compute.problem import LAYOUT, Call

from .commands import Operand, VulkanCommandBuffer
from .ladder import RowStep
from .setting import Setting

_SUBGROUPS = (6, 4, 2)  # of a work group, the best first
# Work groups that keep a large device's reads busy: 2 for each of an H200's 132 multiprocessors. One more would have
# all wait.
_MOST = 264
_MOST_SPLITS = 64  # of arriving.glsl, and of `Problem.split`


class Cut(NamedTuple):
    """How the work is cut: subgroups and query rows of a work group, invocations that share a key, loads of keys in
    flight.
    """

    step: RowStep
    subgroups: int
    rows: int
    lanes: int
    loads: int

    @property
    def threads(self) -> int:
        """Invocations of a work group."""
        return self.subgroups * self.step.subgroup

    @property
    def span(self) -> int:
        """Keys that a work group reads at once."""
        return self.threads // self.lanes * self.loads

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: sums, a maximum and a total per subgroup, one number per split, and a flag."""
        return self.rows * (self.subgroups * (4 * dim + 8) + 4 * _MOST_SPLITS) + 4


def cut(step: RowStep, setting: Setting, *, least: bool) -> Cut | None:
    """The cut of a call; None where it has too many rows for the registers or for shared memory.

    `least`: whether to take only what is read no faster by matrices.
    """
    if setting.unit_rows > (4 if least else 8) or (least and setting.dim < 96):
        return None
    rows = next(rows for rows in (1, 2, 4, 8) if rows >= setting.unit_rows)
    wide = setting.dim * (4 if setting.dtype == "float32" else 2) // 16
    lanes = min(1 << (wide - 1).bit_length(), step.subgroup)
    held = -(-wide // lanes) * (1 if setting.dtype == "float32" else 2)  # groups of 4 numbers of a row in an invocation
    cuts = (Cut(step, subgroups, rows, lanes, 8 if rows * held <= 4 else 4) for subgroups in _SUBGROUPS)
    return next((cut for cut in cuts if cut.shared_bytes(setting.dim) <= step.shared), None)


def record(commands: VulkanCommandBuffer, cut: Cut, setting: Setting, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_rows.comp, whose last work group of each block of rows merges what splits of the keys leave."""
    blocks = -(-setting.unit_rows // cut.rows)
    whole = setting.units * blocks
    splits = setting.split(cut.rows, cut.span, wanted=_MOST // whole * whole, least=4 * cut.span)
    setting.score_in_bits()
    operands = [commands.stage(tensor, setting.dim) for tensor in call[:3]]
    parts = splits * setting.units * setting.unit_rows
    sums, lse = commands.space(parts * setting.dim * 4), commands.space(parts * 4)
    arrived = commands.counters(whole if splits > 1 else 1)
    general = setting.changes_scores or setting.ranges is not None
    commands.dispatch(
        f"forward_rows.{setting.dtype}",
        (setting.dim, cut.threads, cut.loads, cut.rows, cut.step.subgroup, cut.lanes, int(general)),
        [*operands, *setting.tables, to, to_lse, sums, lse, arrived],
        setting.values(),
        LAYOUT,
        (blocks, setting.units, splits),
    )

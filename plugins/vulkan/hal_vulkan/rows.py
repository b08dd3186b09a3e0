"""Attention of few query rows (forward_rows.comp): how a call is cut, and its commands."""

from __future__ import annotations

from typing import NamedTuple

from hal_compute.problem import LAYOUT, Call

from .commands import Operand, VulkanCommandBuffer
from .ladder import RowStep
from .setting import Parts, Setting

_SUBGROUPS = 4
# Work groups that keep a large device's reads busy: 3 for each of an H200's 132 multiprocessors, and no more.
_WANTED = 392


class Cut(NamedTuple):
    """How the work is cut: query rows of a work group, invocations that share a key, loads of keys in flight."""

    step: RowStep
    rows: int
    lanes: int
    loads: int

    @property
    def threads(self) -> int:
        """Invocations of a work group."""
        return _SUBGROUPS * self.step.subgroup

    @property
    def span(self) -> int:
        """Keys that a work group reads at once."""
        return self.threads // self.lanes * self.loads


def cut(step: RowStep, setting: Setting, *, least: bool) -> Cut | None:
    """The cut of a call; None where it has too many rows for the registers or for shared memory.

    `least`: whether to take only what is read no faster by matrices.
    """
    if setting.unit_rows > (4 if least else 8) or (least and setting.dim < 96):
        return None
    rows = next(rows for rows in (1, 2, 4, 8) if rows >= setting.unit_rows)
    if _SUBGROUPS * rows * (4 * setting.dim + 8) > step.shared:  # sums, a maximum and a total per subgroup
        return None
    wide = setting.dim * (4 if setting.dtype == "float32" else 2) // 16
    lanes = min(1 << (wide - 1).bit_length(), step.subgroup)
    held = -(-wide // lanes) * (1 if setting.dtype == "float32" else 2)  # groups of 4 numbers of a row in an invocation
    return Cut(step, rows, lanes, 8 if rows * held <= 8 else 4)


def record(commands: VulkanCommandBuffer, cut: Cut, setting: Setting, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_rows.comp, and the merge where the keys are split."""
    setting.split(cut.rows, cut.span, wanted=_WANTED, least=4 * cut.span)
    setting.score_in_bits()
    operands = [commands.stage(tensor, setting.dim) for tensor in call[:3]]
    parts = Parts(commands, setting, to, to_lse)
    commands.dispatch(
        f"forward_rows.{setting.dtype}",
        (setting.dim, cut.threads, cut.loads, cut.rows, cut.step.subgroup, cut.lanes, int(setting.changes_scores)),
        [*operands, *setting.tables, to, parts.lse, parts.sums], setting.values(), LAYOUT,
        (1, setting.units, setting.numbers["splits"]),
    )  # fmt: skip
    parts.merge()

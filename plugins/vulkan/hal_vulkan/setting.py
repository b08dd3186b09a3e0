"""What the shaders of one call share: its mask and ranges on the device, and the parts that splits of the keys
leave.
"""

from __future__ import annotations

from functools import partial

from hal_compute.problem import LAYOUT, OPEN, Call, Problem, mask_of
from torch import Tensor

from .commands import Given, Operand, VulkanCommandBuffer
from .recorder import Recorder

_SMALL_MASK = 1 << 14  # elements below which hidden tiles of a mask are not worth skipping
_MERGERS = 64  # invocations of a work group of merge.comp


class Setting(Problem):
    """What all shaders of one call share: its mask and ranges on the device, and its numbers as push constants."""

    def __init__(self, recorder: Recorder, commands: VulkanCommandBuffer, call: Call, *, pack: bool) -> None:
        super().__init__(call, pack=pack)
        self.commands, self.is_cpu = commands, recorder.adapter.is_cpu
        nothing = commands.space(256)
        self.tables = [nothing, nothing, nothing]
        if self.mask is not None:
            # A large mask is looked through for hidden tiles at every call.
            again = partial(_mask_values, len_k=self.len_k) if self.mask.values.numel() < _SMALL_MASK else None
            self.tables[0] = commands.stage(self.mask.values, again=again)
        if self.ranges is not None:
            self.tables[1:] = commands.stage(self.ranges.index), commands.stage(self.ranges.bounds)

    @property
    def causal(self) -> bool:
        """Whether later rows read more keys."""
        return bool(self.numbers["upper"] < OPEN and self.numbers["lower"] == -OPEN)

    @property
    def changes_scores(self) -> bool:
        """Whether scores need more than a positive scale and the band."""
        numbers = self.numbers
        return bool(numbers["has_mask"] or numbers["softcap"] or numbers["scale"] <= 0)


def _mask_values(given: Given, len_k: int) -> Tensor:
    mask = given[3]
    assert mask is not None
    return mask_of(mask, len_k).values


class Parts:
    """Where a shader leaves its results: in place, or, where the keys are split, as parts that are merged after it.

    Attributes:
        sums: normalised parts, float32 [splits, rows, dim]; a placeholder for one split. lse: float32 [splits, rows].
    """

    def __init__(self, commands: VulkanCommandBuffer, setting: Setting, to: Operand, to_lse: Operand) -> None:
        """After the keys were split; `to` and `to_lse` are where the results belong."""
        self._commands, self._setting, self._to, self._to_lse = commands, setting, to, to_lse
        self._splits, self._rows = setting.numbers["splits"], setting.units * setting.unit_rows
        whole = self._splits == 1
        self.sums = commands.space(256 if whole else self._splits * self._rows * setting.dim * 4)
        self.lse = to_lse if whole else commands.space(self._splits * self._rows * 4)

    def merge(self) -> None:
        """Record merge.comp, if there is anything to merge; many splits of a result are shared by several
        invocations.
        """
        if self._splits == 1:
            return
        setting, strands = self._setting, 4 if self._splits >= 8 and not self._setting.is_cpu else 1
        groups = self._commands.spread(-(-self._rows * setting.dim // 4 * strands // _MERGERS))
        self._commands.dispatch(
            f"merge.{setting.dtype}",
            (setting.dim, _MERGERS, strands),
            [self.sums, self.lse, self._to, self._to_lse],
            setting.values(unit_rows=self._rows),
            LAYOUT,
            groups,
        )

"""What the shaders of one call share: its mask and key ranges on the device, and the parts that splits of the keys
leave.
"""

from __future__ import annotations

from functools import partial

from hal_compute.problem import LAYOUT, Call, Problem, Scratch, mask_of
from torch import Tensor

from ..runtime.command_buffer import Given, Operand, VulkanCommandBuffer

_SMALL_MASK = 1 << 14  # elements below which hidden tiles of a mask are not worth skipping
_MERGE_THREADS = 64  # invocations of a work group of merge.comp


class DeviceProblem(Problem):
    """A call's parameters as push constants, and its mask and key ranges on the device (`tables`)."""

    def __init__(self, commands: VulkanCommandBuffer, call: Call, *, pack: bool, is_cpu: bool) -> None:
        super().__init__(call, pack=pack, scratch=commands.scratch)
        self.commands, self.is_cpu = commands, is_cpu
        unused = commands.space(256)
        self.tables = [unused, unused, unused]
        if self.mask is not None:
            # A large mask is searched for hidden tiles at every call, so its commands are recorded anew.
            values = self.mask.values
            small = values.numel() < _SMALL_MASK
            again = partial(_mask_values, len_k=self.sizes.len_k, scratch=commands.scratch) if small else None
            self.tables[0] = commands.stage(values, again=again)
        if self.ranges is not None:
            self.tables[1:] = commands.stage(self.ranges.offsets), commands.stage(self.ranges.bounds)


def _mask_values(given: Given, len_k: int, scratch: Scratch) -> Tensor:
    mask = given[3]
    assert mask is not None
    return mask_of(mask, len_k, scratch).values


class Parts:
    """Where a shader leaves its results: in place, or, where the keys are split, as parts that are merged after it.

    Attributes:
        sums: normalised parts, float32 [splits, rows, dim]; unused for one split.
        lse: float32 [rows], or a maximum and a sum for each part, [splits, rows, 2].
    """

    def __init__(self, problem: DeviceProblem, to: Operand, to_lse: Operand) -> None:
        """To be created once the keys are split. `to`, `to_lse`: where the results belong."""
        commands, sizes = problem.commands, problem.sizes
        self._problem, self._to, self._to_lse = problem, to, to_lse
        self._splits, self._rows = problem.parameters["splits"], sizes.units * sizes.unit_rows
        whole = self._splits == 1
        self.sums = commands.space(256 if whole else self._splits * self._rows * sizes.dim * 4)
        self.lse = to_lse if whole else commands.space(self._splits * self._rows * 8)

    def merge(self) -> None:
        """Record merge.comp if there are parts. Several invocations share many splits of a result."""
        if self._splits == 1:
            return
        problem, dim = self._problem, self._problem.sizes.dim
        strands = 4 if self._splits >= 8 and not problem.is_cpu else 1
        groups = problem.commands.spread(-(-self._rows * dim // 4 * strands // _MERGE_THREADS))
        problem.commands.dispatch(
            f"merge.{problem.sizes.dtype}",
            (dim, _MERGE_THREADS, strands),
            [self.sums, self.lse, self._to, self._to_lse],
            problem.values(unit_rows=self._rows),
            LAYOUT,
            groups,
        )

"""The forward kernels in work groups: tiles in shared memory, cooperative matrices, and lanes that share a key."""

from __future__ import annotations

from hal_compute.problem import LAYOUT, Call

from ..runtime.command_buffer import Operand
from ..tiling import MatrixCut, RowCut, TileCut, matrix_splits, row_splits, tile_splits
from .device_problem import DeviceProblem, Parts


def record_tiles(cut: TileCut, problem: DeviceProblem, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_tiles.comp, and the merge where the keys are split."""
    sizes, commands = problem.sizes, problem.commands
    blocks = -(-sizes.unit_rows // cut.rows)
    problem.split(*tile_splits(cut, sizes, is_cpu=problem.is_cpu))
    operands = [commands.stage(tensor, sizes.dim) for tensor in call[:3]]
    parts = Parts(problem, to, to_lse)
    commands.dispatch(
        f"forward_tiles.{sizes.dtype}",
        (sizes.dim, cut.threads, cut.rows, cut.keys, cut.height),
        [*operands, *problem.tables, to, parts.lse, parts.sums],
        problem.values(),
        LAYOUT,
        (blocks, sizes.units, problem.parameters["splits"]),
    )
    parts.merge()


def record_matrices(cut: MatrixCut, problem: DeviceProblem, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_nv2.comp or forward_khr.comp, and the merge where the keys are split."""
    sizes, commands, step = problem.sizes, problem.commands, cut.step
    blocks, units = -(-sizes.unit_rows // cut.rows), sizes.units
    problem.split(*matrix_splits(cut, sizes))
    operands = [commands.stage(tensor, sizes.dim) for tensor in call[:3]]
    parts = Parts(problem, to, to_lse)
    # A causal call starts the longest rows of all units first.
    turned = problem.causal and not cut.alone and blocks <= commands.most_groups[1]
    constants = (
        *(sizes.dim, cut.threads, cut.keys, step.side, step.subgroup, cut.height),
        *(cut.alone, problem.changes_scores, cut.ahead, turned),
    )
    commands.dispatch(
        f"forward_{step.name}.{sizes.dtype}",
        [int(constant) for constant in constants],
        [*operands, *problem.tables, to, parts.lse, parts.sums],
        problem.values(),
        LAYOUT,
        (*((units, blocks) if turned else (blocks, units)), problem.parameters["splits"]),
    )
    parts.merge()


def record_rows(cut: RowCut, problem: DeviceProblem, call: Call, to: Operand, to_lse: Operand) -> None:
    """forward_rows.comp. The last work group of each block of rows merges the parts that splits of the keys leave."""
    sizes, commands = problem.sizes, problem.commands
    blocks = -(-sizes.unit_rows // cut.rows)
    groups = sizes.units * blocks
    chunk, splits = row_splits(cut, sizes)
    problem.split(chunk, splits)
    operands = [commands.stage(tensor, sizes.dim) for tensor in call[:3]]
    parts = splits * sizes.units * sizes.unit_rows
    part, part_sums = commands.space(parts * sizes.dim * 4), commands.space(parts * 8)
    arrived = commands.counters(groups if splits > 1 else 1)
    general = problem.changes_scores or problem.ranges is not None
    commands.dispatch(
        f"forward_rows.{sizes.dtype}",
        (sizes.dim, cut.threads, cut.loads, cut.rows, cut.step.subgroup, cut.lanes, int(general)),
        [*operands, *problem.tables, to, to_lse, part, part_sums, arrived],
        problem.values(),
        LAYOUT,
        (blocks, sizes.units, splits),
    )

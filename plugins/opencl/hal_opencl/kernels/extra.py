"""Kernels beside attention: the launches of programs/kernels.cl."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hal_compute.extra_kernels import GROUP_FIELD
from torch import Tensor

from ..runtime.engine import Engine
from ..runtime.lease import Lease

_GROUP = 64  # work items that take all steps of a small field
_CPU_FIELD = (
    128 * 128
)  # as GROUP_FIELD, of a CPU: a launch takes longer there, and a work item steps 16 elements at once
#: Elements of the result per work item along x, y and z; one elsewhere.
_BLOCKS = {"matmul": (16, 4, 1), "reaction_diffusion_step": (16, 1, 1), "ricci_flow_step": (16, 1, 1)}


class ExtraKernelRunner:
    """Runs the programs of kernels.cl, one work item for each block of the result."""

    def __init__(self, engine: Engine, lease: Callable[[str], Lease]) -> None:
        self._engine, self._lease = engine, lease

    def reduction_parts(self, count: int) -> int:
        return min(int(self._engine.handle.max_compute_units) * 64, count)

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
        engine = self._engine
        size = [-(-n // block) for n, block in zip(extent, _BLOCKS.get(name, (1, 1, 1)), strict=True)]
        with self._lease(what) as lease:
            source = [operand.buffer for operand in map(lease.stage, inputs)]
            target = [operand.buffer for operand in map(lease.result, outputs)]
            spare = [lease.space(tensor.nbytes).buffer for tensor in outputs] if repeats > 1 else []
            most = _CPU_FIELD if engine.shares_memory else GROUP_FIELD
            if repeats > 1 and extent[0] * extent[1] <= most:
                threads = min(_GROUP, int(engine.handle.max_work_group_size))
                numbers = *map(np.int32, (*integers, repeats)), *map(np.float32, floats)
                several, group = engine.kernel("kernels", f"{name}s"), (threads, 1, 1)
                engine.launch(several, (threads, 1, extent[2]), group, *source, *target, *spare, *numbers)
                lease.finish()
                return
            numbers = *map(np.int32, integers), *map(np.float32, floats)
            kernel = engine.kernel("kernels", name)
            for left in reversed(range(repeats)):
                here = spare if left % 2 else target  # the last one writes the results
                engine.launch(kernel, size, None, *source, *here, *numbers)
                source = here
            lease.finish()

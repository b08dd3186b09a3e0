"""Kernels beside attention: the dispatches of their shaders."""

from __future__ import annotations

from collections.abc import Sequence

from hal_compute.extra_kernels import GROUP_FIELD
from torch import Tensor

from ..runtime.recorder import Recorder

_THREADS = 64
_CONSTANTS = (0, _THREADS)  # constant 0 belongs to the attention shaders
_BLOCKS = {"matmul": (4 * _THREADS, 4, 1)}  # elements of the result per work group along x, y and z
#: Rows that a work item of a flow walks down on a CPU, whose loads are dear. On a GPU it takes one: latency is dear.
_CPU_ROWS = 16


class ExtraKernelRunner:
    """Runs the shader named like the kernel: one work group per block of the result; beyond the device's limit each
    takes several blocks. After its own parameters a shader gets the extent along z.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def reduction_parts(self, count: int) -> int:
        return min(-(-count // (_THREADS * 16)), 256, self._recorder.most_groups[0]) * _THREADS

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
        on_cpu = self._recorder.adapter.is_cpu
        rows = _CPU_ROWS if on_cpu and name.endswith("_step") else 1
        blocks = _BLOCKS.get(name, (_THREADS, rows, 1))
        wanted = (-(-n // block) for n, block in zip(extent, blocks, strict=True))
        groups = [min(pair) for pair in zip(wanted, self._recorder.most_groups, strict=True)]
        key = (name, *(tensor.shape for tensor in inputs), *integers, *floats, repeats)
        if (kept := self._recorder.find(key)) is not None:
            kept.run(inputs, outputs)
            return
        # Steps of changing lengths would each be kept, and evict other recordings.
        again = not floats or self._recorder.last_steps.get(name) == key
        self._recorder.last_steps[name] = key
        with self._recorder.call(what, inputs, key if again else None) as commands:
            source, target = [*map(commands.stage, inputs)], [*map(commands.result, outputs)]
            numbers, layout = [*integers, extent[2], *floats], f"{len(integers) + 1}i{len(floats)}f"
            if repeats > 1 and on_cpu and extent[0] * extent[1] <= GROUP_FIELD:
                spare = [commands.space(2 * sum(tensor.nbytes for tensor in outputs))]
                numbers, layout = [*integers, repeats, extent[2], *floats], f"{len(integers) + 2}i{len(floats)}f"
                operands = [*source, *target, *spare]
                commands.dispatch(f"{name}s", _CONSTANTS, operands, numbers, layout, [1, 1, groups[2]])
                commands.finish()
                return
            spare = [commands.space(tensor.nbytes) for tensor in outputs] if repeats > 1 else []
            for left in reversed(range(repeats)):
                here = spare if left % 2 else target  # the last one writes the results
                commands.dispatch(name, (*_CONSTANTS, rows), [*source, *here], numbers, layout, groups)
                source = here
            commands.finish()

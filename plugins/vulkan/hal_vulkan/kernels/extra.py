"""Kernels beside attention: the dispatches of their shaders."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..runtime.recorder import Recorder

_THREADS = 64
_CONSTANTS = (0, _THREADS)  # constant 0 belongs to the attention shaders
_BLOCKS = {"matmul": (4 * _THREADS, 4, 1)}  # elements of the result per work group along x, y and z
#: Rows that a work item of a flow walks down on a CPU, whose loads are dear. On a GPU it takes one: latency is dear.
_CPU_ROWS = 16
#: On a CPU: work items of the group that takes all steps of a field, one for each lane of a vector; columns that one
#: walks down at once; and elements of a field up to which one group, which is one thread, is not slower than many.
_CPU_ITEMS, _CPU_COLUMNS, _CPU_FIELD = 8, 8, 128 * 128
#: Mesa's CPU drivers leave every loop of a shader after 65,535 iterations in all, without a word.
_MOST_ITERATIONS = 50_000


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
            fields = -(-extent[2] // groups[2])
            if repeats > 1 and on_cpu and _one_group(extent[1], extent[0], repeats, fields):
                spare = [commands.space(2 * sum(tensor.nbytes for tensor in outputs))]
                numbers, layout = [*integers, repeats, extent[2], *floats], f"{len(integers) + 2}i{len(floats)}f"
                operands = [*source, *target, *spare]
                commands.dispatch(f"{name}s", (0, _CPU_ITEMS), operands, numbers, layout, [1, 1, groups[2]])
                commands.finish()
                return
            spare = [commands.space(tensor.nbytes) for tensor in outputs] if repeats > 1 else []
            for left in reversed(range(repeats)):
                here = spare if left % 2 else target  # the last one writes the results
                commands.dispatch(name, (*_CONSTANTS, rows), [*source, *here], numbers, layout, groups)
                source = here
            commands.finish()


def _one_group(height: int, width: int, repeats: int, fields: int) -> bool:
    """Whether one work group takes all steps of a field: it is small, and no item's loops come near the limit.

    The shaders NAMEs step twice for each walk down a strip of columns, and once for the last of an odd number.
    """
    blocks = -(-width // _CPU_COLUMNS)
    tall = -(-height // max(_CPU_ITEMS // blocks, 1))
    twice = -(-blocks // _CPU_ITEMS) * (tall + 3) + 1
    once = -(-width // _CPU_ITEMS) * (-(-height // max(_CPU_ITEMS // width, 1)) + 1) + 1
    copies = 2 * (height * width // _CPU_ITEMS + 1)
    iterations = fields * (copies + repeats // 2 * twice + repeats % 2 * once)
    return height * width <= _CPU_FIELD and iterations <= _MOST_ITERATIONS

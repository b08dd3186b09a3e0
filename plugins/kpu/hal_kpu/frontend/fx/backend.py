"""The torch.compile backends: `backend="kpu"`, `kpu_behavioral`, `kpu_transactional` and `kpu_cycle_accurate`.

Dynamo's graphs become ATen graphs (forward, backward, inference), their operators DFX opcodes, and the rest stays on
the host. "kpu" runs at the fidelity that `hal_kpu.set_fidelity` chose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import CompileContext
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from .coverage import get_last_stats
from .lowering import FXToKPUConverter
from .partition import CompiledGraph
from .registry import LOWERINGS

__all__ = ["FXToKPUConverter", "KPUBackend", "decompositions", "get_last_stats", "register_kpu_backend"]

aten = torch.ops.aten
_FURTHER = [
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten.upsample_linear1d,
    aten.upsample_trilinear3d,
    aten.grid_sampler_2d,
    aten.adaptive_max_pool2d,
    aten.native_batch_norm,
    aten.batch_norm_backward,
    aten.addmv,
    aten.addbmm,
    aten.dist,
    aten.index_reduce,
]


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """ATen operators that are split into smaller ones before lowering: torch's core table and some more."""
    table = dict(core_aten_decompositions().items())
    table.update(get_decompositions(_FURTHER))
    return {overload: rule for overload, rule in table.items() if overload not in LOWERINGS}


class KPUBackend:
    """A backend for torch.compile.

    Args:
        fidelity: BEHAVIORAL (0), TRANSACTIONAL (1) or CYCLE_ACCURATE (2); None: as `set_fidelity` says at each run.
    """

    def __init__(self, fidelity: int | None = None) -> None:
        from ...simulator.fidelity import check_fidelity

        if fidelity is not None:
            check_fidelity(fidelity)
        self.fidelity = fidelity

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs."""
        frame = getattr(CompileContext.current_compile_id(), "frame_id", None)

        def compiler(kind: str) -> Callable[..., Any]:
            def compile_graph(graph: GraphModule, inputs: Sequence[Any]) -> Any:
                return make_boxed_func(CompiledGraph(graph, kind, frame, self._fidelity_now))

            return compile_graph

        # The table splits the forward of the CPU's flash attention and not its backward, whose gradients are then wrong
        # without a word; by the MATH kernel attention is matrix products both ways.
        with sdpa_kernel(SDPBackend.MATH):
            return aot_module_simplified(
                gm,
                example_inputs,
                fw_compiler=compiler("forward"),
                bw_compiler=compiler("backward"),
                inference_compiler=compiler("inference"),
                decompositions=decompositions(),
            )

    def _fidelity_now(self) -> int:
        if self.fidelity is not None:
            return self.fidelity
        from ...runtime.settings import get_fidelity

        return get_fidelity()


kpu = KPUBackend()
kpu_behavioral = KPUBackend(0)
kpu_transactional = KPUBackend(1)
kpu_cycle_accurate = KPUBackend(2)
_BACKENDS = {
    "kpu": kpu,
    "kpu_behavioral": kpu_behavioral,
    "kpu_transactional": kpu_transactional,
    "kpu_cycle_accurate": kpu_cycle_accurate,
}


def register_kpu_backend() -> None:
    """Make the backends' names known to torch.compile where the installed entry points have not done so."""
    from torch._dynamo.backends.registry import list_backends, register_backend

    known = list_backends(exclude_tags=())
    for name, backend in _BACKENDS.items():
        if name not in known:
            register_backend(compiler_fn=backend, name=name)

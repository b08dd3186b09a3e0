"""The Stillwater KPU as a simulated device of hal_core. This module holds the hooks and names alone."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import BackendSpec, hookimpl

#: Public names by the module that holds them; each is imported when it is used.
_NAMES = {
    "backend": ("KPUDevices",),
    "frontend.data.datasets": ("MNIST", "load_mnist"),
    "frontend.data.mnist": ("DatasetError",),
    "frontend.dfx.opcodes": ("DFXOpCode",),
    "frontend.dfx.program": ("DFXProgram",),
    "frontend.dfx.records": ("DFXError", "DFXOp", "MemoryLevel"),
    "frontend.fusing": (
        "FusionCompiler",
        "FusionGroup",
        "FusionPattern",
        "MatMulActivation",
        "MatMulBiasActivation",
        "estimate_memory_savings",
    ),
    "frontend.fx.backend": ("KPUBackend", "decompositions", "register_kpu_backend"),
    "frontend.fx.coverage": ("Coverage", "get_last_stats", "measure"),
    "frontend.fx.lowering": ("FXToKPUConverter",),
    "frontend.emission": ("DFXEmitter",),
    "frontend.tensors.graph": ("OpGraph", "OpNode", "OpType"),
    "frontend.tensors.operators": (
        "adaptive_avg_pool2d",
        "avg_pool2d",
        "batch_norm2d",
        "cast",
        "concat",
        "conv2d",
        "exp",
        "flatten",
        "gelu",
        "layer_norm",
        "linear",
        "log",
        "matmul",
        "max_pool2d",
        "mean",
        "multi_head_attention",
        "relu",
        "reshape",
        "scaled_dot_product_attention",
        "sigmoid",
        "silu",
        "softmax",
        "sqrt",
        "sum",
        "tanh",
        "transpose",
    ),
    "frontend.tensors.tensor": ("Tensor", "TensorMeta"),
    "frontend.tracing": ("CompiledFunction", "compile", "jit"),
    "profiles.profile": ("Profile", "ProfileError"),
    "runtime.runtime": ("KPURuntime", "get_runtime"),
    "runtime.settings": (
        "get_clock_frequency",
        "get_fidelity",
        "get_fidelity_name",
        "get_profile",
        "info",
        "set_clock_frequency",
        "set_fidelity",
        "set_profile",
    ),
    "simulator.fidelity": ("BEHAVIORAL", "CYCLE_ACCURATE", "TRANSACTIONAL"),
    "simulator.opcodes.specs": ("TensorSpec",),
    "simulator.opcodes.table": ("OPCODES",),
    "simulator.products.gemm": ("GemmStats", "simulate_conv2d", "simulate_gemm"),
    "simulator.stats": ("ExecutionStats",),
}
#: Modules that are public under a shorter name.
_MODULES = {"datasets": "frontend.data.datasets"}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}
#: Whether torch is here, without which no value can be computed.
TORCH_AVAILABLE: bool
__all__ = sorted([*_WHERE, *_MODULES, "TORCH_AVAILABLE"])


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used: finding the plugin loads neither torch nor numpy."""
    import importlib.util

    if name == "TORCH_AVAILABLE":
        return importlib.util.find_spec("torch") is not None
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="kpu",
            target="hal_kpu.backend:KPUDevices",
            requirements=("torch 2.11 or newer",),
            install_hint="pip install 'hal-kpu[torch]'",
        )
    ]


@hookimpl
def hal_commands(subparsers: Any) -> None:
    from .cli import add_commands

    add_commands(subparsers)

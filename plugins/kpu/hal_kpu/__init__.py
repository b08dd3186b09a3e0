"""The Stillwater KPU as a simulated device of hal_core. This module holds the hooks and names alone."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import BackendSpec, hookimpl

#: Public names by the module that holds them; each is imported when it is used.
_NAMES = {
    "backend": ("KPUDevices",),
    "coverage": ("Coverage", "get_last_stats", "measure"),
    "datasets": ("MNIST", "load_mnist"),
    "dfx": ("DFXError", "DFXOp", "DFXProgram", "MemoryLevel", "TensorSpec"),
    "fx_lowering": ("FXToKPUConverter",),
    "gemm": ("GemmStats", "simulate_conv2d", "simulate_gemm"),
    "graph": ("DFXEmitter", "OpGraph", "OpNode"),
    "opcodes": ("OPCODES",),
    "operators": (
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
    "profile": ("Profile", "ProfileError"),
    "runtime": (
        "BEHAVIORAL",
        "CYCLE_ACCURATE",
        "KPURuntime",
        "TRANSACTIONAL",
        "get_clock_frequency",
        "get_fidelity",
        "get_fidelity_name",
        "get_runtime",
        "set_clock_frequency",
        "set_fidelity",
    ),
    "stats": ("ExecutionStats",),
    "tensor": ("Tensor", "TensorMeta"),
    "torch_backend": ("KPUBackend", "register_kpu_backend"),
    "tracing": ("CompiledFunction", "compile", "jit"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used: finding the plugin loads neither torch nor numpy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

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
    from .commands import add_commands

    add_commands(subparsers)

"""Fused blocks: parts of a model under torch.compile, with hal's attention operators inside the graph.

Nothing is claimed beyond what the profiler counts: a block is not one kernel; with CUDA graphs it is one launch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import attrs
import torch
from torch import nn

from hal_core import ContractError

from .merging import merge_projections
from .sensitivity import read_output, run


class FusionStrategy(Enum):
    """Which modules are compiled, each as one graph.

    FULL_BLOCK: transformer blocks, attention, MLP and norms together. ATTENTION: attention modules. MLP: feed-forward
    modules. NORM: normalisation layers. MODEL: the model as one graph.
    """

    FULL_BLOCK = "full_block"
    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    MODEL = "model"


class OptimizationLevel(Enum):
    """How hard the compiler tries.

    CONSERVATIVE: graph breaks are allowed. BALANCED: one graph, or an error that names the break. AGGRESSIVE: also
    fixed shapes, and on CUDA one graph launch for a call (mode "reduce-overhead"): for inference.
    """

    CONSERVATIVE = "conservative"
    BALANCED = "balanced"
    AGGRESSIVE = "aggressive"


@attrs.frozen
class FusionConfig:
    """What is fused.

    Attributes:
        strategy, optimization_level: which modules, and how hard.
        enable_mixed_precision: run the fused model under bfloat16 autocast, on CUDA.
        enable_memory_optimization: in inference call without autograd's records.
        target_sequence_length: longer inputs are compiled with dynamic shapes, shorter ones too unless AGGRESSIVE.
        merge_projections: without gradients, one product for queries, keys and values, and one for gate and up. The
            weights become views of joint tensors; `revert` takes it back.
        hal_attention: send Hugging Face models' attention to hal (`attn_implementation="hal"`); False leaves theirs.
    """

    strategy: FusionStrategy = FusionStrategy.FULL_BLOCK
    optimization_level: OptimizationLevel = OptimizationLevel.BALANCED
    enable_mixed_precision: bool = True
    enable_memory_optimization: bool = True
    target_sequence_length: int = 512
    merge_projections: bool = True
    hal_attention: bool = True


@attrs.frozen
class FusionPerformanceStats:
    """What was measured.

    Attributes:
        baseline_kernels, fused_kernels: of one call, counted by the profiler: kernels on CUDA; on the CPU calls of
            operators that compute, compiled kernels included. kernel_reduction: the share that is gone.
        graph_launches: of CUDA graphs in one call of the fused model.
        baseline_ms, fused_ms: medians of interleaved calls. speedup: their quotient.
        relative_error: ||fused - baseline|| / ||baseline|| of the output.
        kernels: the fused model's kernels by name, with their number.
    """

    baseline_kernels: int
    fused_kernels: int
    kernel_reduction: float
    graph_launches: int
    baseline_ms: float
    fused_ms: float
    speedup: float
    relative_error: float
    kernels: dict[str, int]


def _operators(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


#: Operators that make or view tensors and compute nothing.
_VIEWS = _operators("""
    alias as_strided chunk detach detach_ empty empty_like empty_strided new_empty expand flatten lift_fresh narrow
    permute resize_ result_type select slice split split_with_sizes squeeze t transpose unbind unflatten unsqueeze view
    view_as _reshape_alias _unsafe_view reshape is_nonzero item _local_scalar_dense set_ contiguous expand_as numpy_T mT
    swapaxes movedim size stride sym_size resolve_conj resolve_neg promote_types
""")
#: Operators that copy: kernels, unless they only serve the operator that calls them.
_COPIES = _operators("to _to_copy copy_ fill_ zero_")


class UnifiedAttentionFusion(nn.Module):
    """A model some of whose modules run compiled. The modules, parameters and state dict stay the model's own.

    Attributes:
        module: the model. fused: names of the compiled modules ("" is the model itself). config: as given.
    """

    def __init__(self, module: nn.Module, config: FusionConfig) -> None:
        super().__init__()
        self.module, self.config = module, config
        self.fused = find_modules(module, config.strategy)
        if not self.fused:
            raise ContractError(
                f"The model has no module for {config.strategy.value}: its modules are "
                f"{', '.join(sorted({type(each).__name__ for each in module.modules()}))}. Use FusionStrategy.MODEL. "
                "Nothing was changed."
            )
        self.training = module.training
        self._attention = self._to_hal() if config.hal_attention else None
        self._merged = merge_projections(module) if config.merge_projections else []
        options: dict[str, Any] = {"fullgraph": config.optimization_level is not OptimizationLevel.CONSERVATIVE}
        device = next((each.device.type for each in module.parameters()), "cpu")
        if config.optimization_level is OptimizationLevel.AGGRESSIVE:
            options["dynamic"] = False
            if device == "cuda":
                options["mode"] = "reduce-overhead"
        if device == "cpu":  # so that the profiler sees compiled kernels
            options["options"] = {"cpp.enable_kernel_profile": True}
        for name in self.fused:
            part = module.get_submodule(name)
            part._compiled_call_impl = torch.compile(_caller(part), **options)

    def _to_hal(self) -> str | None:
        """Send a Hugging Face model's attention to hal. Returns what it had, or None where it is no such model."""
        config, change = getattr(self.module, "config", None), getattr(self.module, "set_attn_implementation", None)
        before = getattr(config, "_attn_implementation", None)
        if change is None or not isinstance(before, str):
            return None
        import hal_nn

        hal_nn.register_huggingface()
        change("hal")
        return before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((each.device.type for each in self.module.parameters()), "cpu")
        mixed = self.config.enable_mixed_precision and device == "cuda"
        record = torch.is_grad_enabled() and (self.training or not self.config.enable_memory_optimization)
        autocast = torch.autocast(device, torch.bfloat16, enabled=mixed or torch.is_autocast_enabled(device))
        with autocast, torch.set_grad_enabled(record):
            return self.module(*args, **kwargs)

    def revert(self) -> nn.Module:
        """The model as it was: not compiled, with its own attention."""
        for name in self.fused:
            self.module.get_submodule(name)._compiled_call_impl = None
        while self._merged:
            self._merged.pop().revert()
        if self._attention is not None:
            self.module.set_attn_implementation(self._attention)  # type: ignore[operator]
            self._attention = None
        return self.module


def _caller(module: nn.Module) -> Callable[..., Any]:
    """The module's call as a function of this file: `Module.compile` leaves torch's own modules uncompiled, because
    Dynamo starts in no frame of theirs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return call


def find_modules(model: nn.Module, strategy: FusionStrategy) -> list[str]:
    """Names of the modules that a strategy compiles, outermost first, none inside another."""
    if strategy is FusionStrategy.MODEL:
        return [""]
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(other == "" or name.startswith(f"{other}.") for other in found)
        if not inside and _belongs(module, strategy):
            found.append(name)
    return found


def _belongs(module: nn.Module, strategy: FusionStrategy) -> bool:
    kind = type(module).__name__.lower()
    children = [type(each).__name__.lower() for each in module.modules()][1:]
    if strategy is FusionStrategy.NORM:
        return "norm" in kind and any(True for _ in module.parameters()) and not children
    if strategy is FusionStrategy.ATTENTION:
        return "attention" in kind and any("linear" in each for each in children)
    if strategy is FusionStrategy.MLP:
        return any(part in kind for part in ("mlp", "feedforward", "ffn")) and any(
            "linear" in each for each in children
        )
    direct = [type(each).__name__.lower() for each in module.children()]
    # A block holds its norms and its attention as its own children; a stack of blocks does not.
    return (
        any("attention" in each for each in direct)
        and any("attention" in each for each in children)
        and len(direct) > 1
    )


def create_unified_attention_fusion(
    model: nn.Module,
    fusion_strategy: FusionStrategy = FusionStrategy.FULL_BLOCK,
    optimization_level: OptimizationLevel = OptimizationLevel.BALANCED,
    *,
    config: FusionConfig | None = None,
) -> UnifiedAttentionFusion:
    """Compile parts of a model in place; `revert` takes it back.

    Args:
        model: any module. fusion_strategy: which modules. optimization_level: how hard.
        config: all settings; the two arguments before it are ignored then.

    Raises:
        ContractError: the model has no module of the strategy, or is fused already.
    """
    if not isinstance(model, nn.Module):
        raise ContractError(f"create_unified_attention_fusion was given a {type(model).__name__}: pass a torch module.")
    compiled = [name or "the model" for name, each in model.named_modules() if each._compiled_call_impl is not None]
    if compiled:
        raise ContractError(f"Compiled already: {', '.join(compiled[:4])}. Call revert() first. Nothing was changed.")
    return UnifiedAttentionFusion(
        model, config or FusionConfig(strategy=fusion_strategy, optimization_level=optimization_level)
    )


def count_kernels(call: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """(kernels of one call by name, launches of CUDA graphs), by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels: dict[str, int] = {}
    events = profiler.events() or []
    # Ranges that torch.compile names lie on the device's timeline too.
    cuda = [each for each in events if each.device_type.name == "CUDA" and not each.is_user_annotation]
    names = [each.name for each in cuda]
    if not cuda:
        names = [name for each in events if each.cpu_parent is None for name in _computing(each)]
    for name in names:
        kernels[name] = kernels.get(name, 0) + 1
    launches = sum(each.name == "cudaGraphLaunch" for each in events)
    return kernels, launches


def _computing(event: Any) -> list[str]:
    """Names of the innermost operators that compute, within an event of the CPU."""
    below = [name for each in event.cpu_children for name in _computing(each)]
    if event.name in _VIEWS or not ("::" in event.name or "cpp_fused" in event.name):
        return below
    if event.name in _COPIES:
        return below or [event.name]
    return below if any(name not in _COPIES for name in below) else [event.name]


def benchmark_fusion_performance(
    baseline: nn.Module, fused: nn.Module, input_data: Any, num_runs: int = 100
) -> FusionPerformanceStats:
    """Compare two models on an input, in inference.

    Args:
        baseline: the model that is not fused: another instance with the same weights, since fusion is in place.
        fused: the fused one. input_data: a tensor, a tuple or a dict of arguments. num_runs: timed calls of each.

    Raises:
        ContractError: both are one model.
    """
    if getattr(fused, "module", fused) is baseline:
        raise ContractError(
            "baseline is the model inside fused, which is compiled in place: give a copy that was made before, by "
            "copy.deepcopy(model)."
        )
    if num_runs < 1:
        raise ContractError(f"num_runs is {num_runs}: give 1 or more.")
    modes = baseline.training, fused.training
    baseline.eval()
    fused.eval()

    def timed(model: nn.Module) -> float:
        start = time.perf_counter()
        run(model, input_data)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    try:
        with torch.inference_mode():
            for _ in range(3):
                outs = [read_output(run(model, input_data))[0].detach().float().clone() for model in (baseline, fused)]
            before, _ = count_kernels(lambda: run(baseline, input_data))
            after, launches = count_kernels(lambda: run(fused, input_data))
            pairs = [(timed(baseline), timed(fused)) for _ in range(num_runs)]
    finally:
        baseline.train(modes[0])
        fused.train(modes[1])
    plain, quick = (statistics.median(times) for times in zip(*pairs, strict=True))
    counted = sum(before.values()), sum(after.values())
    error = float((outs[1] - outs[0]).norm() / outs[0].norm().clamp_min(1e-30))
    return FusionPerformanceStats(
        *counted, 1 - counted[1] / max(counted[0], 1), launches, plain, quick, plain / quick, error, after
    )

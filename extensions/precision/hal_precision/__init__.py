"""Transforms of models: adaptive precision, FP8 training, fused blocks.

    from hal_precision import PrecisionConfig, create_ultra_precision_module
    small = create_ultra_precision_module(model, PrecisionConfig(target_memory_reduction=0.8), calibration=batches)
    print(small.get_precision_stats())
    small.save("small.safetensors")

Importing this package imports no torch: a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hal_core import __version__ as __version__

#: Public names by the module that holds them.
_NAMES = {
    "adaptive": "LayerPlan PrecisionPlan PrecisionStats UltraPrecisionModule analyze_precision_opportunities "
    "create_ultra_precision_module plan_precision",
    "config": "AllocationStrategy PrecisionConfig QuantizationMode",
    "formats": "PrecisionFormat",
    "fp8": "FP8Config FP8Format FP8LinearLayer convert_model_to_fp8 has_fp8 revert_from_fp8",
    "fp8_attention": "FP8Attention FP8AttentionConfig",
    "fp8_training": "FP8TrainingEngine create_fp8_trainer",
    "fusion": "FusionConfig FusionPerformanceStats FusionStrategy OptimizationLevel UnifiedAttentionFusion "
    "benchmark_fusion_performance create_unified_attention_fusion find_modules",
    "int8": "Int8Calibration Int8Linear calibrate_int8",
    "packed": "PackedLinear",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)

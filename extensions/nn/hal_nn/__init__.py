"""Transformers on hal: the Hugging Face bridge, conversion of any model, drop-in modules, attention by configuration,
sparse attention, memory and batch sizes, validation.

    import hal_nn
    hal_nn.register_huggingface()
    model = AutoModel.from_pretrained(path, attn_implementation="hal")

    model, report = hal_nn.convert(any_model, sample)
    attention = hal_nn.PhotonicMultiHeadAttention(512, 8)      # nn.MultiheadAttention's arguments and state dict
    with hal_nn.override_sdpa() as counted:                    # programs that call torch's own function
        ...

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_core import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

#: Public names by the module that holds them; each is imported when it is used.
_NAMES = {
    "attention_config": "AttentionConfig AttentionPatterns",
    "attention_modules": "FlashAttention3 HybridFlashAttention PhotonicAttention PhotonicFlashAttention",
    "benchmark": "benchmark_attention_performance",
    "conversion": "ConversionReport LayerReport convert convert_to_photonic is_converted revert",
    "disturbance": "LayerSensitivity layer_sensitivity sensitive_layers",
    "framework": "create_attention register_attention unregister_attention",
    "global_config": "GlobalConfig",
    "hardware": "HardwareAbstractionLayer UnifiedMemoryManager detect_available_devices",
    "layers": "AttentionLayer FusedGELU OptimizedLinear",
    "multihead": "PhotonicMultiHeadAttention",
    "patterns": "KeyValueCache PatternAttention",
    "record": "DeviceRecord",
    "sdpa": "override_sdpa",
    "sparse": "DynamicSparseAttention SparsePattern create_sparse_attention",
    "validation": "ComponentValidator",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
#: Public names of other packages that are reached from here too, by the package that has them.
_OTHER_PACKAGES = {
    "hal_parallel": "ContextParallelAttention RingAttentionLayer create_context_parallel_attention "
    "create_ring_attention",
    "hal_precision": "FP8AttentionConfig FP8Config FP8LinearLayer FP8TrainingEngine FusionConfig FusionStrategy "
    "OptimizationLevel PrecisionFormat QuantizationMode UltraPrecisionModule UnifiedAttentionFusion",
    "hal_router": "AdaptiveRouter PerformanceMetrics WorkloadCharacteristics",
}
_PACKAGES = {name: package for package, names in _OTHER_PACKAGES.items() for name in names.split()}
__all__ = sorted([*_WHERE, "register_huggingface", "set_device", "unregister_huggingface"])


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used; ImportError for one whose package is not installed."""
    import importlib

    if package := _PACKAGES.get(name):
        try:
            return getattr(importlib.import_module(package), name)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            distribution = package.replace("_", "-")
            raise ImportError(
                f"hal_nn.{name} is {distribution}'s, which is not installed: pip install {distribution}", name=package
            ) from None
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def register_huggingface() -> None:
    """Make `attn_implementation="hal"` known to transformers. `import hal_nn.huggingface` does the same; twice is
    harmless.

    Raises:
        HalError: transformers is not installed, or is older than its attention interface.
    """
    from . import huggingface

    huggingface.register()


def unregister_huggingface() -> None:
    """Take back what `register_huggingface` did: transformers' own methods and tables are as they were."""
    from . import huggingface

    huggingface.unregister()


def set_device(model: nn.Module, device: str | None) -> nn.Module:
    """Send the attention of `model`, or of a part of it, to `device`; see `hal_nn.placement.set_device`."""
    from . import placement

    return placement.set_device(model, device)

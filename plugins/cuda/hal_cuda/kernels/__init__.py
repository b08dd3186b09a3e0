"""The device's own kernels: those of attention, and those beside it, which are called by name.

`vector_add`, `reduce_sum`, `reduce_max`, `fused_gelu_linear`, `rope_precompute_freqs`, `rope_forward`,
`rope_forward_fused`, `paged_kv_cache_append` and `paged_kv_cache_read` are CUDA C++, compiled by NVRTC at first use
through CuPy; a `triton_` twin of each but the first needs Triton alone. `triton_pool_rows`, `triton_pool_extremes`,
`triton_square_sums` and `triton_choose_blocks` make plans of sparse attention without waiting for the device.
`flash_attention_forward` is `hal_core.attention` by an older name. A name is imported when it is first used: importing
this package loads no kernel and neither CuPy, Triton nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cupy.gelu_linear import fused_gelu_linear as fused_gelu_linear
    from .cupy.paged import (
        paged_kv_cache_append as paged_kv_cache_append,
        paged_kv_cache_read as paged_kv_cache_read,
    )
    from .cupy.reductions import reduce_max as reduce_max, reduce_sum as reduce_sum
    from .cupy.rope import (
        rope_forward as rope_forward,
        rope_forward_fused as rope_forward_fused,
        rope_precompute_freqs as rope_precompute_freqs,
    )
    from .cupy.vector_add import vector_add as vector_add
    from .extra.attention import (
        flash_attention_forward as flash_attention_forward,
        triton_flash_attention_forward as triton_flash_attention_forward,
    )
    from .extra.block_choice import triton_choose_blocks as triton_choose_blocks
    from .extra.block_scores import (
        triton_pool_extremes as triton_pool_extremes,
        triton_pool_rows as triton_pool_rows,
        triton_square_sums as triton_square_sums,
    )
    from .extra.device_info import device_info as device_info
    from .extra.gelu_linear import triton_fused_gelu_linear as triton_fused_gelu_linear
    from .extra.gpt2 import patch_gpt2_model as patch_gpt2_model, unpatch_gpt2_model as unpatch_gpt2_model
    from .extra.paged import (
        triton_paged_kv_cache_append as triton_paged_kv_cache_append,
        triton_paged_kv_cache_read as triton_paged_kv_cache_read,
    )
    from .extra.paged_cache import PagedKVCache as PagedKVCache
    from .extra.reductions import triton_reduce_max as triton_reduce_max, triton_reduce_sum as triton_reduce_sum
    from .extra.rope import (
        triton_rope_forward as triton_rope_forward,
        triton_rope_forward_fused as triton_rope_forward_fused,
        triton_rope_precompute_freqs as triton_rope_precompute_freqs,
    )

#: Public names by the module that holds them.
_NAMES = {
    ".cupy.gelu_linear": "fused_gelu_linear",
    ".cupy.paged": "paged_kv_cache_append paged_kv_cache_read",
    ".cupy.reductions": "reduce_max reduce_sum",
    ".cupy.rope": "rope_forward rope_forward_fused rope_precompute_freqs",
    ".cupy.vector_add": "vector_add",
    ".extra.attention": "flash_attention_forward triton_flash_attention_forward",
    ".extra.block_choice": "triton_choose_blocks",
    ".extra.block_scores": "triton_pool_extremes triton_pool_rows triton_square_sums",
    ".extra.device_info": "device_info",
    ".extra.gelu_linear": "triton_fused_gelu_linear",
    ".extra.gpt2": "patch_gpt2_model unpatch_gpt2_model",
    ".extra.paged": "triton_paged_kv_cache_append triton_paged_kv_cache_read",
    ".extra.paged_cache": "PagedKVCache",
    ".extra.reductions": "triton_reduce_max triton_reduce_sum",
    ".extra.rope": "triton_rope_forward triton_rope_forward_fused triton_rope_precompute_freqs",
    "hal_core.testing": "BenchmarkResult BenchmarkRunner",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHERE[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

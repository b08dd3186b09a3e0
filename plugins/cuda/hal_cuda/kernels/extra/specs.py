"""Specifications of the kernels beside attention. Imports nothing heavy: the plugin's hook reads it."""

from hal_core.plugin_api import KernelSpec

_REFERENCES = "hal_cuda.kernels.extra.references"
_FLOATS = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 4e-3}
_COPIES = {"float32": 0.0, "float16": 0.0, "bfloat16": 0.0}
_SINGLE = {"float32": 2e-6}
#: By name: signature, reference, sampler, and the largest relative error by dtype.
_TWO_LANGUAGES = {
    "reduce_max": ("(x[...]) -> []", "reduce_max", "draw_reduce_max", _COPIES),
    "fused_gelu_linear": (
        "(x[M, K], w[N, K], bias[N] or None, use_tanh_approx=False) -> [M, N]",
        "fused_gelu_linear",
        "draw_fused_gelu_linear",
        _FLOATS,
    ),
    "rope_precompute_freqs": (
        "(max_seq_len, head_dim, base=10000.0) -> (cos, sin)[max_seq_len, head_dim / 2]",
        "rope_precompute_freqs",
        "draw_rope_precompute_freqs",
        _SINGLE,
    ),
    "rope_forward": (
        "(q[B, H, N, D], k[B, H', N, D], cos[L, D / 2], sin[L, D / 2]) -> (q, k)",
        "rope_forward",
        "draw_rope_forward",
        _SINGLE,
    ),
    "rope_forward_fused": (
        "(q[B, H, N, D], k[B, H', N, D], base=10000.0) -> (q, k)",
        "rope_forward_fused",
        "draw_rope_forward_fused",
        _FLOATS,
    ),
    "paged_kv_cache_append": (
        "(pool[P, 2, H, S, D], slots[T], keys[T, H, D], values[T, H, D]) -> pool",
        "paged_kv_cache_append",
        "draw_paged_kv_cache_append",
        _COPIES,
    ),
    "paged_kv_cache_read": (
        "(pool[P, 2, H, S, D], table[B, n], lengths[B], max_seq_len) -> (keys, values)[B, H, max_seq_len, D]",
        "paged_kv_cache_read",
        "draw_paged_kv_cache_read",
        _COPIES,
    ),
    "flash_attention_forward": (
        "(q[B, H, N, D], k[B, H', N', D], v[B, H', N', D], scale=None, is_causal=False) -> (out, lse[B, H, N])",
        "flash_attention_forward",
        "draw_flash_attention_forward",
        _FLOATS | {"float32": 1e-5},
    ),
}
_KERNELS = _TWO_LANGUAGES | {f"triton_{name}": about for name, about in _TWO_LANGUAGES.items()}
_KERNELS["triton_reduce_sum"] = ("(x[...], dim=-1) -> [...]", "row_sums", "draw_row_sums", _FLOATS)
_KERNELS |= {
    "triton_pool_rows": (
        "(x[B, H, N, D], size, scale=1.0, wide=False) -> [B, H, N / size, D]",
        "pool_rows",
        "draw_pool_rows",
        _FLOATS,
    ),
    "triton_pool_extremes": (
        "(x[B, H, N, D], size) -> [B, H, N / size, 3 D]",
        "pool_extremes",
        "draw_pool_extremes",
        _FLOATS,
    ),
    "triton_square_sums": (
        "(scores[B, H, R, C], per_row, per_column, stride=1, low=None, high=None, first=0, scale=1.0) -> "
        "[B, H, R / per_row, C / per_column]",
        "square_sums",
        "draw_square_sums",
        _FLOATS,
    ),
    "triton_choose_blocks": (
        "(share[B, H, R, C], hidden[R, C], forced[R, C], total) -> (indices[B, H, R, C], counts[B, H, R])",
        "choose_blocks",
        "draw_choose_blocks",
        {"float32": 0.0},
    ),
}
#: The call of each kernel as text.
SIGNATURES = {name: name + about[0] for name, about in _KERNELS.items()}

KERNELS = [
    KernelSpec(
        name=name,
        signature=SIGNATURES[name],
        reference=f"{_REFERENCES}:{reference}",
        sampler=f"{_REFERENCES}:{sampler}",
        tolerance=tolerance,
    )
    for name, (_, reference, sampler, tolerance) in _KERNELS.items()
]

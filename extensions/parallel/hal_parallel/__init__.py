"""One sequence over many devices: ring and context parallel attention on torch.distributed, over any hal device inside.

    import hal_parallel
    out = hal_parallel.attention(query, key, value, mesh, layout="zigzag", is_causal=True)   # on every rank
    print(hal_parallel.explain(query, key, value, mesh, layout="zigzag", is_causal=True))    # which strategy, and why

Importing this package imports no torch: a name is imported when it is first used.
"""

from importlib import import_module
from typing import Any

from hal_core import __version__ as __version__

#: Public names by the module that holds them.
_NAMES = {
    "api": "Explanation attention explain shard unshard",
    "cost": "LinkRate StrategyEstimate measure_link",
    "exchange": "ExchangeError",
    "layout": "TokenLayout make_layout",
    "models": "context",
    "modules": "ContextParallelAttention RingAttentionLayer create_context_parallel_attention create_ring_attention",
    "planning": "AttentionLayers Plan plan",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)

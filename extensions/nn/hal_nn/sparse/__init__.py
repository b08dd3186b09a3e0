"""Sparse attention: tilings that emit a block plan, what a plan loses, and modules that run on them.

import hal_core as hal
from hal_nn.sparse import SparsePattern, tiling_of
with hal.use("cpu:0", tiling=tiling_of(SparsePattern.DYNAMIC_THRESHOLD, 0.9)):
    out = hal.attention(query, key, value, is_causal=True)
"""

from __future__ import annotations

from .attention import SparseResult as SparseResult, sparse_attention as sparse_attention
from .dynamic import DynamicTiling as DynamicTiling
from .learned import LearnedTiling as LearnedTiling, SparseGate as SparseGate, train_gate as train_gate
from .lost_mass import lost_mass as lost_mass, lost_mass_bound as lost_mass_bound
from .module import (
    DynamicSparseAttention as DynamicSparseAttention,
    create_sparse_attention as create_sparse_attention,
)
from .patterns import SparsePattern as SparsePattern, StaticTiling as StaticTiling, tiling_of as tiling_of
from .selection import plan_density as plan_density

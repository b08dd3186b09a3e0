"""One attention call described without its tensors: what selection, refusal and estimates work on."""

import enum
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

from .device_info import Record

if TYPE_CHECKING:
    import torch

#: For annotations: torch itself is imported when a tensor arrives.
Tensor: TypeAlias = "torch.Tensor"
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class MaskKind(enum.StrEnum):
    NONE = "none"
    BOOLEAN = "boolean"  # True: the query may read the key
    ADDITIVE = "additive"  # added to the scores after scale and softcap


class Causal(enum.StrEnum):
    """Where the causal diagonal starts.

    Row i reads key j where j <= i + offset. TOP_LEFT: offset = diagonal (torch's `is_causal`).
    BOTTOM_RIGHT: offset = len_k - len_q + diagonal, with each sequence's own lengths where they differ.
    """

    NONE = "none"
    TOP_LEFT = "top_left"
    BOTTOM_RIGHT = "bottom_right"


@dataclass(frozen=True, eq=False, repr=False, match_args=False)
class AttentionRequest(Record):
    """An attention call's static description. It never holds a tensor.

    Attributes:
        batch, heads_q, heads_kv: sizes. Query head h reads key head h // (heads_q // heads_kv). For packed lengths,
            batch counts the sequences.
        len_q, len_k: exact, or the upper bound of a bucket; a session reads exact lengths from the tensors. For packed
            lengths the longest sequence; for a paged cache the most keys a sequence can hold.
        dim_qk, dim_v: head size of query and key, and of value.
        dtype: of query, key and value ("float32", "bfloat16" ...).
        device: torch device of the tensors ("cpu", "cuda:0").
        last_dim_contiguous: whether query, key and value all have stride 1 in their last dimension.
        mask: kind of `attn_mask`; broadcast to [batch, heads_q, len_q, len_k].
        mask_batch, mask_heads: over how many batch entries and heads the mask runs; 1 where it broadcasts.
        causal, diagonal: see `Causal`.
        window: (left, right), both inclusive, None for open: row i reads keys i + offset - left to i + offset + right,
            with the offset of `causal` (of TOP_LEFT where causal is NONE).
        softcap: c in c * tanh(score / c), applied after scale, before the mask; None for none.
        scale: factor on query @ key^T; None for 1 / sqrt(dim_qk).
        dropout: probability of dropping a normalised weight; kept ones are divided by 1 - dropout.
        packed: sequences are packed along the length, with cumulative lengths.
        page_size: tokens in a page of a paged key/value cache; None for no paging.
        used: only some keys of each batch entry or packed sequence are there, as many as cache_seqlens says; for packed
            ones cu_seqlens_k says where they begin. A paged cache is so always.
        cache_dtype: dtype of key and value where it is not `dtype` (a cache with scales: FP8, "int8", or "int4", two of
            which share a byte along the head size); None otherwise.
        block_plan: (block_q, block_k, max_blocks) of a block-sparse plan; None for dense.
        tiling: (name, block_q, block_k) of a tiling that the caller brings, 0 for uneven ranges; None: the device's
            own.
        options: device options as (name, value), sorted by name.
        grads: subset of {"q", "k", "v", "mask"} that needs gradients.
        lse: whether the log-sum-exp is returned. grad_lse: whether gradients flow through it.
        deterministic: bitwise equal results for equal inputs are required.
        max_error: largest acceptable ||x - reference|| / ||reference||; None for the device's declared numerics.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int
    dtype: str
    device: str = "cpu"
    last_dim_contiguous: bool = True
    mask: MaskKind = MaskKind.NONE
    mask_batch: int = 1
    mask_heads: int = 1
    causal: Causal = Causal.NONE
    diagonal: int = 0
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    packed: bool = False
    page_size: int | None = None
    used: bool = False
    cache_dtype: str | None = None
    block_plan: tuple[int, int, int] | None = None
    tiling: tuple[str, int, int] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    grads: frozenset[str] = frozenset()
    lse: bool = False
    grad_lse: bool = False
    deterministic: bool = False
    max_error: float | None = None

    @property
    def effective_scale(self) -> float:
        return self.scale if self.scale is not None else max(self.dim_qk, 1) ** -0.5

    @property
    def macs(self) -> int:
        """Multiply-accumulates of both products over all query-key pairs (masked pairs counted: a dense upper
        bound).
        """
        return self.batch * self.heads_q * self.len_q * self.len_k * (self.dim_qk + self.dim_v)

    def band(self, len_q: int, len_k: int) -> tuple[int | None, int | None]:
        """(low, high): causal and window let row i read keys i + low to i + high; None for no bound."""
        offset = self.diagonal + (len_k - len_q if self.causal is Causal.BOTTOM_RIGHT else 0)
        left, right = self.window or (None, None)
        # A window's right side is 0 or more, so the diagonal bounds it.
        right = right if self.causal is Causal.NONE else 0
        return None if left is None else offset - left, None if right is None else offset + right

    @property
    def visible_macs(self) -> int:
        """`macs` over the pairs that causal, window and block plan leave visible; a mask's content is not known."""
        low, high = self.band(self.len_q, self.len_k)
        ends = self.len_q * self.len_k if high is None else _clipped_sum(high + 1, self.len_q, self.len_k)
        pairs = max(ends - (0 if low is None else _clipped_sum(low, self.len_q, self.len_k)), 0)
        if self.block_plan is not None:
            block_q, block_k, most = self.block_plan
            pairs = min(pairs, -(-self.len_q // block_q) * block_q * most * block_k)
        return self.batch * self.heads_q * pairs * (self.dim_qk + self.dim_v)

    @property
    def bytes_moved(self) -> int:
        """Fewest bytes: query, key and value read once, output written once."""
        size = DTYPE_BYTES.get(self.dtype, 4)
        bits = (
            4
            if self.cache_dtype == "int4"
            else 8 * DTYPE_BYTES.get(self.cache_dtype or self.dtype, 1 if self.cache_dtype else size)
        )
        tokens = 8 * self.heads_q * self.len_q * size + self.heads_kv * self.len_k * bits
        return self.batch * tokens * (self.dim_qk + self.dim_v) // 8

    def describe(self) -> str:
        """One line for messages: "batch 2, heads 32/8, 4096 x 4096, head_dim 80, bfloat16, causal"."""
        heads = self.heads_q if self.heads_q == self.heads_kv else f"{self.heads_q}/{self.heads_kv}"
        dims = self.dim_qk if self.dim_qk == self.dim_v else f"{self.dim_qk}/{self.dim_v}"
        parts = {
            f"batch {self.batch}, heads {heads}, {self.len_q} x {self.len_k}, head_dim {dims}, {self.dtype}": True,
            "causal": self.causal is Causal.TOP_LEFT,
            "causal bottom-right": self.causal is Causal.BOTTOM_RIGHT,
            f"diagonal {self.diagonal}": self.diagonal != 0,
            f"scale {self.scale}": self.scale is not None,
            f"{self.mask} mask": self.mask is not MaskKind.NONE,
            f"window {self.window}": self.window is not None,
            f"softcap {self.softcap}": self.softcap is not None,
            f"dropout {self.dropout:g}": self.dropout > 0,
            "packed": self.packed,
            f"pages of {self.page_size}": self.page_size is not None,
            "used lengths": self.used,
            f"{self.cache_dtype} cache": self.cache_dtype is not None,
            f"block plan {self.block_plan}": self.block_plan is not None,
            f"tiling {self.tiling}": self.tiling is not None,
            ", ".join(f"{name}={value}" for name, value in self.options): bool(self.options),
            f"gradients of {', '.join(sorted(self.grads))}": bool(self.grads),
            "log-sum-exp": self.lse,
        }
        return ", ".join(text for text, given in parts.items() if given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self) | {
            "grads": sorted(self.grads),
            "mask": str(self.mask),
            "causal": str(self.causal),
            "options": [list(option) for option in self.options],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s form, also after JSON made lists of tuples."""
        tuples = {
            name: tuple(values[name]) for name in ("window", "block_plan", "tiling") if values.get(name) is not None
        }
        typed = {
            "mask": MaskKind(values["mask"]),
            "causal": Causal(values["causal"]),
            "options": tuple((name, value) for name, value in values.get("options", ())),
            "grads": frozenset(values["grads"]),
        }
        return cls(**(values | tuples | typed))


def _clipped_sum(first: int, count: int, limit: int) -> int:
    """Sum over i in [0, count) of first + i clipped to [0, limit]."""
    low = min(max(-first, 0), count)  # rows still at 0
    high = min(max(limit - first, low), count)  # rows from here on at the limit
    return (high - low) * (2 * first + low + high - 1) // 2 + (count - high) * limit


class SequenceMetadata(NamedTuple):
    """Tensors that say where each sequence of a packed or paged call lies. Unused ones are None.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], cumulative lengths of packed queries and keys.
        page_table: int32 [batch, most pages], the page number of each sequence's pages in order.
        cache_seqlens: int32 [batch] or [sequences], keys that each sequence holds in the cache; without pages, how many
            of the keys of a batch entry or packed sequence are used.
        key_scale: float32, broadcastable to [batch, heads_kv, 1, dim_qk]; multiplies a cache's keys.
        value_scale: float32, broadcastable to [batch, heads_kv, 1, 1], or one for each key: `value`'s shape with a head
            size of 1 (and pages of 2 or more); multiplies a cache's values.
    """

    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    page_table: Any = None
    cache_seqlens: Any = None
    key_scale: Any = None
    value_scale: Any = None


class AttentionOutput(NamedTuple):
    """Attention's result.

    Attributes:
        out: [batch, heads_q, len_q, dim_v], the query's dtype. 0 for a row that reads no key.
        lse: natural log-sum-exp of the scaled scores, [batch, heads_q, len_q], float32 (float64 for float64), -inf for
            a row that reads no key; None where it was not asked for.
    """

    out: Any
    lse: Any = None


class Grads(NamedTuple):
    """Gradients of query, key, value and additive mask, each in its tensor's shape; None where not asked for."""

    query: Any = None
    key: Any = None
    value: Any = None
    mask: Any = None

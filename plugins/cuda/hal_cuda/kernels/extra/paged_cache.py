"""A cache of keys and values in pages: which page belongs to whom is kept on the host, the numbers on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import MemoryLimitError

from .checks import FLOATS, refuse

_BACKENDS = ("cuda", "triton")


class PagedKVCache:
    """Keys and values of many sequences in pages of one pool.

    Args:
        num_pages, page_size: pages, and tokens of a page. num_heads, head_dim: of keys and values.
        dtype: float16 where it is None; float32 or bfloat16.
        backend: which kernels move tokens: "cuda" (CuPy) or "triton".
        device: where the pool lies; None for the current CUDA device.

    Attributes:
        pool: [num_pages, 2, num_heads, page_size, head_dim].

    Raises:
        ContractError: sizes, a dtype or a backend that there is not.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        backend: str = "cuda",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        kind = torch.float16 if dtype is None else dtype
        refuse(
            "PagedKVCache",
            (
                min(num_pages, page_size, num_heads, head_dim) < 1,
                f"sizes {num_pages}, {page_size}, {num_heads} and {head_dim}: use 1 or more",
            ),
            (num_pages * page_size >= 1 << 31, f"{num_pages} pages of {page_size}: int32 slots end at {(1 << 31) - 1}"),
            (kind not in FLOATS, f"dtype {kind}: use float32, float16 or bfloat16"),
            (backend not in _BACKENDS, f"backend {backend!r}: use 'cuda' or 'triton'"),
        )
        self.num_pages, self.page_size, self.num_heads, self.head_dim = num_pages, page_size, num_heads, head_dim
        self.dtype, self.backend = kind, backend
        form = (num_pages, 2, num_heads, page_size, head_dim)
        self.pool = torch.zeros(form, dtype=kind, device="cuda" if device is None else device)
        self._append, self._read = _kernels(backend)
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def allocate_page(self) -> int:
        """A page that was free, for a caller who keeps his own tables; `free_page` gives it back.

        Raises:
            MemoryLimitError: no page is free.
        """
        if not self._free:
            raise self._full(1)
        return self._free.pop()

    def free_page(self, page: int) -> None:
        """Give back a page of `allocate_page`. Raises ContractError where it is free or a sequence's."""
        held = page in self._free or any(page in pages for pages in self._pages.values())
        refuse(
            "free_page",
            (held or not 0 <= page < self.num_pages, f"page {page}: give one that allocate_page returned"),
        )
        self._free.append(page)

    def append(self, batch_idx: int, k: Tensor, v: Tensor) -> None:
        """Put tokens behind those of a sequence, which begins with its first ones.

        Args:
            batch_idx: the sequence's number, any. k, v: [T, num_heads, head_dim], or [num_heads, head_dim] for one
                token.

        Raises:
            ContractError: other shapes, dtypes or devices. MemoryLimitError: too few free pages. The sequence is then
            as it was.
        """
        k, v = (t[None] if t.dim() == 2 else t for t in (k, v))
        form = (self.num_heads, self.head_dim)
        refuse(
            "append",
            (
                k.shape != v.shape or k.dim() != 3 or tuple(k.shape[1:]) != form,
                f"{list(k.shape)} and {list(v.shape)}: use [T, {form[0]}, {form[1]}] twice",
            ),
        )
        before = self._lengths.get(batch_idx, 0)
        after = before + k.shape[0]
        held = self._pages.get(batch_idx, [])
        needed = -(-after // self.page_size) - len(held)
        if needed > len(self._free):
            raise self._full(needed)
        taken = [self._free[-1 - i] for i in range(needed)]
        pages = torch.tensor(held + taken, dtype=torch.int32)
        at = torch.arange(before, after, dtype=torch.int32)
        slots = pages[at // self.page_size] * self.page_size + at % self.page_size if k.shape[0] else at
        self._append(self.pool, slots.to(self.pool.device, non_blocking=True), k, v)
        del self._free[len(self._free) - needed :]
        self._pages[batch_idx], self._lengths[batch_idx] = held + taken, after

    def read(self, batch_indices: Sequence[int], max_seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences, each [B, num_heads, L, head_dim], 0 behind a sequence's end.

        Args:
            batch_indices: numbers of sequences; an unknown one has no tokens. max_seq_len: L; None for the longest of
                them.
        """
        lengths = [self.get_seq_len(number) for number in batch_indices]
        held = [self._pages.get(number, []) for number in batch_indices]
        table = torch.full((len(held), max([1, *map(len, held)])), -1, dtype=torch.int32)
        for row, pages in enumerate(held):
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        place = self.pool.device
        most = max(lengths, default=0) if max_seq_len is None else max_seq_len
        found: tuple[Tensor, Tensor] = self._read(
            self.pool, table.to(place), torch.tensor(lengths, dtype=torch.int32).to(place), most
        )
        return found

    def free_sequence(self, batch_idx: int) -> None:
        """Give back the pages of a sequence; an unknown one has none."""
        self._free += reversed(self._pages.pop(batch_idx, []))
        self._lengths.pop(batch_idx, None)

    def get_seq_len(self, batch_idx: int) -> int:
        """Tokens of a sequence; 0 for an unknown one."""
        return self._lengths.get(batch_idx, 0)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def memory_used_mb(self) -> float:
        """10^6 bytes of the pages that are in use."""
        return (self.num_pages - len(self._free)) * (self.pool.nbytes // self.num_pages) / 1e6

    def _full(self, needed: int) -> MemoryLimitError:
        page = self.pool.nbytes // self.num_pages
        used = (self.num_pages - len(self._free)) * page
        return MemoryLimitError(f"this cache on {self.pool.device}", needed * page, used, self.pool.nbytes)


def _kernels(backend: str) -> tuple[Any, Any]:
    """The kernels that put tokens into pages, and that take them out."""
    if backend == "cuda":
        from ..cupy.paged import paged_kv_cache_append, paged_kv_cache_read

        return paged_kv_cache_append, paged_kv_cache_read
    from .paged import triton_paged_kv_cache_append, triton_paged_kv_cache_read

    return triton_paged_kv_cache_append, triton_paged_kv_cache_read

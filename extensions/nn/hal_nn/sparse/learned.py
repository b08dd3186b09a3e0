"""The learned pattern: a small gate that is trained to tell which blocks dense attention reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from hal_core import AttentionRequest, BlockPlan, Causal, ContractError

from ..arguments import need_tensor, need_whole
from .accelerated import device_kernel
from .scores import KERNEL_DTYPES, _pool, _repeat
from .selection import SparseTiling, allocate, cut_of

_numbers = itertools.count()
#: Distances in blocks that have a bias of their own: 0 to 7, then one for each doubling.
_NEAR, _DISTANCES = 8, 24


class SparseGate(nn.Module):
    """Logits of the share of attention that each block of keys gets, from pooled queries and keys.

    A block's queries are pooled to their mean; its keys to mean, maximum and minimum. Each goes through a matrix of its
    head, and their product is the logit, together with a bias for each head and distance. A new gate gives the scores
    of the means, so that it is useful before it is trained.

    Args:
        num_heads, num_kv_heads: of the attention. head_dim: of queries and keys.

    Raises:
        ContractError: sizes that cannot be; by a call, queries and keys of other heads or another head_dim.

    Source: Gao et al. 2024 (SeerAttention), section 3; there, pooling comes before the rotary embedding.
    """

    def __init__(self, num_heads: int, head_dim: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("num_kv_heads", kv)):
            need_whole(name, size)
        if num_heads % kv:
            raise ContractError(f"{num_heads} heads and {kv} key heads were given: use a multiple")
        own = torch.eye(head_dim).repeat(num_heads, 1, 1)
        other = torch.zeros(kv, 3 * head_dim, head_dim)
        other[:, :head_dim] = torch.eye(head_dim)
        self.query, self.key = nn.Parameter(own), nn.Parameter(other)
        self.distance = nn.Parameter(torch.zeros(num_heads, _DISTANCES))
        self.number = next(_numbers)

    def need_heads(self, query: Tensor, key: Tensor) -> None:
        """Raise ContractError unless queries and keys are of the gate's heads and head_dim."""
        heads, kv, size = self.query.shape[0], self.key.shape[0], self.query.shape[1]
        for name, given, wanted in (("query", query, heads), ("key", key, kv)):
            need_tensor(name, given, f"[batch, {wanted}, length, {size}]")
            if given.dim() != 4 or (given.shape[1], given.shape[3]) != (wanted, size):
                raise ContractError(
                    f"{name} {list(given.shape)} was given to a gate of {heads} heads, {kv} key heads and head_dim "
                    f"{size}: pass [batch, {wanted}, length, {size}]"
                )

    def forward(self, query: Tensor, key: Tensor, request: AttentionRequest, block_q: int, block_k: int) -> Tensor:
        """Logits, float32 [batch, heads_q, query blocks, key blocks]; nothing hidden."""
        self.need_heads(query, key)
        wide = torch.is_grad_enabled() or query.dtype not in KERNEL_DTYPES or key.dtype not in KERNEL_DTYPES
        mean = None if wide else device_kernel("triton_pool_rows", query)
        extremes = None if wide else device_kernel("triton_pool_extremes", query)
        if mean is not None and extremes is not None:
            pooled, parts = mean(query, block_q, wide=True), extremes(key, block_k)
        else:
            pooled, parts = _pool(query, block_q), torch.cat([_pool(key, block_k), *_extremes(key, block_k)], -1)
        rows, columns = pooled @ self.query, _repeat(parts @ self.key, query.shape[1])
        bucket = _buckets(query.shape[2], key.shape[2], block_q, block_k, query.device)
        scores: Tensor = rows @ columns.mT * request.effective_scale + self.distance[:, bucket]
        return scores


def _extremes(key: Tensor, size: int) -> list[Tensor]:
    """Maximum and minimum of blocks of keys, float32 [batch, heads, blocks, dim]."""
    full, found = key.shape[2] // size * size, []
    whole, rest = key[:, :, :full].unflatten(2, (-1, size)), key[:, :, full:]
    for extreme in (torch.amax, torch.amin):
        parts = [extreme(whole, 3), *([extreme(rest, 2, keepdim=True)] if rest.shape[2] else [])]
        found.append(torch.cat(parts, 2).float())
    return found


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept serves calls with gradients too
def _buckets(len_q: int, len_k: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """Which bias of distance each pair of blocks has, int64 [query blocks, key blocks]; kept, so never written to."""
    last = (torch.arange(-(-len_q // block_q)) + 1) * block_q - 1
    own = (last + len_k - len_q).clamp(0, max(len_k - 1, 0)) // block_k
    away = (own.unsqueeze(1) - torch.arange(-(-len_k // block_k))).abs()
    far = _NEAR + (away.clamp(min=_NEAR) / _NEAR).log2().long()
    return torch.where(away < _NEAR, away, far).clamp(max=_DISTANCES - 1).to(device)


class LearnedTiling(SparseTiling):
    """The best blocks by a gate's estimate, as many as the sparsity leaves to heads and rows together.

    Args:
        gate: a `SparseGate`, of these heads. sparsity, block_q, block_k: see `SparseTiling`; a gate works for other
            blocks than it was trained for, only worse.
    """

    needs_content = True

    def __init__(self, gate: SparseGate, sparsity: float = 0.9, block_q: int = 64, block_k: int = 64) -> None:
        super().__init__(sparsity, block_q, block_k)
        if not isinstance(gate, SparseGate):
            raise ContractError(f"gate is a {type(gate).__name__}: pass a SparseGate(num_heads, head_dim)")
        self.gate = gate
        self.max_blocks = 1 << 14
        self.name = f"learned(gate {gate.number},{self.sparsity:g},{block_q}x{block_k})"

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> BlockPlan:
        """The plan for a call's queries and keys, on their device."""
        if query is None or key is None:
            raise ContractError(f"tiling {self.name} plans from query and key: they were not given")
        with torch.no_grad():
            cut = cut_of(request, self.block_q, self.block_k, self.sparsity, query.device)
            logits = self.gate(query, key, request, self.block_q, self.block_k).masked_fill_(cut.hidden, -torch.inf)
            share = logits.softmax(-1)
            return allocate(share.nan_to_num_(0.0) if cut.blind else share, cut, self.block_q, self.block_k)


def block_mass(query: Tensor, key: Tensor, request: AttentionRequest, block_q: int, block_k: int) -> Tensor:
    """The share of its attention that each query block gives to each key block: what a gate is trained to tell.

    Returns:
        float32 [batch, heads_q, query blocks, key blocks]; a row sums to 1, or to 0 where it sees nothing. Costs the
        scores of dense attention, a query block at a time.
    """
    len_q, len_k = query.shape[2], key.shape[2]
    columns = _repeat(key.float(), query.shape[1]).mT
    low, high = request.band(len_q, len_k)
    position, rows = torch.arange(len_k, device=key.device), []
    for start in range(0, len_q, block_q):
        part = query[:, :, start : start + block_q].float()
        scores = part @ columns * request.effective_scale
        place = torch.arange(start, start + part.shape[2], device=key.device).unsqueeze(1)
        if high is not None:
            scores.masked_fill_(position > place + high, -torch.inf)
        if low is not None:
            scores.masked_fill_(position < place + low, -torch.inf)
        weights = nn.functional.pad(scores.softmax(-1).nan_to_num(0.0).mean(2), (0, -len_k % block_k))
        rows.append(weights.unflatten(-1, (-1, block_k)).sum(-1))
    return torch.stack(rows, 2)


def train_gate(
    gate: SparseGate,
    samples: Iterable[tuple[Tensor, Tensor]],
    *,
    block_size: int = 64,
    causal: bool = True,
    learning_rate: float = 3e-3,
) -> list[float]:
    """Train a gate on queries and keys of the layer it is for: one step for each sample.

    The loss is the cross entropy of the gate's softmax over blocks against the share that dense attention gives them.
    The model is not needed and not changed.

    Args:
        samples: (query [batch, heads_q, length, dim], key [batch, heads_kv, length, dim]) as attention gets them.

    Returns:
        The loss of each step, in nats, less the entropy of the target: 0 is a perfect gate.

    Raises:
        ContractError: no gate, no pairs, or tensors that the gate is not of.
    """
    if not isinstance(gate, SparseGate):
        raise ContractError(f"gate is a {type(gate).__name__}: pass a SparseGate(num_heads, head_dim)")
    need_whole("block_size", block_size)
    losses = []
    optimiser = torch.optim.Adam(gate.parameters(), lr=learning_rate)
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise ContractError(f"a sample is a {type(sample).__name__}: pass pairs (query, key)")
        query, key = sample
        gate.need_heads(query, key)
        query, key = query.detach(), key.detach()
        request = AttentionRequest(
            batch=query.shape[0],
            heads_q=query.shape[1],
            heads_kv=key.shape[1],
            len_q=query.shape[2],
            len_k=key.shape[2],
            dim_qk=query.shape[3],
            dim_v=query.shape[3],
            dtype="float32",
            causal=Causal.TOP_LEFT if causal else Causal.NONE,
        )
        with torch.no_grad():
            target = block_mass(query, key, request, block_size, block_size)
            entropy = -torch.special.xlogy(target, target).sum(-1)
        hidden = cut_of(request, block_size, block_size, 0.0, query.device).hidden
        logits = gate(query, key, request, block_size, block_size).masked_fill(hidden, -torch.inf)
        found = torch.where(hidden, 0.0, logits.log_softmax(-1))
        loss = (-(target * found).sum(-1) - entropy).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses

"""Modules whose sequence lies on several ranks, under the names that users of kernel_pytorch know."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hal_core import ContractError

from .api import attention, shard, unshard
from .description import POLICY
from .layout import REPLICATED, TokenLayout
from .topology import topology_of

#: Of `hal_parallel.attention`: what a layer keeps and passes on.
_OPTIONS = {*POLICY, "scale", "softcap", "window", "diagonal", "max_error", "deterministic", "timeout", "memory"}


class RingAttentionLayer(nn.Module):
    """Multi-head self-attention over the tokens of all ranks; without a process group, block by block on one device.

    Args:
        d_model, num_heads: width, and query heads. max_sequence_length: longest whole sequence, which is checked.
        device: torch device of the parameters. num_kv_heads, head_dim: num_heads and d_model // num_heads where None.
        dropout: of the weights, in training. causal: no token reads a later one.
        mesh, layout, strategy, options (scale, softcap, window, backend, timeout ...): as `hal_parallel.attention`'s.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: nn.Linear layers.

    Raises:
        ContractError: sizes that do not go together, or an option that attention does not take.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        max_sequence_length: int = 1_000_000,
        device: Any = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        causal: bool = False,
        mesh: Any = None,
        layout: str | TokenLayout = "contiguous",
        strategy: str = "ring",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        heads_kv = num_heads if num_kv_heads is None else num_kv_heads
        if min(d_model, num_heads, heads_kv, max_sequence_length) < 1 or num_heads % heads_kv:
            raise ContractError(
                f"d_model {d_model}, num_heads {num_heads}, num_kv_heads {heads_kv} and max_sequence_length "
                f"{max_sequence_length} were given: use 1 or more, and query heads that are a multiple of key heads"
            )
        if head_dim is None and d_model % num_heads:
            raise ContractError(f"d_model {d_model} and num_heads {num_heads} were given: num_heads must divide it")
        self.d_model, self.num_heads, self.heads_kv = d_model, num_heads, heads_kv
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.max_sequence_length, self.dropout, self.causal = max_sequence_length, dropout, causal
        self.mesh, self.layout, self.strategy, self.options = mesh, layout, strategy, options
        if unknown := options.keys() - _OPTIONS:
            raise ContractError(f"unknown options {sorted(unknown)} were given: use {', '.join(sorted(_OPTIONS))}")
        wide, narrow = num_heads * self.head_dim, heads_kv * self.head_dim
        linear = partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        self.q_proj, self.out_proj = linear(d_model, wide), linear(wide, d_model)
        self.k_proj, self.v_proj = linear(d_model, narrow), linear(d_model, narrow)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, length: int | None = None
    ) -> Tensor:
        """Self-attention of this rank's tokens over those of all ranks.

        Args:
            hidden_states: [batch, local, d_model], this rank's part (`hal_parallel.shard(x, mesh, layout, dim=1)`).
            attention_mask: [batch, tokens] over the whole sequence, 1 or True: may be read; or a mask shard as of
                `hal_parallel.attention`. length: tokens of the whole sequence; None: there is no padding.

        Returns:
            [batch, local, d_model].

        Raises:
            ContractError: another shape, or a sequence longer than max_sequence_length. HalError: as
                `hal_parallel.attention`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ContractError(f"x has shape {list(hidden_states.shape)}: pass [batch, local, {self.d_model}]")
        topology = topology_of(self.mesh)
        tokens = hidden_states.shape[1] * (1 if topology is None else topology.world) if length is None else length
        if tokens > self.max_sequence_length:
            raise ContractError(
                f"a sequence of {tokens} tokens was given, and max_sequence_length is {self.max_sequence_length}: "
                "build the layer with a larger one"
            )
        query, key, value = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]
        options = {"layout": self.layout, "strategy": self.strategy, "length": length, **self.options}
        dropout, grouped = self.dropout if self.training else 0.0, self.num_heads != self.heads_kv
        given = query, key, value, self.mesh, attention_mask, dropout, self.causal
        out: Tensor = attention(*given, enable_gqa=grouped, **options)
        return self.out_proj(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        layout = self.layout if isinstance(self.layout, str) else self.layout.name
        return f"heads={self.num_heads}/{self.heads_kv}, causal={self.causal}, {layout}, {self.strategy}"


class ContextParallelAttention(RingAttentionLayer):
    """The same on whole sequences: every rank is given all tokens, computes its part, and is given the whole result.

    Gradients are to be averaged over the ranks, as DistributedDataParallel does: a rank's own are those of its tokens,
    times the number of ranks.

    Args:
        context_parallel_size: how many ranks share the sequence: as many as the mesh has. device_mesh: as `mesh` of
            `hal_parallel.attention`. options: as `RingAttentionLayer`'s.
    """

    def __init__(
        self, d_model: int, num_heads: int, context_parallel_size: int, device_mesh: Any = None, **options: Any
    ) -> None:
        super().__init__(d_model, num_heads, mesh=device_mesh, **{"strategy": "auto", **options})
        if type(context_parallel_size) is not int or context_parallel_size < 1:
            raise ContractError(f"context_parallel_size {context_parallel_size!r} was given: use 1 or more")
        if isinstance(self.layout, TokenLayout) or self.layout == REPLICATED:
            raise ContractError("a TokenLayout was given for sequences of any length: pass a layout's name")
        self.context_parallel_size = context_parallel_size

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, length: int | None = None
    ) -> Tensor:
        """[batch, tokens, d_model] -> the same, equal on every rank; masks as `RingAttentionLayer.forward`'s."""
        topology = topology_of(self.mesh)
        if topology is not None and topology.world != self.context_parallel_size:
            raise ContractError(
                f"context_parallel_size {self.context_parallel_size} was given, and the mesh has {topology.world} "
                "ranks: pass a device_mesh of as many"
            )
        tokens = hidden_states.shape[1]
        part = shard(hidden_states, self.mesh, self.layout, dim=1)
        if attention_mask is not None and attention_mask.dim() > 2 and attention_mask.shape[-2] == tokens:
            attention_mask = shard(attention_mask, self.mesh, self.layout, dim=-2)
        out = super().forward(part, attention_mask, length=tokens)
        return unshard(out, self.mesh, self.layout, dim=1, length=tokens)


def create_ring_attention(
    d_model: int, num_heads: int, max_sequence_length: int = 1_000_000, device: Any = None, **options: Any
) -> RingAttentionLayer:
    """A `RingAttentionLayer`; options are its others."""
    return RingAttentionLayer(d_model, num_heads, max_sequence_length, device, **options)


def create_context_parallel_attention(
    d_model: int, num_heads: int, context_parallel_size: int, device_mesh: Any = None, **options: Any
) -> ContextParallelAttention:
    """A `ContextParallelAttention`; options are its others."""
    return ContextParallelAttention(d_model, num_heads, context_parallel_size, device_mesh, **options)

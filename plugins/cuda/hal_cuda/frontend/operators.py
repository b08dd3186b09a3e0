"""PyTorch's fused attention operators by this package's kernels: what they take, return and save, as PyTorch says it.

Each method stands for one operator and has its arguments; the operator's own autograd formula, fake kernel, autocast
and batching rules stay PyTorch's. A method returns None, with the reason counted, where the original must serve.

Sources: PyTorch 2.11 and 2.13, aten/src/ATen/native/native_functions.yaml (arguments), torch/_meta_registrations.py
(shapes and strides of results), tools/autograd/derivatives.yaml (what a backward is given).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hal_core.plugin_api import Causal, ContractError, MemoryLimitError, SequenceMetadata

from .layouts import (
    HEADS_LAST,
    broadcast,
    heads_first,
    laid_by,
    laid_like,
    of_hidden_rows,
    unused_state,
    whole_columns,
)
from .routing import Call, Route, Router, bucket, wanted_grads
from .statistics import Counts

#: Rows of the efficient kernels' log-sum-exp are padded to whole multiples of this.
_EFFICIENT_ROWS = 32


class Operators:
    """The operators under one dispatch key.

    Args:
        router: decides where a call goes. counts: told of every call.
    """

    def __init__(self, router: Router, counts: Counts) -> None:
        self._router, self._counts = router, counts

    def table(self) -> dict[str, Callable[..., Any]]:
        """Replacements by operator name."""
        return {
            "_scaled_dot_product_flash_attention": self.flash,
            "_scaled_dot_product_flash_attention_backward": self.flash_backward,
            "_scaled_dot_product_cudnn_attention": self.cudnn,
            "_scaled_dot_product_cudnn_attention_backward": self.cudnn_backward,
            "_scaled_dot_product_efficient_attention": self.efficient,
            "_scaled_dot_product_efficient_attention_backward": self.efficient_backward,
            "_flash_attention_forward": self.packed,
            "_flash_attention_backward": self.packed_backward,
        }

    def flash(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """(out, log-sum-exp, None, None, longest query, longest key, random state, unused, debug mask)."""
        name = "_scaled_dot_product_flash_attention"
        if return_debug_mask:
            return self._refused(name, "a debug mask")
        if is_causal and query.shape[2] != key.shape[2]:  # this operator's diagonal ends in the last row and key
            return self._refused(name, "a diagonal of unequal lengths")
        call = _plain(name, "flash", dropout_p, is_causal, scale, wanted_grads(query, key, value, None))
        result = self._forward(call, query, key, value, None)
        if result is None:
            return None
        out, lse = laid_like(result[0], query), result[1]
        return (out, lse, None, None, query.shape[2], key.shape[2], *unused_state(query))

    def flash_backward(
        self,
        grad_out: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> Any:
        """Gradients of query, key and value."""
        if grad_out is None:  # nothing depends on the output
            return None, None, None
        name = "_scaled_dot_product_flash_attention_backward"
        if is_causal and query.shape[2] != key.shape[2]:
            return self._refused(name, "a diagonal of unequal lengths")
        call = _plain(name, "flash", dropout_p, is_causal, scale, frozenset("qkv"), backward=True)
        grads = self._backward(call, query, key, value, out, logsumexp, grad_out, None)
        return None if grads is None else tuple(map(laid_like, grads[:3], (query, key, value)))

    def cudnn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """As `flash`, with the log-sum-exp [batch, heads, len_q, 1]."""
        name = "_scaled_dot_product_cudnn_attention"
        if return_debug_mask:
            return self._refused(name, "a debug mask")
        if is_causal and query.shape[2] != key.shape[2]:
            return self._refused(name, "a diagonal of unequal lengths")
        grads = wanted_grads(query, key, value, None) or frozenset("qkv" if compute_log_sumexp else "")
        call = _plain(name, "cudnn", dropout_p, is_causal, scale, grads)
        result = self._forward(call, query, key, value, attn_bias)
        if result is None:
            return None
        out, lse = laid_like(result[0], query), of_hidden_rows(result[1], attn_bias).unsqueeze(-1)
        seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
        return (out, lse, None, None, query.shape[2], key.shape[2], seed, offset, None)

    def cudnn_backward(
        self,
        grad_out: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        philox_seed: Tensor,
        philox_offset: Tensor,
        attn_bias: Tensor | None,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None = None,
    ) -> Any:
        """Gradients of query, key and value."""
        if grad_out is None:  # nothing depends on the output
            return None, None, None
        name = "_scaled_dot_product_cudnn_attention_backward"
        if is_causal and query.shape[2] != key.shape[2]:
            return self._refused(name, "a diagonal of unequal lengths")
        if attn_bias is not None and not attn_bias.numel():
            attn_bias = None
        lse = logsumexp.squeeze(-1) if logsumexp.dim() == 4 else logsumexp
        call = _plain(name, "cudnn", dropout_p, is_causal, scale, frozenset("qkv"), backward=True)
        grads = self._backward(call, query, key, value, out, lse, grad_out, attn_bias)
        return None if grads is None else tuple(map(laid_like, grads[:3], (query, key, value)))

    def efficient(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """(out with heads behind rows in memory, log-sum-exp padded to whole 32 rows, random seed, offset)."""
        grads = wanted_grads(query, key, value, attn_bias) or frozenset("qkv" if compute_log_sumexp else "")
        call = _plain("_scaled_dot_product_efficient_attention", "efficient", dropout_p, is_causal, scale, grads)
        result = self._forward(call, query, key, value, attn_bias)
        if result is None:
            return None
        out, lse = laid_by(result[0], HEADS_LAST), of_hidden_rows(result[1], attn_bias)
        if not compute_log_sumexp:
            lse = lse.new_empty((*lse.shape[:2], 0))
        elif over := -lse.shape[2] % _EFFICIENT_ROWS:
            lse = pad(lse, (0, over), value=torch.inf)
        seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
        return out, lse, seed, offset

    def efficient_backward(
        self,
        grad_out_: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        out: Tensor,
        logsumexp: Tensor,
        philox_seed: Tensor,
        philox_offset: Tensor,
        dropout_p: float,
        grad_input_mask: list[bool],
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        """Gradients of query, key, value and bias."""
        if grad_out_ is None:  # nothing depends on the output
            return None, None, None, None
        name = "_scaled_dot_product_efficient_attention_backward"
        if torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled():
            return self._refused(name, "a warning about determinism, which the original gives")
        if attn_bias is not None and not attn_bias.numel():
            attn_bias = None
        of_mask = attn_bias is not None and bool(grad_input_mask[3])
        wanted = frozenset({"q", "k", "v", "mask"} if of_mask else "qkv")
        call = _plain(name, "efficient", dropout_p, is_causal, scale, wanted, backward=True)
        lse = logsumexp[..., : query.shape[2]].contiguous()
        if lse.shape[-1] != query.shape[2]:
            raise ContractError(
                f"{name} was called with the log-sum-exp of {lse.shape[-1]} rows, and the query has {query.shape[2]}: "
                "call the forward with compute_log_sumexp=True"
            )
        grads = self._backward(call, query, key, value, out, lse, grad_out_, attn_bias)
        if grads is None:
            return None
        of_operands = [laid_by(grad, HEADS_LAST) for grad in grads[:3]]
        return (*of_operands, whole_columns(grads.mask) if of_mask else None)

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **others: Any,
    ) -> Any:
        """(out, log-sum-exp [heads, tokens], random state, unused, debug mask) of [tokens, heads, dim]."""
        if cum_seq_q is None or cum_seq_k is None:  # what the original of `flash` calls
            return None
        name = "_flash_attention_forward"
        if return_debug_mask:
            return self._refused(name, "a debug mask")
        if asked := [other for other, each in others.items() if each is not None]:
            return self._refused(name, f"{', '.join(asked)}, which the kernels do not have")
        call = _packed(
            name, dropout_p, is_causal, scale, (window_size_left, window_size_right), (cum_seq_q, cum_seq_k),
            (max_q, max_k), wanted_grads(query, key, value, None),
        )  # fmt: skip
        if isinstance(call, str):
            return self._refused(name, call)
        tables = SequenceMetadata(cum_seq_q, cum_seq_k)
        q, k, v = map(heads_first, (query, key, value))
        result = self._forward(call, q, k, v, None, tables)
        if result is None:
            return None
        out = laid_like(result[0][0].transpose(0, 1), query)
        return (out, result[1][0], *unused_state(query))

    def packed_backward(
        self,
        grad_out: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> Any:
        """Gradients of query, key and value."""
        if grad_out is None:  # nothing depends on the output
            return None, None, None
        if cum_seq_q is None or cum_seq_k is None:
            return None
        name = "_flash_attention_backward"
        call = _packed(
            name, dropout_p, is_causal, scale, (window_size_left, window_size_right), (cum_seq_q, cum_seq_k),
            (max_q, max_k), frozenset("qkv"), backward=True,
        )  # fmt: skip
        if isinstance(call, str):
            return self._refused(name, call)
        q, k, v, result, grad = map(heads_first, (query, key, value, out, grad_out))
        tables = SequenceMetadata(cum_seq_q, cum_seq_k)
        grads = self._backward(call, q, k, v, result, logsumexp[None], grad, None, tables)
        if grads is None:
            return None
        return tuple(laid_like(g[0].transpose(0, 1), t) for g, t in zip(grads[:3], (query, key, value), strict=True))

    def _forward(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        tables: SequenceMetadata | None = None,
    ) -> Any:
        """(out, log-sum-exp) of an own kernel, or None."""
        mask = broadcast(mask, keep="mask" in call.grads)
        route = self._router.route(call, query, key, value, mask)
        if route.forward is None:
            return self._refused(call.operator, route.reason)
        result = _run(route.forward, query, key, value, mask, None, tables)
        self._counts.own(call.operator)
        return result

    def _backward(
        self,
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None,
        tables: SequenceMetadata | None = None,
    ) -> Any:
        """Grads of an own kernel, or None."""
        mask = broadcast(mask, keep="mask" in call.grads)
        route: Route = self._router.route(call, query, key, value, mask)
        if route.backward is None:
            return self._refused(call.operator, route.reason)
        grads = _run(route.backward, query, key, value, out, lse, grad_out, mask, tables)
        self._counts.own(call.operator)
        return grads

    def _refused(self, operator: str, reason: str) -> None:
        self._counts.original(operator, reason)


def _run(kernel: Callable[..., Any], *given: Any) -> Any:
    """A kernel's result. Memory that ran out is told by torch's own error, which programs of torch wait for."""
    try:
        return kernel(*given)
    except MemoryLimitError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from None
        raise


def _plain(
    operator: str,
    rival: str,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    grads: frozenset[str],
    *,
    backward: bool = False,
) -> Call:
    return Call(
        operator,
        rival,
        causal=Causal.TOP_LEFT if is_causal else Causal.NONE,
        scale=scale,
        dropout=dropout_p > 0,
        grads=grads,
        backward=backward,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _packed(
    operator: str,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
    sequences: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    grads: frozenset[str],
    *,
    backward: bool = False,
) -> Call | str:
    """The call, or why the original must serve. The diagonal ends in each sequence's last row and key."""
    if any(table.dtype != torch.int32 or table.dim() != 1 for table in sequences):
        return "cumulative lengths that are not int32"
    left, right = (None if side is None or side < 0 else int(side) for side in window)
    causal = is_causal or right == 0
    band = None if left is None and (causal or right is None) else (left, None if causal else right)
    if band is not None and not causal and sequences[0].data_ptr() != sequences[1].data_ptr():
        return "a window without causal over sequences of unequal lengths"
    return Call(
        operator,
        "flash",
        causal=Causal.BOTTOM_RIGHT if causal else Causal.NONE,
        window=band,
        scale=scale,
        dropout=dropout_p > 0,
        grads=grads,
        backward=backward,
        sequences=(sequences[0].numel() - 1, bucket(int(longest[0])), bucket(int(longest[1]))),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


__all__ = ["Operators"]

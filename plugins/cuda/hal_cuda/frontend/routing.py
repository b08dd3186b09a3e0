"""Which kernel serves a call of one of PyTorch's attention operators: decided once for every form of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionRequest,
    Causal,
    HalError,
    MaskKind,
    SequenceMetadata,
    check_all,
    open_session,
)

_MOST_ROUTES = 2048
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_GRADS = frozenset({"q", "k", "v"})


class Call(NamedTuple):
    """What an operator asks beside its tensors.

    Attributes:
        operator: its name. rival: the candidate of `paths` that its original kernel is.
        causal: where the diagonal starts. window: (left, right) as in a request.
        scale: None for 1 / sqrt(head size). dropout: whether weights are dropped.
        grads: what needs gradients, as far as the operator can tell. backward: whether this is the backward operator.
        sequences: packed sequences and the longest lengths of their queries and keys; None for plain tensors.
        page_size: of a paged cache; None for no paging. deterministic: equal bits in every run are required.
    """

    operator: str
    rival: str
    causal: Causal = Causal.NONE
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    dropout: bool = False
    grads: frozenset[str] = frozenset()
    backward: bool = False
    sequences: tuple[int, int, int] | None = None
    page_size: int | None = None
    deterministic: bool = False


class Route(NamedTuple):
    """Where calls of one form go: to `forward` or `backward`, or, with a reason, to the original kernel.

    forward: (query, key, value, mask, plan, tables) -> AttentionOutput with its log-sum-exp.
    backward: (query, key, value, out, lse, grad_out, mask, tables) -> Grads.
    """

    reason: str
    session: Any = None
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None


class Router:
    """Routes of all calls under one dispatch key.

    Args:
        device: the device's id for a tensor. always: take own kernels also where the original is estimated to be
            faster.
    """

    def __init__(self, device: Callable[[Tensor], str], always: bool) -> None:
        self._device, self._always = device, always
        self._routes: dict[Any, Route] = {}

    def route(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Route:
        """The route of a call. Tensors are [batch, heads, length, dim]; a mask is additive or boolean.

        Lengths count by their bucket: kernels read them from the tensors, so a route serves all of a bucket.
        """
        if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or (mask is not None and mask.dim() != 4):
            return Route("not four dimensions")
        batch, heads, len_q, dim = query.shape
        form = (
            call,
            batch,
            heads,
            bucket(len_q),
            dim,
            *key.shape[:2],
            bucket(key.shape[2]),
            key.shape[3],
            value.shape[3],
            key.shape[:3] == value.shape[:3],
            query.dtype,
            key.dtype,
            value.dtype,
            query.device,
            query.stride(-1) == key.stride(-1) == value.stride(-1) == 1,
            None if mask is None else self._mask_form(query, key, mask),
        )
        found = self._routes.get(form)
        if found is None or (found.session is not None and found.session.closed):
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            found = self._routes[form] = self._decide(call, query, key, value, mask)
        return found

    @staticmethod
    def _mask_form(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Any, ...]:
        """What a decision depends on: dtype, over how much the mask runs, and whether it fits the scores."""
        batch, heads, rows, columns = mask.shape
        fits = batch in (1, query.shape[0]) and heads in (1, query.shape[1])
        fits = fits and rows in (1, query.shape[2]) and columns in (1, key.shape[2])
        return mask.dtype, mask.device, mask.shape[:2], mask.stride(0) > 0, mask.stride(1) > 0, fits

    def _decide(self, call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Route:
        if reason := _malformed(call, query, key, value, mask):
            return Route(reason)
        request = _request(call, query, key, value, mask)
        device = self._device(query)
        try:
            refusals = check_all(request, device)
            if refusals:
                return Route("; ".join(f"{refusal.field}: {refusal.wanted}" for refusal in refusals))
            session: Any = open_session(device)
        except HalError as error:
            return Route(str(error))
        if not self._always and not session.outpaces(replace(request, lse=False), call.rival):
            return Route("the original is estimated to be faster")
        if not call.backward:
            forward = session.bind(replace(request, grads=frozenset()))
            return Route("", session, forward=forward)

        def backward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            out: Tensor,
            lse: Tensor,
            grad_out: Tensor,
            mask: Tensor | None = None,
            tables: SequenceMetadata | None = None,
        ) -> Any:
            prepared = session.prepare_attention(query, key, value, request=request, tables=tables)
            return session.compute_attention_backward(prepared, out, lse, grad_out, mask, own=True)

        return Route("", session, backward=backward)


def _malformed(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """Why no request can be made of a call; "" where one can."""
    given = (query, key, value, *(() if mask is None else (mask,)))
    if call.dropout:
        return "dropout: its random state is the operator's"
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtype {query.dtype}"
    if any(t.device != query.device for t in given) or any(t.is_nested or t.is_sparse for t in given):
        return "tensors of several devices or layouts"
    if not all(t.numel() for t in given):
        return "empty tensors"
    if key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        return "shapes that do not match"
    if query.shape[0] != key.shape[0] and call.page_size is None:
        return "shapes that do not match"
    if mask is not None and mask.dtype not in (*_DTYPES, torch.bool):
        return f"a mask of {mask.dtype}"
    if mask is not None and not Router._mask_form(query, key, mask)[-1]:
        return "shapes that do not match"
    return ""


def bucket(length: int) -> int:
    """A length rounded up to a power of two; 0 stays 0."""
    return 1 << (length - 1).bit_length() if length > 0 else 0


def _request(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> AttentionRequest:
    batch, len_q, len_k = call.sequences or (query.shape[0], query.shape[2], key.shape[2])
    len_q, len_k = bucket(len_q), bucket(len_k)
    kind = MaskKind.NONE if mask is None else MaskKind.BOOLEAN if mask.dtype == torch.bool else MaskKind.ADDITIVE
    over = [1, 1]
    if mask is not None:
        over = [1 if mask.stride(place) == 0 else mask.shape[place] for place in (0, 1)]
    return AttentionRequest(
        batch=batch,
        heads_q=query.shape[1],
        heads_kv=key.shape[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=query.shape[3],
        dim_v=value.shape[3],
        dtype=_DTYPES[query.dtype],
        device=str(query.device),
        last_dim_contiguous=query.stride(-1) == key.stride(-1) == value.stride(-1) == 1,
        mask=kind,
        mask_batch=over[0],
        mask_heads=over[1],
        causal=call.causal,
        window=call.window,
        scale=call.scale,
        packed=call.sequences is not None and call.page_size is None,
        page_size=call.page_size,
        grads=call.grads,
        lse=True,
        deterministic=call.deterministic,
    )


def wanted_grads(*tensors: Tensor | None) -> frozenset[str]:
    """What a forward operator can tell of the gradients: all of query, key and value where any of them, or the mask,
    needs one."""
    *operands, mask = tensors
    if mask is not None and mask.requires_grad:
        return _GRADS | {"mask"}
    return _GRADS if any(t is not None and t.requires_grad for t in operands) else frozenset()


__all__ = ["Call", "Route", "Router", "bucket", "wanted_grads"]

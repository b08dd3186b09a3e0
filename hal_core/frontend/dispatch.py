"""Which device runs a call: from a cache by its static fields and bucketed lengths, or decided now."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..capability import Code
from ..decision import Decision, Policy
from ..errors import ContractError, PluginError, refuse
from ..options import merged_policy, policy_var
from ..registry import registry
from ..request import AttentionRequest
from ..selection import check_all, settled
from .execution import BoundAttention
from .operands import GRADS, Operands
from .validation import CallOptions, build_request, check_tables, is_fake, is_plain

Overrides = tuple[Any, ...]  # backend, objective, allow_simulated, transfer, tiling
_bound: dict[Any, Any] = {}
_MOST_BOUND = 4096
_SENTINEL = object()  # support changes inside this length bucket: exact lengths decide


class NoDataError(ContractError):
    """A well-formed call whose tensors have shapes and no data: `attention` answers with a shape."""


_GRAD_SETS = [frozenset(n for bit, n in enumerate(GRADS) if bits >> bit & 1) for bits in range(16)]
registry.on_change.append(_bound.clear)


def find(operands: tuple[Any, ...], bits: int, options: tuple[Any, ...], overrides: Overrides) -> BoundAttention:
    """The bound attention of a call.

    Args:
        operands: the six of `Operands`. bits: which of query, key, value and mask need gradients, 1 for the first.
        options: the fields of `CallOptions`. overrides: backend, objective, allow_simulated, transfer, tiling.
    """
    query, key, value, mask, plan, tables = operands
    static, kind, fits = None, None, True
    try:
        batch, heads_q, len_q, dim = query.shape
        batch_k, heads_kv, len_k, dim_k = key.shape
        batch_v, heads_v, len_v, dim_v = value.shape
        if mask is not None:
            m0, m1, m2, m3 = (1, 1, 1, *mask.shape)[-4:]
            kind = (mask.dtype, mask.device, m0, m1)
            fits = (
                (m0 in (1, batch) and m1 in (1, heads_q) and m2 in (1, len_q) and m3 in (1, len_k))
                and (type(mask) is Tensor or is_plain(mask))
                and mask.dim() <= 4
            )
        if plan is not None or tables is not None:
            # By all sizes: validation and the request depend on them. What a processor's tables hold is checked in
            # each call, and longest lengths that were not given are read from them.
            kind = (
                *(kind, type(plan), query.shape, key.shape, value.shape),
                *(t if t is None or type(t) is int else (type(t), t.shape, t.dtype, t.device) for t in plan or tables),
            )
            fits = (
                fits
                and query.device.type != "cpu"
                and (plan is None or tables is None)
                and (tables is None or tables.cu_seqlens_q is None or None not in options[-2:])
            )
        if (
            fits
            and (query.__class__ is key.__class__ is value.__class__ is Tensor or all(map(is_plain, operands[:3])))
            and (batch_k == batch or (tables is not None and tables.page_table is not None))
            and batch_v == batch_k
            and (heads_v, len_v, dim_k) == (heads_kv, len_k, dim)
        ):
            static = (
                batch,
                heads_q,
                heads_kv,
                len_q and (len_q - 1).bit_length() + 1,
                len_k and (len_k - 1).bit_length() + 1,
                dim,
                dim_v,
                query.dtype,
                key.dtype,
                value.dtype,
                query.device,
                key.device,
                value.device,
                query.stride()[3] == 1 and key.stride()[3] == 1 and value.stride()[3] == 1,
                kind,
                bits,
                options,
                overrides,
                policy_var.get(),
            )
            found = _bound.get(static)
            if found is not None and not found.state.closed and (found.expired is None or not found.expired()):
                return found  # type: ignore[no-any-return]
    except (
        ValueError,
        AttributeError,
        TypeError,
        RuntimeError,
    ):  # a wrong rank, a nested tensor or an unhashable option: described below, not cached
        static = None
    request, policy = describe(Operands(*operands), bits, options, overrides)
    if is_fake(query):
        raise NoDataError("a tensor without data was given: call attention itself, which gives one of the right shape")
    place: Any = (bucketed(request), policy)
    found = _kept(place)
    if found is None:
        decision = settled(*place)
        found = _keep(place, _SENTINEL if _changes_inside(decision) else bind_request(place[0], policy, decision))
    if found is _SENTINEL:
        place = (request, policy, "exact")
        return _kept(place) or _keep(place, bind_request(request, policy))  # type: ignore[no-any-return]
    return found if static is None else _keep(static, found)  # type: ignore[no-any-return]


def describe(
    operands: Operands, bits: int, options: tuple[Any, ...], overrides: Overrides
) -> tuple[AttentionRequest, Policy]:
    """The exact request of a call, and its policy over all levels. Arguments as for `find`."""
    refuse(
        (overrides[-1] is not None and operands.plan is not None, "tiling and block_plan were given: pass one of them")
    )
    request = build_request(operands, CallOptions(*options), _GRAD_SETS[bits if type(bits) is int else 0])
    if operands.tables is not None and operands.query.device.type == "cpu" and not is_fake(operands.query):
        check_tables(operands.tables, request, operands.query, operands.key)
    policy = merged_policy(*overrides)
    return replace(request, options=policy.options or ()), policy


def _kept(place: Any) -> Any:
    found = _bound.get(place)
    if not isinstance(found, BoundAttention):
        return found
    return None if found.state.closed or (found.expired is not None and found.expired()) else found


def _keep(place: Any, found: Any) -> Any:
    if len(_bound) >= _MOST_BOUND:
        _bound.clear()
    _bound[place] = found
    return found


def bind_request(request: AttentionRequest, policy: Policy, decision: Decision | None = None) -> BoundAttention:
    """Decide, and bind the chosen session. Automatic selection passes over a session that fails its capabilities'
    claims.

    Raises:
        UnsupportedError: no device can. PluginError: the named device's session does not do what its capabilities
            claim.
    """
    excluded: dict[str, str] = {}
    while True:
        chosen = decision or settled(request, policy, excluded)
        try:
            return BoundAttention(chosen, request)
        except PluginError as error:
            if policy.names or chosen.chosen is None:
                raise
            excluded[chosen.chosen], decision = str(error), None


def bucketed(request: AttentionRequest) -> AttentionRequest:
    """Lengths rounded up to powers of two, so that growing lengths meet few decisions."""
    len_q, len_k = (n and 1 << (n - 1).bit_length() for n in (request.len_q, request.len_k))
    return request if (len_q, len_k) == (request.len_q, request.len_k) else replace(request, len_q=len_q, len_k=len_k)


def decide_exact(request: AttentionRequest, policy: Policy) -> Decision:
    """The decision that a call with this request would run under."""
    decision = settled(bucketed(request), policy)
    return settled(request, policy) if _changes_inside(decision) else decision


def _changes_inside(decision: Decision) -> bool:
    """True if one decision is not valid for the whole length bucket. Asks for no estimate."""
    top, by_length = decision.request, {Code.LENGTH, Code.MEMORY, Code.DEVICE}
    bottom = replace(top, len_q=top.len_q and top.len_q // 2 + 1, len_k=top.len_k and top.len_k // 2 + 1)
    return decision.chosen is None or any(
        {refusal.code for refusal in c.refusals} <= by_length
        and (c.refusals or check_all(bottom, c.device, transfer=c.transfer))
        for c in decision.candidates
    )

"""`attention`, `bind` and `explain`: what a user calls. The first tensor imports torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import attrs

from .capabilities import Code
from .context import frame_var, meter_var
from .errors import ContractError, DeviceUnavailableError, SelectionChangedError
from .registry import registry
from .request import AttentionRequest, Causal, SequenceTables
from .selection import Decision, Policy, check_all, decide, merged_policy, settled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from . import contract, library, route
    from .route import Route
    from .tiling import BlockPlan
else:
    torch = contract = route = library = None

_compiling = _grad_enabled = _autocast = cast(Any, None)
Given = tuple[Any, Any, Any, Any, Any, Any]  # query, key, value, mask, block plan, tables
_routes: dict[Any, Any] = {}
_MOST_ROUTES = 4096
_CUT = object()  # stands for a bucket of lengths through which a limit runs: decided length by length
_GRADS = [frozenset(n for bit, n in enumerate(("q", "k", "v", "mask")) if bits >> bit & 1) for bits in range(16)]
registry.on_change.append(_routes.clear)


def _load() -> None:
    """Import torch and what needs it. Import statements alone: Dynamo runs those while it traces."""
    global torch, contract, library, route, _compiling, _grad_enabled, _autocast
    import torch

    from . import contract, library, route

    _grad_enabled, _autocast = torch.is_grad_enabled, torch._C._is_any_autocast_enabled
    _compiling = torch.compiler.is_compiling  # last: where it is set, all of it is


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal: Causal | str | None = None,
    diagonal: int = 0,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    block_plan: BlockPlan | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    objective: str | None = None,
    allow_simulated: bool | None = None,
    transfer: bool | None = None,
    max_error: float | None = None,
    deterministic: bool = False,
    rng: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Any:
    """softmax(scale * query @ key^T + mask) @ value on the best device for this call.

    The first six arguments, scale and enable_gqa are torch's scaled_dot_product_attention's.

    Args:
        query: [batch, heads_q, len_q, dim_qk], any strides.
        key: [batch, heads_kv, len_k, dim_qk]. value: [batch, heads_kv, len_k, dim_v].
        attn_mask: bool (True: attend) or float (added to the scores), broadcastable to [batch, heads_q, len_q, len_k].
            May be combined with `is_causal`, unlike in torch.
        dropout_p: applied whenever it is above 0, as in torch; draws from torch's default generator unless `rng` is
            given.
        is_causal: top-left causal. scale: None for 1 / sqrt(dim_qk). enable_gqa: allow heads_q to be a multiple of
            heads_kv.
        causal, diagonal: "none", "top_left" or "bottom_right", and an offset of the diagonal (see `Causal`).
        window: (left, right) keys around the diagonal, inclusive, None for no bound. softcap: c * tanh(score / c).
        block_plan: a `BlockPlan`; keys outside its blocks are not read.
        return_lse: give AttentionOutput(out, lse) instead of out.
        backend: backend or device that must run it; None leaves it to `use`, `configure`, HAL_BACKEND, then automatic.
        objective: "time" (default), "energy" or "error". allow_simulated: let automatic take devices that are not
            hardware.
        transfer: True allows moving the tensors to a device, False forbids it; None allows it to named devices alone.
        max_error: largest acceptable relative error. deterministic: demand bitwise repeatable results.
        rng: (seed, offset) of dropout and of a simulator's noise.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences: tensors are [1, heads, total, dim],
            the tables int32 [sequences + 1].
        page_table, cache_seqlens: paged cache: key and value are [pages, heads_kv, page_size, dim], the tables int32
            [batch, most pages] and [batch].
        key_scale, value_scale: float32 factors of an FP8 key and value.

    Returns:
        [batch, heads_q, len_q, dim_v] in the query's dtype, or AttentionOutput. A row that reads no key gives 0 and
        -inf.

    Raises:
        ContractError: malformed input. UnsupportedError: no eligible device can, with every reason.
        UnknownBackendError, DeviceUnavailableError: the named backend does not exist, or not here.
        MemoryLimitError: a configured limit would be passed.
    """
    if _compiling is None:
        _load()
    if _autocast():
        query, key, value, attn_mask = _follow_autocast(query, key, value, attn_mask)
    named = (cu_seqlens_q, cu_seqlens_k, page_table, cache_seqlens, key_scale, value_scale)
    options = (
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        causal,
        diagonal,
        window,
        softcap,
        return_lse,
        max_error,
        deterministic,
        max_seqlen_q,
        max_seqlen_k,
    )
    wishes = (backend, objective, allow_simulated, transfer)
    if _compiling():
        return library.in_graph(query, key, value, attn_mask, block_plan, named, rng, options, wishes)
    tables = None if named.count(None) == 6 else SequenceTables(*named)
    bits = 0
    if _grad_enabled():
        try:
            bits = query.requires_grad + 2 * key.requires_grad + 4 * value.requires_grad
            if attn_mask is not None and attn_mask.requires_grad:
                bits += 8
        except AttributeError:  # no tensor: refused below, with a sentence
            bits = 0
    given = (query, key, value, attn_mask, block_plan, tables)
    found = _find(given, bits, options, wishes)
    if attn_mask is not None and attn_mask.dim() != 4:
        given = (query, key, value, attn_mask[(None,) * (4 - attn_mask.dim())], block_plan, tables)
    if found.needs_rng:
        rng = _drawn(rng)
    meter = meter_var.get()
    return found.run(*given, rng) if meter is None else route.metered(meter, found, (*given, rng), found.run)


def _find(given: Given, bits: int, options: tuple[Any, ...], wishes: tuple[Any, ...]) -> Route:
    """The route of a call: from the cache by its static fields and bucketed lengths, or decided now."""
    query, key, value, mask, plan, tables = given
    static, kind, fits = None, None, plan is None and tables is None
    try:
        batch, heads_q, len_q, dim = query.shape
        batch_k, heads_kv, len_k, dim_k = key.shape
        batch_v, heads_v, len_v, dim_v = value.shape
        if mask is not None:
            kind, (m0, m1, m2, m3) = (mask.dtype, mask.device), mask.shape
            fits = fits and m0 in (1, batch) and m1 in (1, heads_q) and m2 in (1, len_q) and m3 in (1, len_k)
        if fits and batch_k == batch == batch_v and heads_v == heads_kv and len_v == len_k and dim_k == dim:
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
                wishes,
                frame_var.get(),
            )
            found = _routes.get(static)
            if found is not None:
                return found  # type: ignore[no-any-return]
    except (ValueError, AttributeError, TypeError):  # a wrong rank or an unhashable option: described below, not cached
        static = None
    request = contract.describe(*given, contract.Options(*options), _GRADS[bits])
    if tables is not None:
        contract.check_tables(tables, request, query, key)
    return _decided(request, wishes, static)


def _decided(request: AttentionRequest, wishes: tuple[Any, ...], static: Any) -> Route:
    bucket = _bucketed(request)
    place = (bucket, frame_var.get(), wishes)
    found = _routes.get(place)
    if found is None:
        decision = settled(bucket, merged_policy(*wishes))
        found = _remember(place, _CUT if _is_cut(decision) else route.Route(decision, bucket))
    if found is _CUT:
        own: Any = (request, *place)
        return _routes.get(own) or _remember(own, route.Route(settled(request, merged_policy(*wishes)), request))  # type: ignore[no-any-return]
    return found if static is None else _remember(static, found)  # type: ignore[no-any-return]


def _remember(place: Any, found: Any) -> Any:
    if len(_routes) >= _MOST_ROUTES:
        _routes.clear()
    _routes[place] = found
    return found


def _bucketed(request: AttentionRequest) -> AttentionRequest:
    """Lengths rounded up to powers of two, so that growing lengths meet few decisions."""
    len_q, len_k = (n and 1 << (n - 1).bit_length() for n in (request.len_q, request.len_k))
    return request if (len_q, len_k) == (request.len_q, request.len_k) else replace(request, len_q=len_q, len_k=len_k)


def _is_cut(decision: Decision) -> bool:
    """Whether exact lengths must decide: nobody can, or a device against which nothing else speaks refuses one end."""
    top, by_length = decision.request, {Code.LENGTH, Code.MEMORY, Code.DEVICE}
    bottom = replace(top, len_q=top.len_q and top.len_q // 2 + 1, len_k=top.len_k and top.len_k // 2 + 1)
    return decision.chosen is None or any(
        {refusal.code for refusal in c.refusals} <= by_length
        and (c.refusals or check_all(bottom, c.device, transfer=c.transfer))
        for c in decision.candidates
    )


def _follow_autocast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[Any]:
    """Cast as torch's autocast casts scaled_dot_product_attention's tensors; float64 stays."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return [query, key, value, mask]
    kinds, target = (torch.float32, torch.float16, torch.bfloat16), torch.get_autocast_dtype(kind)
    return [t.to(target) if t is not None and t.dtype in kinds else t for t in (query, key, value, mask)]


def _drawn(rng: Any) -> tuple[int, int]:
    """The given (seed, offset), or a fresh pair from torch's default generator, so torch.manual_seed governs it."""
    if rng is None:
        seed, offset = torch.randint(0, 2**62, (2,)).tolist()
        return seed, offset
    if isinstance(rng, tuple | list) and len(rng) == 2 and all(isinstance(n, int) and n >= 0 for n in rng):
        return rng[0], rng[1]
    raise ContractError(f"rng {rng!r} was given: pass (seed, offset), two whole numbers of 0 or more")


_WISHES = ("backend", "objective", "allow_simulated", "transfer")


def _described(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, keywords: dict[str, Any]
) -> tuple[AttentionRequest, Policy]:
    """The exact request and policy of a call given as `attention` takes it."""
    if _compiling is None:
        _load()
    known = {*contract.Options._fields, *_WISHES, *SequenceTables._fields, "block_plan", "rng"}
    if unknown := sorted(set(keywords) - known):
        raise ContractError(f"unknown argument {unknown[0]!r} was given: use {', '.join(sorted(known))}")
    if _autocast():
        query, key, value, attn_mask = _follow_autocast(query, key, value, attn_mask)
    named = [keywords.get(name) for name in SequenceTables._fields]
    tables = SequenceTables(*named) if any(table is not None for table in named) else None
    options = contract.Options(**{name: keywords[name] for name in contract.Options._fields if name in keywords})
    tensors = zip(("q", "k", "v", "mask"), (query, key, value, attn_mask), strict=True)
    grads = frozenset(name for name, t in tensors if torch.is_grad_enabled() and getattr(t, "requires_grad", False))
    request = contract.describe(query, key, value, attn_mask, keywords.get("block_plan"), tables, options, grads)
    if tables is not None:
        contract.check_tables(tables, request, query, key)
    return request, merged_policy(*(keywords.get(name) for name in _WISHES))


def explain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **keywords: Any) -> Decision:
    """The decision that `attention` with the same arguments takes, with every candidate's refusals or estimate.

    Nothing is run. Where no device can, `Decision.chosen` is None.

    Raises:
        ContractError, UnknownBackendError, DeviceUnavailableError: as `attention`.
    """
    request, policy = _described(query, key, value, attn_mask, keywords)
    decision = settled(_bucketed(request), policy)
    return attrs.evolve(settled(request, policy) if _is_cut(decision) else decision, request=request)


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    max_len_q: int | None = None,
    max_len_k: int | None = None,
    **keywords: Any,
) -> Any:
    """Decide once for calls like this one; returns a callable for the fastest path.

    Args:
        query, key, value, attn_mask, and keywords: an example call, as for `attention`. Only shapes, dtypes and devices
            of its tensors count.
        max_len_q, max_len_k: longest lengths that calls will have; the example's where not given.

    Returns:
        A callable (query, key, value, attn_mask=None, *, block_plan=None, rng=None, tables=None) -> as `attention`. It
        reads lengths from its tensors, trusts that they lie where the example's do and the contents of tables, and has
        the attribute `decision`. Calls that differ from the example in anything but lengths raise ContractError; after
        `unregister` of the backend they raise DeviceUnavailableError.

    Raises:
        As `attention`.
    """
    request, policy = _described(query, key, value, attn_mask, keywords)
    if not request.packed and request.page_size is None:
        longest = (max_len_q or request.len_q, max_len_k or request.len_k)
        if longest[0] < request.len_q or longest[1] < request.len_k:
            raise ContractError(
                f"lengths up to {longest} and a longer example were given: raise max_len_q and max_len_k"
            )
        request = replace(request, len_q=longest[0], len_k=longest[1])
    return _bound(route.Route(settled(request, policy), request))


def _bound(found: Route) -> Any:
    run, request, entry, without_grads = found.run, found.request, found.entry, not found.request.grads
    session, grad_enabled, current_meter = found.session, torch.is_grad_enabled, meter_var.get
    needs_rng, device_id, dtype = found.needs_rng, found.decision.winner.device.id, getattr(torch, found.request.dtype)
    accepted: tuple[Any, ...] = ()
    even = not check_all(
        replace(request, len_q=1, len_k=1), found.decision.winner.device, transfer=True
    )  # no low limit

    def bound(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        block_plan: BlockPlan | None = None,
        rng: tuple[int, int] | None = None,
        tables: SequenceTables | None = None,
    ) -> Any:
        nonlocal accepted
        shapes = (query.shape, key.shape, value.shape)
        if (
            shapes != accepted
            or attn_mask is not None
            or block_plan is not None
            or tables is not None
            or not query.dtype is key.dtype is value.dtype is dtype
            or not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        ):
            _check_bound(found, even, (query, key, value, attn_mask, block_plan, tables))
            accepted = () if attn_mask is not None or block_plan is not None or tables is not None else shapes
            if attn_mask is not None and attn_mask.dim() != 4:
                attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if entry.sessions.get(device_id) is not session:
            raise DeviceUnavailableError(
                f"{device_id} was unregistered or closed after this call was bound: bind again"
            )
        if without_grads and grad_enabled():
            _check_no_grads(query, key, value, attn_mask)
        if needs_rng:
            rng = _drawn(rng)
        meter = current_meter()
        if meter is not None:
            return route.metered(meter, found, (query, key, value, attn_mask, block_plan, tables, rng), run)
        return run(query, key, value, attn_mask, block_plan, tables, rng)

    bound.decision = found.decision  # type: ignore[attr-defined]
    return bound


def _check_no_grads(*tensors: Tensor | None) -> None:
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ContractError(
            "a call bound without gradients was given a tensor that requires one: bind with such tensors"
        )


def _check_bound(found: Route, even: bool, given: Given) -> None:
    """Whether a call has the bound request's form. Raises ContractError; UnsupportedError for lengths between
    limits.
    """
    request = found.request
    longest = (request.len_q, request.len_k)
    most_q, most_k = longest if request.packed else (None, None)
    options = contract.Options(enable_gqa=True, max_seqlen_q=most_q, max_seqlen_k=most_k)
    this = contract.describe(*given, options, frozenset())
    for field in _FIXED:
        now, wanted = getattr(this, field), getattr(request, field)
        if now != wanted and not (field == "last_dim_contiguous" and now):
            raise ContractError(f"{field} {now} was given to a call bound for {wanted}: bind again")
    if this.len_q > longest[0] or this.len_k > longest[1]:
        raise ContractError(
            f"lengths {this.len_q, this.len_k} were given to a call bound for {longest}: bind with max_len_q, max_len_k"
        )
    if not even or 0 in (this.len_q, this.len_k):
        policy = attrs.evolve(found.decision.policy, names=(found.decision.winner.device.id,), fall_through=False)
        _ = decide(replace(request, len_q=this.len_q, len_k=this.len_k), policy).winner


_FIXED = (
    "batch",
    "heads_q",
    "heads_kv",
    "dim_qk",
    "dim_v",
    "dtype",
    "device",
    "mask",
    "packed",
    "page_size",
    "cache_dtype",
    "block_plan",
    "last_dim_contiguous",
)


def in_operator(
    given: Given, bits: int, options: tuple[Any, ...], wishes: tuple[Any, ...], expected: str | None
) -> Route:
    """The route of an operator of a compiled graph, which was traced under the selection `expected`.

    Raises:
        SelectionChangedError: the selection is another one now. The graph holds one device's operator.
    """
    if _compiling is None:
        _load()
    if expected is not None and frame_var.get().key != expected:
        raise SelectionChangedError(
            "compiled attention runs under another hal.use() than it was compiled under (another task or thread): pass "
            "backend= inside the compiled function, or enter hal.use() where it is called"
        )
    return _find(given, bits, options, wishes)

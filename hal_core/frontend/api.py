"""`attention`, `bind` and `explain`: what a user calls. The first tensor imports torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import attrs

from ..decision import Decision, Policy
from ..errors import ContractError, DeviceUnavailableError, refuse
from ..options import meter_var
from ..plans import BlockPlan
from ..protocols import TilingStrategy
from ..request import AttentionRequest, Causal, SequenceMetadata, Tensor
from ..selection import check_all, decide, plan_text

if TYPE_CHECKING:
    import torch

    from . import dispatch, execution, inputs, torch_ops, validation
    from .operands import Operands, gradient_bits
else:
    torch = dispatch = execution = inputs = torch_ops = validation = Operands = gradient_bits = None

_compiling = _tracing = _transform = _grad_enabled = _autocast = cast(Any, None)
_OVERRIDES = ("backend", "objective", "allow_simulated", "transfer", "tiling")


def _load() -> None:
    """Import torch and what needs it: a plugin's light module may name every function here without torch. Import
    statements alone: Dynamo runs those while it traces.
    """
    global torch, dispatch, execution, inputs, torch_ops, validation, Operands, gradient_bits
    global _compiling, _tracing, _transform, _grad_enabled, _autocast
    import torch

    from . import dispatch, execution, inputs, torch_ops, validation
    from .operands import Operands, gradient_bits

    _grad_enabled, _autocast, _tracing = torch.is_grad_enabled, torch._C._is_any_autocast_enabled, torch._C._is_tracing
    _transform = torch._C._functorch.peek_interpreter_stack
    _compiling = torch.compiler.is_compiling  # last: then all of it is set


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
    tiling: TilingStrategy | None = None,
) -> Any:
    """softmax(scale * query @ key^T + mask) @ value on the best device for this call.

    The first six arguments, scale and enable_gqa are torch's scaled_dot_product_attention's. What tables and block
    plans hold is checked where they lie on the host; on an accelerator it is trusted, tables unless HAL_CHECK=1.

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
        tiling: a `TilingStrategy` that cuts the work instead of the device's own; one that gives a `BlockPlan` is
            sparse.
        return_lse: give AttentionOutput(out, lse) instead of out.
        backend: backend or device that must run it; None leaves it to `use`, `configure`, HAL_BACKEND, then automatic.
        objective: "time" (default), "energy" or "error". allow_simulated: let automatic take devices that are not
            hardware.
        transfer: True allows moving the tensors to a device, False forbids it; None allows it to named devices alone.
        max_error: largest acceptable relative error. deterministic: demand bitwise repeatable results.
        rng: (seed, offset) of dropout and of a simulator's noise.
        cu_seqlens_q, cu_seqlens_k: packed sequences: tensors are [1, heads, total, dim], the tables int32
            [sequences + 1].
        max_seqlen_q, max_seqlen_k: bounds of a packed sequence's lengths. Where one is None, the tables are read, which
            on an accelerator waits for it.
        page_table, cache_seqlens: paged cache: key and value are [pages, heads_kv, page_size, dim], the tables int32
            [batch, most pages] and [batch].
            Without page_table, how many keys of each batch entry or packed sequence are used; of packed ones
            cu_seqlens_k then says where each begins.
        key_scale, value_scale: float32 factors of an FP8, int8 or int4 (uint8, two in a byte) key and value, of a
            channel and of a token or head (see `quantize_cache`).

    Returns:
        [batch, heads_q, len_q, dim_v] in the query's dtype, or AttentionOutput. A row that reads no key gives 0 and
        -inf.

    Raises:
        ContractError: malformed input. UnsupportedError: no eligible device can, with every reason.
        UnknownBackendError, DeviceUnavailableError: the named backend does not exist, or not here.
        MemoryLimitError: a configured limit would be exceeded.
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
    overrides = (backend, objective, allow_simulated, transfer, tiling)
    if attn_mask is not None and type(attn_mask) is not torch.Tensor:
        attn_mask, options = _causal_bias(attn_mask, options)
    # torch.jit.trace records the operator too, and vmap maps it.
    if _compiling() or _tracing() or (_transform() is not None and torch_ops.is_mapped()):
        return _in_graph(query, key, value, attn_mask, block_plan, named, rng, options, overrides)
    tables = None if named.count(None) == 6 else SequenceMetadata(*named)
    given = (query, key, value, attn_mask, block_plan, tables)
    bits = gradient_bits(query, key, value, attn_mask) if _grad_enabled() else 0
    try:
        found = dispatch.find(given, bits, options, overrides)
    except ContractError as error:
        if isinstance(error, dispatch.NoDataError):
            return torch_ops.in_graph(query, key, value, attn_mask, block_plan, named, rng, options, overrides)
        found = inputs.attend(attention, given[:4], _keywords(block_plan, named, rng, options, overrides), error)
        if found is None:
            raise
        return found
    if attn_mask is not None and attn_mask.dim() != 4:
        given = (query, key, value, attn_mask[(None,) * (4 - attn_mask.dim())], block_plan, tables)
    if found.needs_rng:
        rng = draw_rng(rng)
    meter = meter_var.get()
    return found.run(*given, rng) if meter is None else found.metered(meter, found.run, (*given, rng))


def _keywords(block_plan: Any, named: Any, rng: Any, options: Any, overrides: Any) -> dict[str, Any]:
    """What `attention` was given beside query, key, value and mask, by name."""
    tables = dict(zip(SequenceMetadata._fields, named, strict=True))
    given = validation.CallOptions(*options)._asdict() | dict(zip(_OVERRIDES, overrides, strict=True)) | tables
    return given | {"block_plan": block_plan, "rng": rng}


def _in_graph(query: Any, key: Any, value: Any, mask: Any, *others: Any) -> Any:
    """A call while torch compiles, traces, exports or maps it."""
    given, keywords = (query, key, value, mask), _keywords(*others)
    unfit = ContractError("query, key, value or attn_mask of shapes that do not go together were given")
    found = inputs.attend(attention, given, keywords, unfit)
    if found is not None:
        return found
    if not _compiling() and _tracing() and torch.onnx.is_in_onnx_export():
        return inputs.exported(*given, keywords)
    return torch_ops.in_graph(query, key, value, mask, *others)


def _causal_bias(mask: Any, options: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """torch's CausalBias, whose memory is not initialised, as the causal option it means; any other mask as it is."""
    if type(mask).__name__ != "CausalBias":  # by name: its module imports Dynamo, which takes seconds
        return mask, options
    from torch.nn.attention.bias import CausalVariant

    given = validation.CallOptions(*options)
    refuse(
        (
            given.is_causal or given.causal not in (None, Causal.NONE),
            "a CausalBias as attn_mask and is_causal or causal were given: pass one of them",
        )
    )
    return None, given._replace(
        causal=Causal.TOP_LEFT if mask.variant is CausalVariant.UPPER_LEFT else Causal.BOTTOM_RIGHT
    )


def _follow_autocast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[Any]:
    """Cast as torch's autocast casts scaled_dot_product_attention's tensors; float64 stays."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return [query, key, value, mask]
    kinds, target = (torch.float32, torch.float16, torch.bfloat16), torch.get_autocast_dtype(kind)
    return [t.to(target) if t is not None and t.dtype in kinds else t for t in (query, key, value, mask)]


def draw_rng(rng: Any) -> tuple[int, int]:
    """The given (seed, offset), or a fresh pair from torch's default generator, so torch.manual_seed governs it."""
    if rng is None:
        rng = torch.randint(0, 2**62, (2,)).tolist()
    if isinstance(rng, tuple | list) and len(rng) == 2 and all(isinstance(n, int) and 0 <= n < 1 << 63 for n in rng):
        return rng[0], rng[1]
    raise ContractError(f"rng {rng!r} was given: pass (seed, offset), two whole numbers of 0 or more")


def _described(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: dict[str, Any]
) -> tuple[AttentionRequest, Policy]:
    """The exact request and policy of a call given as `attention` takes it."""
    if _compiling is None:
        _load()
    defaults, tables = validation.CallOptions._field_defaults, SequenceMetadata._fields
    known = {*defaults, *_OVERRIDES, *tables, "block_plan", "rng"}
    if unknown := sorted(set(keywords) - known):
        raise ContractError(f"unknown argument {unknown[0]!r} was given: use {', '.join(sorted(known))}")
    if _autocast():
        query, key, value, mask = _follow_autocast(query, key, value, mask)
    mask, options = _causal_bias(mask, tuple((defaults | keywords)[name] for name in defaults))
    named = SequenceMetadata(*map(keywords.get, tables))
    given = Operands(
        query, key, value, mask, keywords.get("block_plan"), None if named.count(None) == len(named) else named
    )
    bits = gradient_bits(query, key, value, mask) if _grad_enabled() else 0
    return dispatch.describe(given, bits, options, tuple(map(keywords.get, _OVERRIDES)))


def explain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **keywords: Any) -> Decision:
    """The decision that `attention` with the same arguments takes, with every candidate's refusals or estimate.

    Nothing is run. Where no device can, `Decision.chosen` is None.

    Raises:
        ContractError, UnknownBackendError, DeviceUnavailableError: as `attention`.
    """
    request, policy = _described(query, key, value, attn_mask, keywords)
    decision = dispatch.decide_exact(request, policy)
    return attrs.evolve(decision, request=request, plan=plan_text(request, decision))


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
        HalError: as `attention`.
    """
    request, policy = _described(query, key, value, attn_mask, keywords)
    if not request.packed and request.page_size is None:
        longest = (max_len_q or request.len_q, max_len_k or request.len_k)
        refuse(
            (
                longest[0] < request.len_q or longest[1] < request.len_k,
                f"lengths up to {longest} and a longer example were given: raise max_len_q and max_len_k",
            )
        )
        request = replace(request, len_q=longest[0], len_k=longest[1])
    return _bound(dispatch.bind_request(request, policy))


def _bound(found: execution.BoundAttention) -> Any:
    request, entry, without_grads, state = found.request, found.entry, not found.request.grads, found.state
    session, grad_enabled, current_meter, tracing = found.session, torch.is_grad_enabled, meter_var.get, _tracing
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
        tables: SequenceMetadata | None = None,
    ) -> Any:
        nonlocal accepted
        shapes = (query.shape, key.shape, value.shape)
        plain = attn_mask is None and block_plan is None and tables is None
        if (
            tracing()
            or shapes != accepted
            or not plain
            or not query.dtype is key.dtype is value.dtype is dtype
            # Most tensors are contiguous, which is asked in two thirds of the time.
            or (
                not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous())
                and not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
            )
        ):
            _check_bound(found, even, (query, key, value, attn_mask, block_plan, tables))
            accepted = shapes if plain else ()
            if attn_mask is not None and attn_mask.dim() != 4:
                attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if entry.sessions.get(device_id) is not session or state.closed:
            raise DeviceUnavailableError(
                f"{device_id} was unregistered or closed after this call was bound, or the process was forked: bind "
                "again, and start the children of this process by the spawn method"
            )
        if without_grads and grad_enabled() and gradient_bits(query, key, value, attn_mask):
            raise ContractError(
                "a call bound without gradients was given a tensor that requires one: bind with such tensors"
            )
        if needs_rng:
            rng = draw_rng(rng)
        meter = current_meter()
        if meter is not None:
            return found.metered(meter, found.run, (query, key, value, attn_mask, block_plan, tables, rng))
        return found.run(query, key, value, attn_mask, block_plan, tables, rng)

    bound.decision = found.decision  # type: ignore[attr-defined]
    return bound


def _check_bound(found: execution.BoundAttention, even: bool, given: tuple[Any, ...]) -> None:
    """Raise ContractError where a call has not the bound request's form, UnsupportedError for lengths between
    limits.
    """
    request = found.request
    longest = (request.len_q, request.len_k)
    options = validation.CallOptions(enable_gqa=True, max_seqlen_q=request.len_q, max_seqlen_k=request.len_k)
    this = validation.build_request(Operands(*given), options, frozenset())
    for field in _FIXED if found.tiling is None else _FIXED[:-1]:
        now, wanted = getattr(this, field), getattr(request, field)
        refuse(
            (
                now != wanted and not (field == "last_dim_contiguous" and now),
                f"{field} {now} was given to a call bound for {wanted}: bind again",
            )
        )
    refuse(
        (
            this.len_q > longest[0] or this.len_k > longest[1],
            f"lengths {this.len_q, this.len_k} were given to a call bound for {longest}: "
            "bind with max_len_q, max_len_k",
        )
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
    "last_dim_contiguous",
    "block_plan",
)

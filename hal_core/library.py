"""Operators for torch.compile, one pair per backend name, so that no cache of compiled code can mistake one for another.

The selection is read while tracing, from a mirror that Dynamo guards; the operator compares it with the truth when it
runs. Eager calls do not come through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import in_operator
from .autograd import native_backward
from .context import meter_var, mirror, settings
from .registry import registry
from .request import AttentionOutput, Causal, SequenceTables
from .route import exact, metered
from .tiling import BlockPlan

AUTOMATIC = "automatic"
_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? block_indices, Tensor? block_counts, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, Tensor? cache_seqlens, Tensor? key_scale, "
    "Tensor? value_scale, Tensor? rng"
)
_STATIC = (
    "SymInt[]? blocks, float dropout_p, bool is_causal, float? scale, bool enable_gqa, str? causal, SymInt diagonal, "
    "SymInt? window_left, SymInt? window_right, bool windowed, float? softcap, bool return_lse, float? max_error, "
    "bool deterministic, SymInt? max_seqlen_q, SymInt? max_seqlen_k, str? backend, str? objective, "
    "bool? allow_simulated, bool? transfer, str? expected, int grads"
)
_TENSOR_COUNT = _TENSORS.count(",") + 1
_STATIC_COUNT = _STATIC.count(",") + 1
_library = torch.library.Library("hal", "FRAGMENT")
OPERATORS: dict[str, Any] = {}


def in_graph(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None,
    tables: tuple[Tensor | None, ...], rng: tuple[int, int] | None, options: tuple[Any, ...], wishes: tuple[Any, ...],
) -> Any:  # fmt: skip
    """What `attention` becomes while Dynamo traces it: one operator, named after the selected backend."""
    dropout_p, is_causal, scale, enable_gqa, causal, diagonal, window, softcap, return_lse, *rest = options
    expected = mirror.key if wishes[0] is None else None
    name = wishes[0] or (mirror.names[0] if len(mirror.names) == 1 else settings.name)
    family = name.partition(":")[0]
    operator = OPERATORS[family] if family in OPERATORS else OPERATORS[AUTOMATIC]
    grads = 0
    if torch.is_grad_enabled():
        grads = int(query.requires_grad) + 2 * int(key.requires_grad) + 4 * int(value.requires_grad)
        grads += 8 if mask is not None and mask.requires_grad else 0
    seed = None
    if rng is not None:
        seed = torch.tensor([rng[0], rng[1]], dtype=torch.int64)
    elif dropout_p > 0:
        seed = torch.randint(0, 2**62, (2,), dtype=torch.int64)
    blocks, indices, counts = (None, None, None) if plan is None else ([plan[0], plan[1]], plan[2], plan[3])
    left, right = (None, None) if window is None else window
    out, lse = operator(
        query, key, value, mask, indices, counts, *tables, seed, blocks, dropout_p, is_causal, scale, enable_gqa,
        causal.value if isinstance(causal, Causal) else causal, diagonal, left, right, window is not None, softcap, return_lse,
        *rest, *wishes, expected, grads,
    )  # fmt: skip
    return AttentionOutput(out, lse) if return_lse else out


class _Call:
    """An operator's flat arguments, put back into the eager call's form."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        query, key, value, self.mask, indices, counts, *tables, seed = arguments[:_TENSOR_COUNT]
        blocks, *static = arguments[_TENSOR_COUNT:]
        options, (left, right, windowed, softcap, lse, max_error, deterministic, most_q, most_k) = (
            static[:6],
            static[6:15],
        )
        self.wishes, self.expected, self.bits = tuple(static[15:19]), static[19], static[20]
        self.tensors = (query.detach(), key.detach(), value.detach())
        self.plan = None if indices is None else BlockPlan(blocks[0], blocks[1], indices, counts)
        self.tables = SequenceTables(*tables) if any(table is not None for table in tables) else None
        self.rng = None if seed is None else tuple(seed.tolist())
        window = (left, right) if windowed else None
        self.options = (*options, window, softcap, lse, max_error, deterministic, most_q, most_k)
        if self.mask is not None:
            self.mask = self.mask.detach()[(None,) * (4 - self.mask.dim())]

    def route(self, expected: str | None) -> Any:
        with torch.no_grad():
            given = (*self.tensors, self.mask, self.plan, self.tables)
            found = in_operator(given, self.bits, self.options, self.wishes, expected)
            if found.needs_rng and self.rng is None:
                self.rng = tuple(torch.randint(0, 2**62, (2,)).tolist())
        return found


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(arguments)
    found = call.route(call.expected)
    with torch.no_grad():
        given, meter = (*call.tensors, call.mask, call.plan, call.tables, call.rng), meter_var.get()
        result = found.base(*given) if meter is None else metered(meter, found, given, found.base)
    if isinstance(result, tuple):
        return result[0].contiguous(), result[1].contiguous()
    out, query = result.contiguous(), call.tensors[0]
    if not call.bits:
        return out, query.new_empty(0, dtype=torch.float32)
    # torch differentiates this session's own forward: nobody reads the log-sum-exp that the graph was promised
    return out, query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value, bits, return_lse = arguments[0], arguments[2], arguments[-1], arguments[_TENSOR_COUNT + 11]
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    wanted = return_lse or bits
    return out, query.new_empty(query.shape[:-1] if wanted else (0,), dtype=kind if wanted else torch.float32)


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(arguments)
    found = call.route(None)
    with torch.no_grad():
        if found.explicit:
            request = exact(found.request, *call.tensors[:2])
            prepared = found.session.prepare_attention(
                *call.tensors, request=request, plan=call.plan, tables=call.tables
            )
            grads: Any = found.session.compute_attention_backward(
                prepared, out, lse, grad_out, call.mask, grad_lse=grad_lse, rng=call.rng
            )
        else:
            rest = (call.plan, call.tables, call.rng)
            grads = native_backward(found.base, call.tensors, call.mask, found.request.grads, grad_out, grad_lse, rest)
    inputs = (*call.tensors, call.mask)
    dense = [
        _gradient(grad, like, bool(call.bits >> i & 1))
        for i, (grad, like) in enumerate(zip(grads, inputs, strict=True))
    ]
    if dense[3].numel() and arguments[3] is not None:
        dense[3] = dense[3].reshape(arguments[3].shape)
    return dense[0], dense[1], dense[2], dense[3]


def _gradient(grad: Tensor | None, like: Tensor | None, wanted: bool) -> Tensor:
    if not wanted or like is None:
        return torch.empty(0)
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if grad is None else grad.contiguous()


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    bits = arguments[-1]
    return tuple(
        tensor.new_empty(tensor.shape) if bits >> i & 1 and tensor is not None else torch.empty(0)
        for i, tensor in enumerate(arguments[:4])
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.static = inputs[_TENSOR_COUNT:]
    ctx.save_for_backward(*inputs[:_TENSOR_COUNT], *output)
    ctx.set_materialize_grads(False)


def define(name: str) -> None:
    """Define the operators hal::<name>_forward and hal::<name>_backward, once."""
    if name in OPERATORS:
        return
    forward, backward = f"{name}_forward", f"{name}_backward"
    _library.define(f"{forward}({_TENSORS}, {_STATIC}) -> (Tensor, Tensor)")
    _library.define(
        f"{backward}(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_TENSORS}, {_STATIC}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl(forward, _forward, "CompositeExplicitAutograd")
    _library.impl(backward, _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hal::{forward}", _fake_forward, lib=_library)
    torch.library.register_fake(f"hal::{backward}", _fake_backward, lib=_library)
    backward_operator = getattr(torch.ops.hal, backward).default

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = backward_operator(grad_out, grad_lse, out, lse, *tensors, *ctx.static)
        bits = ctx.static[-1]
        grads = [grad if bits >> i & 1 else None for i, grad in enumerate(found)]
        return (*grads, *(None,) * (_TENSOR_COUNT + _STATIC_COUNT - 4))

    torch.library.register_autograd(f"hal::{forward}", differentiate, setup_context=_save, lib=_library)
    OPERATORS[name] = getattr(torch.ops.hal, forward).default


def _define_all() -> None:
    for entry in registry.entries():
        define(entry.spec.name)


define(AUTOMATIC)
_define_all()
registry.on_change.append(_define_all)

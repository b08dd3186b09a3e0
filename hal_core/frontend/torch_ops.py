"""Operators for torch.compile, torch.jit.trace and torch.func.vmap, one pair per backend name, so that no cache of
compiled code can mistake one for another.

The selection is read while tracing, from a mirror that Dynamo guards; the operator compares it with the truth when it
runs. Eager calls do not come through here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import SelectionChangedError, refuse
from ..options import by_key, meter_var, mirror, policy_var, settings
from ..plans import BlockPlan
from ..registry import registry
from ..request import AttentionOutput, Causal
from .dispatch import find
from .execution import BoundAttention, derivative
from .operands import Operands, gradient_bits
from .validation import head_size

AUTOMATIC = "automatic"
_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? block_indices, Tensor? block_counts, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? page_table, Tensor? cache_seqlens, Tensor? key_scale, "
    "Tensor? value_scale, Tensor? rng"
)
_STATIC = (
    "SymInt[]? blocks, SymInt? window_left, SymInt? window_right, bool windowed, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa, str? causal, SymInt diagonal, float? softcap, bool return_lse, float? max_error, "
    "bool deterministic, SymInt? max_seqlen_q, SymInt? max_seqlen_k, str? backend, str? objective, "
    "bool? allow_simulated, bool? transfer, str? tiling, str? expected, int grads"
)
_TENSOR_COUNT = _TENSORS.count(",") + 1
_library = torch.library.Library("hal", "FRAGMENT")
OPERATORS: dict[str, Any] = {}
#: What is called instead of an operator inside vmap, whose transforms differentiate no operator.
MAPPED: dict[Any, Any] = {}
_tilings: dict[str, Any] = {}


def _registered(tiling: Any) -> str:
    """The text by which operators find a tiling. Dynamo runs this while it traces and keeps the result."""
    key = f"{type(tiling).__module__}.{type(tiling).__qualname__}:{tiling.name}"
    _tilings[key] = tiling
    return key


# What torch.compiler.assume_constant_result sets, without its import of all of Dynamo.
_registered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_mapped() -> bool:
    """Whether the caller is inside vmap and wants no more than first derivatives, which the operators have."""
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    transforms = torch._C._functorch.TransformType
    return transforms.Vmap in kinds and transforms.Jvp not in kinds and kinds.count(transforms.Grad) < 2


def _bits_of_any_level(tensors: Iterable[Tensor | None]) -> int:
    """As `operands.gradient_bits`, for any level of the transforms around the caller."""
    return sum(1 << place for place, t in enumerate(tensors) if t is not None and _is_differentiated(t))


def _is_differentiated(tensor: Tensor) -> bool:
    inner = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.requires_grad or (inner and _is_differentiated(torch._C._functorch.get_unwrapped(tensor)))


def in_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    plan: BlockPlan | None,
    tables: tuple[Tensor | None, ...],
    rng: tuple[int, int] | None,
    options: tuple[Any, ...],
    overrides: tuple[Any, ...],
) -> Any:
    """What `attention` becomes while Dynamo or torch.jit traces it: one operator, named after the selected backend."""
    dropout_p, is_causal, scale, enable_gqa, causal, diagonal, window, softcap, return_lse, *rest = options
    *given, tiling = overrides
    name = given[0] or (mirror.names[0] if len(mirror.names) == 1 else settings.name)
    operator = OPERATORS.get(name.partition(":")[0], OPERATORS[AUTOMATIC])
    bits = int(gradient_bits(query, key, value, mask)) if torch.is_grad_enabled() else 0
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        bits = _bits_of_any_level((query, key, value, mask))
        operator, mask = MAPPED[operator], None if mask is None else mask[(None,) * (4 - mask.dim())]
    seed = (
        torch.tensor([rng[0], rng[1]], dtype=torch.int64)
        if rng is not None
        else torch.randint(0, 2**62, (2,), dtype=torch.int64)
        if dropout_p > 0
        else None
    )
    blocks, indices, counts = (None, None, None) if plan is None else ([plan[0], plan[1]], plan[2], plan[3])
    left, right = (None, None) if window is None else window
    causal = causal.value if isinstance(causal, Causal) else causal
    out, lse = operator(
        query,
        key,
        value,
        mask,
        indices,
        counts,
        *tables,
        seed,
        blocks,
        left,
        right,
        window is not None,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        causal,
        diagonal,
        softcap,
        return_lse,
        *rest,
        *given,
        None if tiling is None else _registered(tiling),
        mirror.key if given[0] is None else None,
        # torch.jit guards nothing: those required when it runs.
        bits if torch.compiler.is_compiling() or not torch._C._is_tracing() else -1,
    )
    return AttentionOutput(out, lse) if return_lse else out


class _Call:
    """An operator's flat arguments, put back into the eager call's form."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        *tensors, seed = arguments[:_TENSOR_COUNT]
        blocks, left, right, windowed, *static, tiling, self.expected, bits = arguments[_TENSOR_COUNT:]
        self.bits = gradient_bits(*tensors[:4]) if bits < 0 else bits
        self.options = (*static[:6], (left, right) if windowed else None, *static[6:-4])
        self.overrides = (*static[-4:], None if tiling is None else _tilings[tiling])
        self.rng = None if seed is None else tuple(seed.tolist())
        query, key, value, mask, *others = (None if t is None else t.detach() for t in tensors)
        mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        self.operands = Operands.unflat((query, key, value, mask, *others), blocks or [None])

    def bound(self) -> BoundAttention:
        found = find(self.operands, self.bits, self.options, self.overrides)
        if found.needs_rng and self.rng is None:
            refuse(
                (
                    bool(self.bits),
                    f"{found.decision.chosen} is noisy, and compiled backward must repeat it: pass rng=(seed, offset)",
                )
            )
            self.rng = tuple(torch.randint(0, 2**62, (2,)).tolist())
        return found


@torch.no_grad()
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(arguments)
    if call.expected is not None and policy_var.get().key != call.expected:
        raise SelectionChangedError(
            "compiled attention runs under another hal.use() than it was compiled under (another task or thread): pass "
            "backend= inside the compiled function, or enter hal.use() where it is called"
        )
    found = call.bound()
    given, meter = (*call.operands, call.rng), meter_var.get()
    result = found.forward_run(*given) if meter is None else found.metered(meter, found.forward_run, given)
    if isinstance(result, tuple):
        return result[0].contiguous(), result[1].contiguous()
    # Where torch differentiates this session's own forward, nobody reads the log-sum-exp that the graph was promised.
    return result.contiguous(), _new_lse(call.operands.query, bool(call.bits))


def _new_lse(query: Tensor, wanted: bool) -> Tensor:
    """A log-sum-exp of zeros, empty where it is not wanted: operators return one always."""
    return query.new_zeros(query.shape[:-1] if wanted else (0,), dtype=torch.promote_types(query.dtype, torch.float32))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, value, bits, return_lse = arguments[0], arguments[2], arguments[-1], arguments[_TENSOR_COUNT + 11]
    return query.new_empty((*query.shape[:-1], head_size(value))), _new_lse(query, bool(return_lse or bits))


@torch.no_grad()
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    call = _Call(arguments)
    # Under the policy of the forward: it may have ended, and an accelerator's backward threads never inherit it.
    token = policy_var.set(policy_var.get() if call.expected is None else by_key[call.expected])
    try:
        found = call.bound()
    finally:
        policy_var.reset(token)
    grads = found.backward(call.operands, out, lse, grad_out, grad_lse, call.rng)
    return tuple(_gradient(grads[i], like, call.bits >> i & 1) for i, like in enumerate(arguments[:4]))


def _gradient(grad: Tensor | None, like: Tensor | None, wanted: int) -> Tensor:
    if not wanted or like is None:
        return torch.empty(0)
    return like.new_zeros(like.shape) if grad is None else grad.to(like.device).reshape(like.shape).contiguous()


def _fake_backward(_: Tensor, __: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(0) if like is None or not arguments[-1] >> i & 1 else like.new_empty(like.shape)
        for i, like in enumerate(arguments[:4])
    )


def _rule(operator: Callable[..., tuple[Tensor, ...]], first: int, seed: int) -> Callable[..., Any]:
    """What vmap does with an operator: one call with a larger batch.

    Args:
        first: where the query is among its arguments; a backward's gradients and results come before it.
        seed: where the seed is, the last tensor.
    """

    def mapped(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, mask_at = info.batch_size, first + 3
        others = any(t is not None for t in arguments[first + 4 : seed])
        refuse((others, "packed, paged, scaled or block-sparse attention was mapped by vmap: loop over it"))
        if arguments[seed] is not None:  # each example draws from its own seed, or all from the same
            each = [
                operator(*(t if d is None else t.select(d, i) for t, d in zip(arguments, dims, strict=True)))
                for i in range(size)
            ]
            found = tuple(map(torch.stack, zip(*each, strict=True)))
            return found, (0,) * len(found)
        wide: list[Any] = [
            t if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(arguments[: mask_at + 1], dims, strict=False)
        ]
        batch, mask = wide[first].shape[1], wide[mask_at]
        if mask is not None:
            wide[mask_at] = mask.expand(-1, batch, -1, -1, -1)
        # What is not asked for is empty, of one dimension.
        flat = [t if t is None else t.flatten(0, 1) if t.dim() > 2 else t[0] for t in wide]
        found = operator(*flat, *arguments[mask_at + 1 :])
        results = [t.expand(size, -1) if t.dim() == 1 else t.unflatten(0, (size, batch)) for t in found]
        if first and mask is not None and results[3].dim() > 2:  # a backward's mask broadcast over the batch
            results[3] = results[3].sum_to_size(mask.shape)
        return tuple(results), (0,) * len(results)

    return mapped


def define(name: str) -> None:
    """Define the operators hal::<name>_forward and hal::<name>_backward."""
    forward, backward = f"{name}_forward", f"{name}_backward"
    _library.define(
        f"{forward}({_TENSORS}, {_STATIC}) -> (Tensor, Tensor)",
        tags=(torch.Tag.nondeterministic_seeded,),  # a noisy device draws: two equal calls are not one
    )
    _library.define(
        f"{backward}(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_TENSORS}, {_STATIC}) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    )
    for operator, run, fake in ((forward, _forward, _fake_forward), (backward, _backward, _fake_backward)):
        _library.impl(operator, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hal::{operator}", fake, lib=_library)
    backward_operator = getattr(torch.ops.hal, backward).default

    save, differentiate = derivative(backward_operator, _TENSOR_COUNT)
    torch.library.register_autograd(f"hal::{forward}", differentiate, setup_context=save, lib=_library)
    OPERATORS[name], seed = getattr(torch.ops.hal, forward).default, _TENSOR_COUNT - 1

    class Mapped(torch.autograd.Function):
        generate_vmap_rule = True
        forward, setup_context, backward = map(staticmethod, (OPERATORS[name], save, differentiate))

    MAPPED[OPERATORS[name]] = Mapped.apply
    torch.library.register_vmap(f"hal::{forward}", _rule(OPERATORS[name], 0, seed), lib=_library)
    torch.library.register_vmap(f"hal::{backward}", _rule(backward_operator, 4, seed + 4), lib=_library)


def _define_all() -> None:
    for name in {AUTOMATIC, *(entry.spec.name for entry in registry.entries())} - OPERATORS.keys():
        define(name)


_define_all()
registry.on_change.append(_define_all)

"""Devices made from the honest `DenseBackend` that are wrong in one thing each: the kit's own test.

Each of FAULTS says which check must find it; "leaves the work to another device" needs the device "honest:0"
registered.
To see what a finding looks like: `print(check_backend(FAULTS["wrong scale"].make()))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import AttentionRequest, Causal, Fidelity, session
from ..capability import Numerics, Range
from ..device_info import Basis, Estimate, Provenance, Quantity
from .dense_backend import CLAIMS, DenseBackend, DenseSession, TiledSession

__all__ = ["CLAIMS", "FAULTS", "DenseBackend", "DenseSession", "Fault", "TiledSession", "fault"]


@attrs.frozen
class Fault:
    """A device that breaks its claims: the check that must find it, and its backend, named "faulty"."""

    check: str
    make: Callable[[], DenseBackend]


def fault(check: str, *, options: Mapping[str, Any] | None = None, **steps: Any) -> Fault:
    """A fault made by replaced steps of the session, or by the backend's options; `check` must find it."""
    kind: Any = type("FaultySession", (DenseSession,), steps)
    return Fault(check, lambda: DenseBackend("faulty", kind, **(options or {})))


def _claims(**changes: Any) -> Mapping[str, Any]:
    return {"claims": attrs.evolve(CLAIMS, **changes)}


def _top_left(self: DenseSession, r: AttentionRequest, *rest: Any) -> Tensor | None:
    top_left = replace(r, causal=Causal.TOP_LEFT) if r.causal is Causal.BOTTOM_RIGHT else r
    return DenseSession.visible(self, top_left, *rest)


def _program_once(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Copies keys to the device once for each tensor, as if nobody ever wrote to one."""
    held = getattr(self, "held", None)
    if held is None or (held[0].data_ptr(), held[0].shape, held[0].dtype) != (key.data_ptr(), key.shape, key.dtype):
        self.held = held = (key, _staged(self, key))
    return DenseSession.prepare_attention(self, query, key if key.requires_grad else held[1], value, *rest, **options)


def _program_by_first_element(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Copies keys again only where their shape, dtype or first element differs from the copy's."""
    held = getattr(self, "held", None)
    if held is None or (held.shape, held.dtype) != (key.shape, key.dtype) or held[0, 0, 0, 0] != key[0, 0, 0, 0]:
        self.held = held = _staged(self, key)
    return DenseSession.prepare_attention(self, query, key if key.requires_grad else held, value, *rest, **options)


def _staged(self: DenseSession, tensor: Tensor) -> Tensor:
    """A copy in memory that is given back when the next one is made."""
    if (last := getattr(self, "staging", None)) is not None:
        self.memory.free(last)
    buffer: Any = self.memory.allocate(tensor.shape, str(tensor.dtype).removeprefix("torch."))
    self.staging = buffer  # type: ignore[attr-defined]
    return buffer.tensor.copy_(tensor.detach())  # type: ignore[no-any-return]


def _share_scratch(self: Any, query: Tensor, *rest: Any) -> Any:
    """Stages queries in one buffer for each shape, whichever thread calls."""
    if query.requires_grad:
        return DenseSession.attend(self, query, *rest)
    rooms, form = self.__dict__.setdefault("rooms", {}), (query.shape, query.dtype)
    if form not in rooms:
        rooms[form] = self.memory.allocate(query.shape, str(query.dtype).removeprefix("torch."))
    return DenseSession.attend(self, rooms[form].tensor.copy_(query), *rest)


def _reuse_output(self: Any, *given: Any) -> Any:
    """Gives every result of one shape in the same memory."""
    out, lse = DenseSession.attend(self, *given)
    if out.requires_grad:
        return out, lse
    return self.__dict__.setdefault("outs", {}).setdefault((out.shape, out.dtype), out).copy_(out), lse


def _halve_keys(self: DenseSession, query: Tensor, key: Tensor, *rest: Any) -> Any:
    found = DenseSession.attend(self, query, key, *rest)
    with torch.no_grad():
        key.detach().mul_(0.5)
    return found


def _keep_something(self: Any, total: Tensor) -> Tensor:
    self.something_kept = [*getattr(self, "something_kept", ()), torch.ones(5000)]
    return DenseSession.divisor(self, total)


def _half_gradient(self: DenseSession, tensor: Tensor, *rest: Any) -> Tensor:
    tensor = (tensor + tensor.detach()) / 2 if tensor.requires_grad else tensor
    return DenseSession.by_query_heads(self, tensor, *rest)


def _changed(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The attend step with another output."""

    def attend(self: DenseSession, *given: Any) -> Any:
        out, lse = DenseSession.attend(self, *given)
        return change(out), lse

    return attend


def _scores_past_memory(self: DenseSession, *given: Any) -> Any:
    scores, values = DenseSession.scores(self, *given)
    return scores.clone(), values


def _lowest_is_hidden(self: DenseSession, mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    lowest = mask == torch.finfo(mask.dtype).min
    return mask.masked_fill(lowest, -math.inf) if lowest.any() else mask


def _milliseconds(self: DenseSession, prepared: Any) -> Estimate:
    """A cost whose milliseconds are given as seconds."""
    estimate = DenseBackend().estimate(prepared[3], DenseBackend().devices()[0])
    low, high = 1000 * estimate.time.low, 1000 * estimate.time.high
    return attrs.evolve(estimate, time=Quantity(low, high, Basis.MODELLED, Provenance.ASSUMED))


_NUMERICS: Any = CLAIMS.numerics
_DOUBLE: Any = {**_NUMERICS, "float64": Numerics(1e-12, 1e-12, 1e-12)}
_LOOSE: Any = {"float32": Numerics(1.2)}
FAULTS: Mapping[str, Fault] = {
    "wrong scale": fault("scale", scale=lambda self, r: r.dim_qk**-0.5),
    "scale doubled beyond 1,024 keys": fault(
        "lengths", scale=lambda self, r: r.effective_scale * (2 if r.len_k > 1024 else 1)
    ),
    "dropped mask": fault("masks", mask=lambda self, mask: None),
    "finfo.min taken for -inf": fault("lowest_mask", mask=_lowest_is_hidden),
    "NaN that leaks into other batch entries": fault(
        "isolation", divisor=lambda self, total: DenseSession.divisor(self, total) + 0 * total.sum()
    ),
    "swapped group heads": fault("grouped_heads", key_head=lambda self, head, r: head % r.heads_kv),
    "swapped group heads under a loose bound": fault(
        "structure",
        key_head=lambda self, head, r: head % r.heads_kv,
        options=_claims(dtypes=_LOOSE, numerics=_LOOSE, features={"grouped_heads", "strides", "diagonal", "window"}),
    ),
    "wrong causal alignment": fault("causal", visible=_top_left),
    "wrong base of the log-sum-exp": fault(
        "log_sum_exp", lse=lambda self, *given: DenseSession.lse(self, *given) / math.log(2)
    ),
    "NaN in rows without keys": fault("masks", divisor=lambda self, total: total),
    "stale keys": fault("stale_keys", prepare_attention=_program_once),
    "stale keys by their first element": fault("stale_keys", prepare_attention=_program_by_first_element),
    "scratch shared between threads": fault("threads", attend=_share_scratch),
    "an output buffer used again": fault("results_stay", attend=_reuse_output),
    "changes its inputs": fault("inputs_unchanged", attend=_halve_keys),
    "leaks": fault("leaks", divisor=_keep_something),
    "allocates past its memory manager": fault("memory", scores=_scores_past_memory),
    "estimates a tenth of its memory": fault("peak_memory", options={"memory": 0.1}),
    "half a gradient": fault("gradients", by_query_heads=_half_gradient),
    "claims a dtype it lacks": fault("dtypes", options=_claims(dtypes=_DOUBLE, numerics=_DOUBLE)),
    "refuses what it claims": fault("window", options={"refuses": lambda request: request.window is not None}),
    "ignores rng": fault(
        "repeats", kept=lambda self, weights, r, rng, work: DenseSession.kept(self, weights, r, None, work)
    ),
    "wavers where it claims determinism": fault(
        "repeats", divisor=lambda self, total: DenseSession.divisor(self, total) * (1 + 1e-6 * torch.rand(()))
    ),
    "gives another shape": fault("contract", attend=_changed(lambda out: out.transpose(1, 2))),
    "gives another dtype": fault("contract", attend=_changed(torch.Tensor.double)),
    "gives a result on another device": fault("contract", attend=_changed(lambda out: out.to("meta"))),
    "gives nothing": fault("contract", attend=_changed(lambda out: None)),
    "blocks of a tiling that are ignored": fault("tilings", options=_claims(tile_sizes=Range(1, 128))),
    "a cost in milliseconds": fault("costs", cost=_milliseconds),
    "a tiling that is decoration": fault("tilings", options=_claims(tile_sizes=Range(0))),
    "an option that spoils the result": fault(
        "options",
        scale=lambda self, r: r.effective_scale * dict(r.options).get("passes", 1),
        options=_claims(options={"passes": (1, 2)}),
    ),
    "leaves the work to another device": fault(
        "runs_where_it_says", compute_attention=lambda self, *a, **k: session("honest:0").compute_attention(*a, **k)
    ),
    "calls torch on the host hardware": fault(
        "runs_where_it_says", options={"fidelity": Fidelity.HARDWARE, "family": "accelerator"}
    ),
    "estimates from thin air": fault("estimates", options={"seconds": 1e-9}),
}

"""Honest devices of other kinds than `DenseBackend`: an explicit backward, noise, a fast path, tilings, options."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from torch import Tensor

import hal_core as hal
from hal_core.request import DTYPE_BYTES
from hal_core.testing.dense_backend import CLAIMS, DenseBackend, DenseSession, TiledSession, Workspace


class ExplicitSession(DenseSession):
    """A backward of its own, from the given (out, lse), as a device that torch cannot differentiate has."""

    def autograd(self, request: hal.AttentionRequest) -> Any:
        return "explicit"

    def compute_attention(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().compute_attention(*args, **options)

    def given(self, lse: Tensor, scores: Tensor) -> Tensor:
        return lse

    def compute_attention_backward(
        self,
        prepared: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: Any = None,
    ) -> hal.Grads:
        query, key, value, r = prepared
        group = r.heads_q // r.heads_kv
        with torch.no_grad(), ExitStack() as held:
            work = Workspace(self, False, held, None)
            scores, v = self.scores(query, key, value, mask, r, work)
            lse = self.given(lse, scores).masked_fill(lse == -math.inf, 0)
            weights = torch.exp(scores.sub_(lse.unsqueeze(-1)), out=scores)
            # A very low log-sum-exp has no digits left for the sum of weights. It is summed again, unless these keys
            # are a part of those that it is about.
            total = torch.sum(weights, -1, out=work.room(*lse.shape))
            whole = (lse < -256) & (total.log().abs() <= 5e-7 * lse.abs())
            weights.div_(total.masked_fill_(~whole, 1.0).unsqueeze(-1))
            go, room = work.single(grad_out), work.room(*scores.shape)
            product = work.room(*grad_out.shape)
            through = torch.mul(go, out, out=product).sum(-1, keepdim=True)
            through = through if grad_lse is None else through - grad_lse.unsqueeze(-1)
            flow = torch.matmul(go, v.mT, out=room).sub_(through).mul_(weights)
            mask_grad = self.summed(flow, mask, work) if "mask" in r.grads and mask is not None else None
            query_grad = torch.matmul(flow, self.by_query_heads(work.single(key), r, work), out=work.room(*query.shape))
            wide = [work.room(*query.shape[:2], *t.shape[2:]) for t in (key, value)]
            key_grad = torch.matmul(flow.mT, work.single(query), out=wide[0])
            value_grad = torch.matmul(weights.mT, go, out=wide[1])
            grads = [query_grad.mul_(r.effective_scale), key_grad.mul_(r.effective_scale), value_grad]
            if group > 1:
                rooms = [work.room(*t.shape) for t in (key, value)]
                by_group = [t.unflatten(1, (-1, group)) for t in grads[1:]]
                grads[1:] = (torch.sum(t, 2, out=room) for t, room in zip(by_group, rooms, strict=True))
            fresh = (torch.empty_like(t).copy_(g) for g, t in zip(grads, (query, key, value), strict=True))
            return hal.Grads(*fresh, mask_grad)

    def summed(self, flow: Tensor, mask: Tensor, work: Workspace) -> Tensor:
        return flow.sum_to_size(mask.shape).to(mask.dtype).clone()


class ExplicitBackend(DenseBackend):
    """Its estimate of a call with gradients is what forward and backward allocate."""

    def estimate(self, request: hal.AttentionRequest, device: hal.Device) -> hal.Estimate:
        found, r = super().estimate(request, device), request
        if not r.grads:
            return found
        rows, keys = r.batch * r.heads_q * r.len_q, r.batch * r.heads_q * r.len_k
        kept = rows * (r.dim_v * DTYPE_BYTES[r.dtype] + 4) + (rows + 2 * r.batch * r.heads_kv * r.len_k) * r.dim_qk * 4
        work = 4 * (2 * rows * r.len_k + 2 * rows * r.dim_qk + 2 * keys * r.dim_qk + rows)
        if r.heads_q != r.heads_kv:
            work += 4 * 3 * keys * r.dim_qk + 4 * 2 * r.batch * r.heads_kv * r.len_k * r.dim_qk
        return attrs.evolve(found, memory=kept + work)


class NoisySession(DenseSession):
    level = 0.02

    def attend(self, query: Tensor, *rest: Any) -> Any:
        out, lse = super().attend(query, *rest)
        seed, offset = rest[4]
        size = torch.linalg.vector_norm(out, dim=-1, keepdim=True) / out.shape[-1] ** 0.5
        with self.scratch(out.shape, "float32") as room:
            torch.randn(out.shape, generator=self.generator(seed, offset), out=room)
            return out.add_(room.mul_(self.level * size)), lse

    def generator(self, seed: int, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1000 + offset)


class BoundSession(DenseSession):
    """Has a fast path of its own, which neither prepares nor computes."""

    def bind(self, request: hal.AttentionRequest) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            exact = dataclasses.replace(request, len_q=query.shape[2], len_k=key.shape[2])
            out, lse = self.attend(query, key, value, mask, exact, rng)
            return hal.AttentionOutput(out, lse) if request.lse else out

        return run


class CostlySession(DenseSession):
    """Says what a call cost: what was estimated."""

    def cost(self, prepared: Any) -> hal.Estimate:
        backend = DenseBackend()
        return backend.estimate(prepared[3], backend.devices()[0])


EXPLICIT = attrs.evolve(CLAIMS, features=CLAIMS.features - {"softcap", "dropout"})
NOISY = attrs.evolve(
    CLAIMS,
    dtypes={"float32"},
    numerics={"float32": hal.Numerics(0.021, noisy=True)},
    features=CLAIMS.features - {"backward", "mask_grad", "lse_grad", "deterministic", "dropout"},
)
TILED = attrs.evolve(CLAIMS, tile_sizes=hal.Range(0))
BLOCKS = attrs.evolve(CLAIMS, tile_sizes=hal.Choice({16, 64}))
OTHERS = {
    "explicit": (ExplicitSession, EXPLICIT, ExplicitBackend),
    "noisy": (NoisySession, NOISY, DenseBackend),
    "bound": (BoundSession, CLAIMS, DenseBackend),
    "tiled": (TiledSession, TILED, DenseBackend),
    "tiled in blocks": (TiledSession, BLOCKS, DenseBackend),
    "with a cost": (CostlySession, CLAIMS, DenseBackend),
    "with options": (
        DenseSession,
        attrs.evolve(CLAIMS, options={"passes": (1, 2), "bits": hal.Range(4, 8)}),
        DenseBackend,
    ),
}
#: What a quick run looks at: the checks that the device is made for.
OWN = {
    "explicit": ["gradients", "merges", "results_stay", "memory", "peak_memory", "isolation", "lowest_mask"],
    "noisy": ["dtypes", "repeats", "stale_keys", "structure", "isolation", "memory", "peak_memory"],
    "bound": ["threads", "results_stay", "memory"],
    "tiled": ["tilings", "threads"],
    "tiled in blocks": ["tilings"],
    "with a cost": ["costs"],
    "with options": ["options"],
}

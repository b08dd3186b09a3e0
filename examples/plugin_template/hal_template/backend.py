"""A device that computes attention with plain torch operations. Change `attend` to call yours."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hal_core import (
    AttentionRequest,
    Capabilities,
    Causal,
    Device,
    Estimate,
    Fidelity,
    MaskKind,
    Numerics,
    Quantity,
    Range,
    Refusal,
    Session,
    SimpleSession,
    dense_mask,
)

CAPABILITIES = Capabilities(
    dtypes={"float32"},
    numerics={"float32": Numerics(relative=1e-5, lse=1e-5)},
    head_dim=Range(1, 512),
    masks={MaskKind.NONE, MaskKind.BOOLEAN},
    causal={Causal.NONE, Causal.TOP_LEFT, Causal.BOTTOM_RIGHT},
    features={"grouped_heads", "lse", "strides", "diagonal"},
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, request: AttentionRequest
) -> tuple[Tensor, Tensor]:
    """Attention over [batch, heads, length, head_dim]: (output, natural log-sum-exp of the scaled scores)."""
    group = request.heads_q // request.heads_kv  # query head h reads key head h // group
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * request.effective_scale
    for visible in (mask, dense_mask(request, query.shape[2], key.shape[2])):
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    dead = (lse == -torch.inf).unsqueeze(-1)  # a row that may read no key gives 0 and -inf
    weights = torch.exp(scores - torch.where(dead, 0, lse.unsqueeze(-1)))
    return weights @ value, lse


class TemplateBackend:
    def devices(self) -> Sequence[Device]:
        """What is there; an empty list, never an exception, where there is nothing."""
        return [
            Device(id="template:0", family="template", vendor="you", model="dense torch", fidelity=Fidelity.EMULATED)
        ]

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Only what the capabilities cannot say."""
        return ()

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """From 1 to 100 GFLOP/s, a guess and called so, after 20 microseconds to 2 milliseconds per call."""
        flops = 2 * request.macs
        time = Quantity(2e-5 + flops / 1e11, 2e-3 + flops / 1e9, basis="declared", provenance="assumed")
        output = request.batch * request.heads_q * request.len_q * (request.dim_v + 1) * 4
        scores = request.batch * request.heads_q * request.len_q * request.len_k * 4
        return Estimate(time=time, memory=output + 3 * scores)

    def open(self, device: Device) -> Session:
        session: Any = SimpleSession(attend)
        return session

"""What a model's attention takes when its sequence is cut over devices, before anything runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from hal_core import AttentionRequest, Causal, ContractError
from hal_core.plugin_api import DTYPE_BYTES, find_devices, merged_policy

from .cost import LinkRate, StrategyEstimate, estimates, least, stored_link
from .description import Description, local_request
from .inner import choose
from .layout import make_layout
from .visible import Rule


class AttentionLayers(NamedTuple):
    """Attention layers that are alike: how many, their heads, head sizes, whether causal, and window (None: none)."""

    number: int
    heads: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


class Plan(NamedTuple):
    """Attention of all layers of a model over `ranks` devices.

    Attributes:
        device: that computes a rank's part. ranks, tokens: how many. layout, strategy: what is advised.
        layers: (the layers, every strategy's estimate of one of them).
        seconds: of attention in one step, all layers. memory: bytes of a rank by what holds them.
        link: rates between ranks. basis: of the device's times.
    """

    device: str
    ranks: int
    tokens: int
    layout: str
    strategy: str
    layers: list[tuple[AttentionLayers, tuple[StrategyEstimate, ...]]]
    seconds: float
    memory: dict[str, int]
    link: LinkRate
    basis: str


def plan(
    layers: Sequence[AttentionLayers],
    tokens: int,
    ranks: int,
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
    layout: str = "zigzag",
    training: bool = False,
    link: LinkRate | None = None,
) -> Plan:
    """Plan the attention of a model's layers.

    Args:
        layers: kinds of layers. tokens: of the whole sequence. ranks: devices that share it.
        device: hal device of each rank; None: the best here. training: forward and backward.
        link: None: as `measure_link` stored it for the device's kind, or assumed.

    Raises:
        ContractError: no tokens, ranks or layers, an unknown layout or dtype. UnsupportedError: no device runs a rank's
            part.
    """
    if min(tokens, ranks, batch) < 1 or not layers:
        raise ContractError(f"{tokens} tokens, {ranks} ranks and a batch of {batch} were given: use 1 or more of each")
    if dtype not in DTYPE_BYTES:
        raise ContractError(f"dtype {dtype!r} was given: use {', '.join(DTYPE_BYTES)}")
    policy, place = merged_policy(device), "cpu" if device is None else find_devices(device)[0].reads[0]
    link = stored_link(place.partition(":")[0], ranks) if link is None else link
    placed, found, descriptions = make_layout(layout, tokens, ranks), [], []
    for kind in layers:
        causal = Causal.TOP_LEFT if kind.causal else Causal.NONE
        window = None if kind.window is None else (kind.window - 1, 0 if kind.causal else kind.window - 1)
        sizes = (batch, kind.heads, kind.heads_kv, placed.local, placed.local, kind.dim_qk, kind.dim_v, dtype, place)
        grads = frozenset("qkv") if training else frozenset()
        asked: dict[str, Any] = {"window": window, "softcap": kind.softcap, "scale": kind.scale, "grads": grads}
        request = local_request(AttentionRequest(*sizes, causal=causal, **asked), 0.0, None, False)
        rule = Rule(causal, 0, window, (0, tokens), (0, tokens))
        descriptions.append(Description(request, policy, placed, placed, rule, 0.0, grads, "none"))
        found.append((kind, estimates(descriptions[-1], (ranks,), link)))
    chosen = least(_summed(found))
    each = [(kind, next(e for e in given if e.strategy == chosen)) for kind, given in found]
    slot = batch * placed.local * DTYPE_BYTES[dtype]  # of a rank's query and output, and of its key and value
    held = [(slot * (k.dim_qk + k.dim_v) * k.heads, slot * (k.dim_qk + k.dim_v) * k.heads_kv) for k in layers]
    saved = "query, key, value and output kept for the backward pass" if training else "cache of keys and values"
    kept = [kind.number * (sum(parts) if training else parts[1]) for kind, parts in zip(layers, held, strict=True)]
    memory = {
        saved: sum(kept),
        "a layer's query, key, value and output": max(map(sum, held)),
        "beside them, one layer at a time": max(estimate.memory for _, estimate in each),
    }
    decision = choose(descriptions[0].request, policy).decision
    seconds, estimate = sum(kind.number * one.total for kind, one in each), decision.winner.estimate
    basis = "none" if estimate is None else str(estimate.time.basis)
    return Plan(str(decision.chosen), ranks, tokens, layout, chosen, found, seconds, memory, link, basis)


def _summed(found: list[tuple[AttentionLayers, tuple[StrategyEstimate, ...]]]) -> tuple[StrategyEstimate, ...]:
    """Estimates over all layers; a strategy that one of them cannot take is refused."""
    summed = []
    for same in zip(*(given for _, given in found), strict=True):
        reason = next((one.refusal for one in same if one.refusal), "")
        total = sum(kind.number * one.total for (kind, _), one in zip(found, same, strict=True))
        summed.append(same[0]._replace(refusal=reason, total=total))
    return tuple(summed)


def as_dict(found: Plan) -> dict[str, Any]:
    """Plain values for JSON."""
    layers = [
        {"layers": kind._asdict(), "strategies": [estimate._asdict() for estimate in given]}
        for kind, given in found.layers
    ]
    return found._asdict() | {"layers": layers, "link": found.link._asdict()}

"""`attention`: one sequence over many devices, on each rank's own tokens."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionOutput, ContractError, Decision

from . import cost
from .agreement import agree
from .description import Description, Given, describe
from .strategies import STRATEGIES, Run, check_strategy
from .streaming import one_device
from .topology import Topology, topology_of


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mesh: Any = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    layout: Any = "contiguous",
    strategy: str = "auto",
    length: int | tuple[int | None, int | None] | None = None,
    return_lse: bool = False,
    rng: tuple[int, int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    timeout: float | None = None,
    memory: int | None = None,
    **options: Any,
) -> Any:
    """Attention of a sequence whose tokens lie on several ranks; every rank calls it with its own.

    Args:
        query: [batch, heads_q, local, dim_qk], this rank's tokens in the order of its layout.
        key: [batch, heads_kv, local, dim_qk]. value: [batch, heads_kv, local, dim_v].
        mesh: a DeviceMesh of one dimension, or of two: keys travel over the first, heads over the second. A process
            group; None for the default group. Without a process group the call runs on one device, and says so once.
        attn_mask: this rank's rows and all keys in the order of the sequence, [1 or batch, 1 or heads_q, 1 or local,
            1 or tokens], bool or added. The gradient of a mask with 1 row is that of this rank's rows: sum it over the
            ranks, as that of any replicated tensor.
        dropout_p, rng: the pattern is a function of (seed, offset) and of the tokens' positions in the sequence: the
            same for every number of ranks, layout and strategy. Without rng the first rank draws it.
        layout: "contiguous", "zigzag", "striped", or a `TokenLayout`; a pair for queries and keys. Queries may be
            "replicated": every rank holds all of them, as in decoding.
        strategy: "ring", "gathered", "ulysses", "ring_ulysses", "pass_query", or "auto" (`hal_parallel.explain` says
            which and why).
        length: tokens of the sequence without padding, a pair for queries and keys; None: every slot holds a token.
        return_lse: give AttentionOutput(out, lse).
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1] over the whole sequence, equal on every rank.
        timeout: seconds that a rank waits for another one (default 300).
        memory: without a process group, bytes that blocks may take beside inputs and results (default 128 MiB).
        options: scale, enable_gqa, causal, diagonal, window, softcap, max_error, deterministic, backend, objective,
            allow_simulated, transfer, as `hal.attention`'s.

    Returns:
        [batch, heads_q, local, dim_v] in the query's dtype, or AttentionOutput. Padding gives 0 and -inf.

    Raises:
        ContractError: malformed input, or ranks that were given different calls: on all ranks, before anything is sent.
        UnsupportedError: no device runs a rank's part. ExchangeError: a rank did not answer in time, or is gone.
    """
    options["is_causal"] = is_causal
    query, key, value, attn_mask = _follow_autocast(query, key, value, attn_mask)
    topology = topology_of(mesh, timeout)
    if topology is None:
        _say_one_device()
    found, error, chosen = None, None, -1
    world = 1 if topology is None else topology.world
    try:
        if topology is not None:
            _check_place(query, topology)
        given, places = Given(query, key, value, attn_mask), (layout, length, (cu_seqlens_q, cu_seqlens_k))
        found = describe(given, dropout_p, options, places, world, return_lse)
        if attn_mask is not None:
            given = given._replace(mask=attn_mask[(None,) * (4 - attn_mask.dim())])
        seed, offset = _drawn(rng, bool(found.dropout))
        if topology is not None:
            chosen = _chosen(strategy, found, topology)
            Run(found, topology, (seed, offset)).device(list(STRATEGIES)[chosen])
    except Exception as caught:  # the other ranks are told
        if topology is None:
            raise
        error = caught
    if topology is None:
        assert found is not None
        out, lse = one_device(given, found, (seed, offset), memory)
    else:
        facts = {} if found is None else found.facts
        facts |= {"strategy": strategy, "rng": rng, "mesh": str([link.size for link in topology.links])}
        numbers = (chosen, seed, offset) if error is None else (-1, 0, 0)
        chosen, seed, offset = agree(topology, facts, error, numbers)
        assert found is not None
        name = list(STRATEGIES)[chosen]
        out, lse = STRATEGIES[name](given, Run(found, topology, (seed, offset)))
    return AttentionOutput(out, lse) if return_lse else out


class Explanation(NamedTuple):
    """Which strategy a call takes, and why.

    Attributes:
        strategy: its name. estimates: of every strategy, those that cannot run the call with the reason.
        link: rates between ranks. decision: of the device that runs a rank's part.
    """

    strategy: str
    estimates: tuple[cost.StrategyEstimate, ...]
    link: cost.LinkRate
    decision: Decision

    def __str__(self) -> str:
        lines = [f"strategy {self.strategy}; link {self.link}"]
        lines += [f"  {estimate}" for estimate in self.estimates]
        return "\n".join([*lines, f"each rank's part: {self.decision.chosen}, {self.decision.reason}"])


def explain(
    query: Tensor, key: Tensor, value: Tensor, mesh: Any = None, attn_mask: Tensor | None = None, **options: Any
) -> Explanation:
    """The strategy that `attention` with the same arguments takes on this rank, with every strategy's estimate.

    Nothing is sent: the link's rates are those that `measure_link` stored, or assumed ones.

    Raises:
        ContractError, UnsupportedError: as `attention`, of this rank's own arguments; there is no process group.
    """
    topology = topology_of(mesh)
    if topology is None:
        raise ContractError("there is no process group, so the call runs on one device: hal.explain says which")
    given = {name: options.pop(name, default) for name, default in _EXPLAINED.items()}
    places = given["layout"], given["length"], (given["cu_seqlens_q"], given["cu_seqlens_k"])
    tensors, p = Given(query, key, value, attn_mask), given["dropout_p"]
    found = describe(tensors, p, options, places, topology.world, given["return_lse"])
    name = list(STRATEGIES)[_chosen(given["strategy"], found, topology)]
    link = cost.stored_link(topology.ring.device.type, topology.world)
    estimates = cost.estimates(found, topology.shape, link)
    return Explanation(name, estimates, link, Run(found, topology, (0, 0)).device(name).decision)


#: Arguments of `attention` that `explain` reads itself.
_EXPLAINED: dict[str, Any] = {
    **{"dropout_p": 0.0, "layout": "contiguous", "length": None, "strategy": "auto", "return_lse": False},
    **{"cu_seqlens_q": None, "cu_seqlens_k": None},
}


def _chosen(strategy: str, description: Description, topology: Topology) -> int:
    """The number of the strategy that runs a call."""
    if strategy == "auto":
        link = cost.stored_link(topology.ring.device.type, topology.world)
        strategy = cost.least(cost.estimates(description, topology.shape, link))
    check_strategy(strategy, description, topology.shape)
    return list(STRATEGIES).index(strategy)


def _check_place(query: Any, topology: Topology) -> None:
    if isinstance(query, Tensor) and query.device.type not in topology.kinds:
        raise ContractError(
            f"a query on {query.device} and a mesh of {', '.join(sorted(topology.kinds))} devices were given: move the "
            "tensors, or make the mesh for their device"
        )


def _drawn(rng: Any, wanted: bool) -> tuple[int, int]:
    """(seed, offset) as given, or drawn from torch's default generator where dropout wants it."""
    if rng is None:
        seed, offset = torch.randint(0, 2**62, (2,)).tolist() if wanted else (0, 0)
        return seed, offset
    if isinstance(rng, tuple | list) and len(rng) == 2 and all(type(n) is int and 0 <= n < 1 << 63 for n in rng):
        return rng[0], rng[1]
    raise ContractError(f"rng {rng!r} was given: pass (seed, offset), two whole numbers of 0 or more")


def _follow_autocast(*tensors: Any) -> list[Any]:
    """Cast as torch's autocast casts scaled_dot_product_attention's tensors; float64 stays."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return list(tensors)
    kinds, target = (torch.float32, torch.float16, torch.bfloat16), torch.get_autocast_dtype(kind)
    return [t.to(target) if isinstance(t, Tensor) and t.dtype in kinds else t for t in tensors]


@cache
def _say_one_device() -> None:
    """Said once in a process."""
    warnings.warn(
        "hal_parallel: there is no process group, so the whole sequence runs on one device, its keys block by block",
        UserWarning,
        stacklevel=3,
    )

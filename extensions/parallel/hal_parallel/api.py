"""`attention`: one sequence over many devices, on each rank's own tokens; `shard` and `unshard` them."""

import inspect
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionOutput, ContractError, Decision

from . import cost, layout as layouts
from .description import Description, Given, describe, widened
from .draws import drawn
from .exchange import gather_tokens
from .layout import TokenLayout, make_layout
from .strategies import STRATEGIES, Run, check_strategy
from .streaming import one_device
from .topology import Topology, agree, topology_of


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
    given = _follow_autocast(Given(query, key, value, attn_mask))
    asked = dropout_p, options, (layout, length, (cu_seqlens_q, cu_seqlens_k)), return_lse
    topology = topology_of(mesh, timeout)
    if topology is None:
        _say_one_device()
        found = describe(given, 1, *asked)
        out, lse = one_device(widened(given), found, rng, memory)
    else:
        facts: dict[str, Any] = {"strategy": strategy, "rng": rng, "mesh": topology.shape}
        numbers, error = [-1, 0, 0], None
        try:
            _check_place(query, topology)
            found = describe(given, topology.world, *asked)
            facts |= found.facts
            chosen = _chosen(strategy, found, topology)
            inner = Run(found, topology, (0, 0)).device(list(STRATEGIES)[chosen])
            numbers = [chosen, *drawn(rng, inner.noisy or found.dropout > 0)]
        except Exception as caught:  # the other ranks are told
            error = caught
        chosen, *numbers = agree(topology, facts, error, numbers)
        run = Run(found, topology, (numbers[0], numbers[1]))
        out, lse = list(STRATEGIES.values())[chosen](widened(given), run)
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
    asked = inspect.signature(attention).bind(query, key, value, mesh, attn_mask, **options)
    asked.apply_defaults()
    a = asked.arguments
    places = a["layout"], a["length"], (a["cu_seqlens_q"], a["cu_seqlens_k"])
    options = a["options"] | {"is_causal": a["is_causal"]}
    tensors = Given(query, key, value, attn_mask)
    found = describe(tensors, topology.world, a["dropout_p"], options, places, a["return_lse"])
    name = list(STRATEGIES)[_chosen(a["strategy"], found, topology)]
    link = cost.stored_link(topology.ring.device.type, topology.world)
    estimates = cost.estimates(found, topology.shape, link)
    return Explanation(name, estimates, link, Run(found, topology, (0, 0)).device(name).decision)


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


def _follow_autocast(given: Given) -> Given:
    """Cast as torch's autocast casts scaled_dot_product_attention's tensors; float64 stays."""
    kind = given.query.device.type if isinstance(given.query, Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return given
    kinds, target = (torch.float32, torch.float16, torch.bfloat16), torch.get_autocast_dtype(kind)
    return Given._make(t.to(target) if isinstance(t, Tensor) and t.dtype in kinds else t for t in given)


@cache
def _say_one_device() -> None:
    """Said once in a process."""
    warnings.warn(
        "hal_parallel: there is no process group, so the whole sequence runs on one device, its keys block by block",
        UserWarning,
        stacklevel=3,
    )


def shard(tensor: Tensor, mesh: Any = None, layout: Any = "contiguous", dim: int = 2, fill: float = 0) -> Tensor:
    """This rank's tokens of a tensor that every rank holds whole; where the world does not divide it, padded by `fill`.

    Args:
        tensor: with the whole sequence along `dim`. layout: a name or a `TokenLayout`.
    """
    rank, found = _place(mesh, layout, tensor.shape[dim])
    return layouts.shard(tensor, found, rank, dim, fill)


def unshard(
    tensor: Tensor, mesh: Any = None, layout: Any = "contiguous", dim: int = 2, length: int | None = None
) -> Tensor:
    """The whole sequence, on every rank, of the parts that the ranks hold; differentiable.

    Args:
        tensor: this rank's tokens along `dim`. length: tokens of the sequence without padding; None: no padding.
    """
    topology = topology_of(mesh)
    world = 1 if topology is None else topology.world
    _, found = _place(mesh, layout, tensor.shape[dim] * world if length is None else length)
    if found.local != tensor.shape[dim]:
        raise ContractError(
            f"a part of {tensor.shape[dim]} tokens was given, and {found.name} of {found.length} has {found.local}: "
            "pass length="
        )
    for link in () if topology is None else topology.links:
        tensor = gather_tokens(tensor, link, dim, "parts of the sequence")
    return layouts.unshard(tensor.chunk(world, dim), found, dim) if found.local else tensor


def _place(mesh: Any, layout: Any, length: int) -> tuple[int, TokenLayout]:
    topology = topology_of(mesh)
    world, rank = (1, 0) if topology is None else (topology.world, topology.rank)
    return rank, layout if isinstance(layout, TokenLayout) else make_layout(layout, length, world)

"""Curvature of graphs, and where an attention graph narrows.

A graph is its adjacency matrix [n, n]: boolean, or numbers of which those above 0 are edges; undirected, without loops.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import ContractError

from . import arithmetic
from .stochastic import check_stochastic


class EdgeCurvature(NamedTuple):
    """edges: int64 [edges, 2], the smaller vertex first. curvature: float64 [edges]."""

    edges: Tensor
    curvature: Tensor


class CurvatureBounds(NamedTuple):
    """edges: int64 [edges, 2]. lower, upper: float64 [edges]."""

    edges: Tensor
    lower: Tensor
    upper: Tensor


def _adjacency(graph: Tensor) -> Tensor:
    """0 and 1 in float64. Raises ContractError for what is no undirected graph."""
    if graph.dim() != 2 or graph.shape[0] != graph.shape[1]:
        raise ContractError(f"an adjacency matrix {list(graph.shape)} was given: use [n, n]")
    found = (graph > 0).double()
    if not torch.equal(found, found.T) or bool(found.diagonal().any()):
        raise ContractError(
            "a directed graph, or one with loops, was given: use (a + a.T) with a zero diagonal; attention_graph() "
            "makes one of attention weights"
        )
    return found


def _edges(adjacency: Tensor) -> Tensor:
    return adjacency.triu(1).nonzero()


def attention_graph(weights: Tensor, threshold: float | None = None) -> Tensor:
    """The undirected graph of attention weights [n, n]: an edge where (p_ij + p_ji) / 2 reaches the threshold.

    Args:
        threshold: None: 1 / n, the weight of uniform attention.

    Returns:
        bool [n, n], without loops.
    """
    check_stochastic(weights)
    symmetric = (weights + weights.mT) / 2
    found = symmetric >= (1 / weights.shape[-1] if threshold is None else threshold)
    return found & ~torch.eye(weights.shape[-1], dtype=torch.bool, device=weights.device)


def hops(graph: Tensor) -> Tensor:
    """Length of the shortest path between each two vertices, float64 [n, n]; inf where there is none."""
    adjacency = _adjacency(graph)
    n = len(adjacency)
    found = torch.full((n, n), torch.inf, dtype=torch.float64).fill_diagonal_(0)
    reached, front, step = torch.eye(n, dtype=torch.bool), torch.eye(n, dtype=torch.float64), 0
    while bool(front.any()):
        step += 1
        new = (front @ adjacency > 0) & ~reached
        found[new] = step
        reached |= new
        front = new.double()
    return found


def ollivier(graph: Tensor, *, lazy: bool = False) -> EdgeCurvature:
    """Ollivier's curvature kappa = 1 - W1(m_x, m_y) of each edge xy, exactly: by POT's network simplex where it is
    installed (hal-geometric[transport]), else by scipy's linear programmes, which take some thirty times as long.

    m_x is the random walk's step from x, and W1 the transport distance in hops. `lazy`: the limit of lazy walks that
    stay with probability a -> 1, kappa_a / (1 - a), which is reached at a = 1/2 (Lin, Lu & Yau 2011).

    Source: Ollivier 2009, Ricci curvature of Markov chains on metric spaces.
    """
    adjacency, distance = _adjacency(graph), hops(graph)
    walk = adjacency / adjacency.sum(1, keepdim=True).clamp_min(1)
    if lazy:
        walk = (walk + torch.eye(len(walk), dtype=walk.dtype)) / 2
    edges = _edges(adjacency)
    curvature = torch.tensor([1 - _w1(walk[x], walk[y], distance) for x, y in edges.tolist()], dtype=torch.float64)
    return EdgeCurvature(edges, curvature * 2 if lazy else curvature)


def _w1(a: Tensor, b: Tensor, distance: Tensor) -> float:
    """The transport distance between two measures of equal mass."""
    moved = a - b  # mass that both have stays
    supply, demand = (moved > 1e-15).nonzero()[:, 0], (moved < -1e-15).nonzero()[:, 0]
    if not len(supply):
        return 0.0
    cost = distance[supply][:, demand]
    rows, columns = moved[supply], -moved[demand]
    if len(supply) == 1 or len(demand) == 1:
        return float((cost * rows.unsqueeze(1) * columns / moved.clamp_min(0).sum()).sum())
    columns = columns / columns.sum() * rows.sum()
    try:
        import ot
    except ImportError:
        return _programme(cost, rows, columns)
    return float(ot.emd2(rows.numpy(), columns.numpy(), cost.contiguous().numpy()))


def _programme(cost: Tensor, rows: Tensor, columns: Tensor) -> float:
    try:
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, eye_array, kron, vstack
    except ImportError as missing:
        raise ContractError("exact curvature needs scipy: pip install 'hal-geometric[graph]'") from missing
    m, n = cost.shape
    sums: Any = vstack([kron(eye_array(m), csr_array([[1.0] * n])), kron(csr_array([[1.0] * m]), eye_array(n))])
    given = torch.cat([rows, columns]).numpy()
    found = linprog(cost.flatten().numpy(), A_eq=sums, b_eq=given, method="highs")
    if not found.success:
        raise ContractError(f"the transport problem was not solved ({found.message}): use a connected graph")
    return float(found.fun)


def jost_liu(graph: Tensor) -> CurvatureBounds:
    """Bounds of `ollivier` (not lazy) from degrees d and triangles t = (A A)_xy: one matrix product.

    lower = -(1 - 1/d_x - 1/d_y - t / min d)+ - (1 - 1/d_x - 1/d_y - t / max d)+ + t / max d, upper = t / max d, where
    ()+ is the positive part.

    Source: Jost & Liu 2014, Ollivier's Ricci curvature, local clustering and curvature-dimension inequalities,
    theorem 3 and proposition 2.
    """
    adjacency = _adjacency(graph)
    degree, triangles, edges = adjacency.sum(1), adjacency @ adjacency, _edges(adjacency)
    dx, dy = degree[edges[:, 0]], degree[edges[:, 1]]
    t = triangles[edges[:, 0], edges[:, 1]]
    least, most = torch.minimum(dx, dy), torch.maximum(dx, dy)
    rest = 1 - 1 / dx - 1 / dy
    lower = -(rest - t / least).clamp_min(0) - (rest - t / most).clamp_min(0) + t / most
    return CurvatureBounds(edges, lower, t / most)


def gauss_bonnet(graph: Tensor) -> Tensor:
    """Vertex curvature 1 - degree / 2 + triangles / 3, float64 [n]: its sum is V - E + T, the Euler characteristic of
    vertices, edges and triangles (Knill 2011, cut off after triangles).
    """
    adjacency = _adjacency(graph)
    degree = adjacency.sum(1)
    triangles = ((adjacency @ adjacency) * adjacency).sum(1) / 2
    return 1 - degree / 2 + triangles / 3


def bottlenecks(graph: Tensor, count: int = 10, *, exact: bool = False) -> EdgeCurvature:
    """The edges of lowest curvature, where messages between parts of the graph are squeezed (Topping et al. 2022).

    Args:
        exact: by `ollivier`; otherwise by the lower bound of `jost_liu`.
    """
    found = ollivier(graph) if exact else EdgeCurvature(*jost_liu(graph)[:2])
    order = found.curvature.sort(stable=True).indices[:count]
    return EdgeCurvature(found.edges[order], found.curvature[order])


class Diagnosis(NamedTuple):
    """What `diagnose` finds.

    Attributes:
        edges, curvature: of lowest curvature first, as `bottlenecks` gives them.
        second: magnitude of the weights' second eigenvalue: in the end, rows become alike by this factor a step.
        halving: steps of attention alone in which the rows' differences halve, log 2 / -log second; inf where parts
            never meet.
    """

    edges: Tensor
    curvature: Tensor
    second: float
    halving: float


def diagnose(weights: Tensor, count: int = 3, *, threshold: float | None = None, exact: bool = False) -> Diagnosis:
    """Bottlenecks and over-smoothing of attention weights [n, n].

    Args:
        count: edges at most. threshold: of `attention_graph`. exact: of `bottlenecks`.

    Raises:
        ContractError: weights whose rows do not sum to 1.
    """
    narrow = bottlenecks(attention_graph(weights, threshold), count, exact=exact)
    second = float(arithmetic.second_eigenvalue(weights))
    halving = math.inf if second >= 1 else math.log(2) / -math.log(second) if second > 0 else 0.0
    return Diagnosis(*narrow, second, halving)

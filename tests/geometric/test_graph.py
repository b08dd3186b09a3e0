"""Curvature of graphs whose curvature is known, and the bounds that need no programme."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hal_geometric import graph
from torch import Tensor

from hal_core import ContractError

pytest.importorskip("scipy")


def of_edges(n: int, edges: list[tuple[int, int]]) -> Tensor:
    found = torch.zeros(n, n)
    for a, b in edges:
        found[a, b] = found[b, a] = 1
    return found


def complete(n: int) -> Tensor:
    return torch.ones(n, n) - torch.eye(n)


def torus(n: int) -> Tensor:
    at = lambda i, j: i % n * n + j % n  # noqa: E731
    cells = itertools.product(range(n), repeat=2)
    return of_edges(n * n, [(at(i, j), at(*other)) for i, j in cells for other in ((i + 1, j), (i, j + 1))])


def cube(n: int) -> Tensor:
    return of_edges(1 << n, [(a, a ^ (1 << k)) for a in range(1 << n) for k in range(n)])


def tree(depth: int) -> Tensor:
    """Every inner vertex has three neighbours."""
    edges, front, count = [], [0], 1
    for level in range(depth):
        new = []
        for at in front:
            for _ in range(3 if level == 0 else 2):
                edges.append((at, count))
                new.append(count)
                count += 1
        front = new
    return of_edges(count, edges)


def barbell(n: int) -> Tensor:
    found = torch.block_diag(complete(n), complete(n))
    found[n - 1, n] = found[n, n - 1] = 1
    return found


@pytest.mark.parametrize(
    ("name", "adjacency", "plain", "lazy"),
    [("K6", complete(6), 0.8, 1.2), ("torus", torus(6), 0.0, 0.0), ("Q4", cube(4), 0.0, 0.5)],
)
def test_symmetric_graphs_have_their_curvature(name: str, adjacency: Tensor, plain: float, lazy: float) -> None:
    for given, want in ((False, plain), (True, lazy)):
        found = graph.ollivier(adjacency, lazy=given)
        assert len(found.curvature) == int(adjacency.sum()) // 2
        assert float((found.curvature - want).abs().max()) <= 1e-12


def test_inner_edges_of_a_cubic_tree_and_a_barbells_bridge_are_negative() -> None:
    edges, curvature = graph.ollivier(tree(4))
    inner = curvature[(edges < 10).all(1)]
    assert torch.allclose(inner, torch.full_like(inner, -2 / 3))
    edges, curvature = graph.ollivier(barbell(8))
    bridge = (edges == torch.tensor([7, 8])).all(1)
    assert float(curvature[bridge]) == pytest.approx(-1.5, abs=1e-12)
    assert float(curvature[~bridge].min()) >= 0.75 - 1e-12


def test_the_bottleneck_of_a_barbell_is_its_bridge() -> None:
    for exact in (False, True):
        found = graph.bottlenecks(barbell(6), 1, exact=exact)
        assert found.edges.tolist() == [[5, 6]]


def test_bounds_hold_on_random_graphs_and_vertex_curvature_adds_up(seed: int) -> None:
    generator, checked = torch.Generator().manual_seed(seed), 0
    for n, share in ((8, 0.4), (12, 0.3), (14, 0.5)):
        while True:
            drawn = (torch.rand(n, n, generator=generator) < share).float().triu(1)
            adjacency = drawn + drawn.T
            if bool(graph.hops(adjacency).isfinite().all()):
                break
        exact, bounds = graph.ollivier(adjacency), graph.jost_liu(adjacency)
        assert bool((bounds.lower <= exact.curvature + 1e-9).all() and (exact.curvature <= bounds.upper + 1e-9).all())
        checked += len(exact.curvature)
        triangles = float(torch.linalg.matrix_power(adjacency.double(), 3).diagonal().sum()) / 6
        want = n - float(adjacency.sum()) / 2 + triangles
        assert float(graph.gauss_bonnet(adjacency).sum()) == pytest.approx(want, abs=1e-9)
    assert checked > 60


def test_attention_weights_become_a_graph() -> None:
    p = torch.tensor([[0.8, 0.2, 0.0], [0.5, 0.2, 0.3], [0.0, 0.4, 0.6]])
    assert graph.attention_graph(p).nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(ContractError, match="a directed graph"):
        graph.jost_liu(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ContractError, match="rows are off by up to"):
        graph.attention_graph(torch.ones(3, 3))


def test_both_solvers_of_the_transport_problem_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ot")
    drawn = torch.rand(18, 18, generator=torch.Generator().manual_seed(seed)) < 0.3
    adjacency = (drawn | drawn.mT | torch.eye(18, dtype=torch.bool).roll(1, 0)).double()
    adjacency = torch.maximum(adjacency, adjacency.mT).fill_diagonal_(0)
    by_pot = graph.ollivier(adjacency).curvature
    monkeypatch.setitem(sys.modules, "ot", None)  # its import fails
    assert torch.allclose(by_pot, graph.ollivier(adjacency).curvature, atol=1e-12, rtol=0)

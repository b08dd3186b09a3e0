"""Torch's own checks of the operator and of the gradients, on the interpreted device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted_device import InterpretedBackend
from torch import Tensor

import hal_core as hal

NAME = "interpreted"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    hal.register(InterpretedBackend(), name=NAME)
    yield
    hal.unregister(NAME)


def draw(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, 2, n, 4, generator=generator).to(dtype).requires_grad_() for n in (3, 5, 5)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "softcap": 3.0},
        {"window": (2, 1), "return_lse": True},
        {"dropout_p": 0.3, "rng": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_pass_gradcheck_in_float64(generator: torch.Generator, options: dict[str, Any], masked: bool) -> None:
    mask = [torch.randn(1, 2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()] if masked else []

    def call(*given: Tensor) -> Any:
        found = hal.attention(*given, backend=NAME, **options)
        return tuple(found) if options.get("return_lse") else found

    assert torch.autograd.gradcheck(call, (*draw(generator, torch.float64), *mask), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("lse", [False, True])
def test_the_operator_passes_opcheck(generator: torch.Generator, lse: bool) -> None:
    operator: Any = None
    seen: list[tuple[Any, ...]] = []

    def catch(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal operator
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        values = dict(zip(placeholders, inputs, strict=True))
        (node,) = [n for n in graph.graph.nodes if str(n.target).startswith(f"hal.{NAME}")]
        operator = node.target
        seen.append(tuple(values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args))
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(
        lambda *t: hal.attention(*t, is_causal=True, return_lse=lse, backend=NAME), backend=catch, fullgraph=True
    )
    call(*draw(generator, torch.float32))
    torch.library.opcheck(operator, seen[0])

"""torch.jit.trace records hal.attention as one operator; what cannot be recorded is refused by a sentence."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeBackend, draw

import hal_core as hal
from hal_core import ContractError
from hal_core.testing import reference, reference_gradients, relative_error

Fake = Callable[..., FakeBackend]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch.jit is deprecated and says so; a warning that data were taken for a constant fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


class Layer(torch.nn.Module):
    """Attention between two weights, as in a model."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before, self.after, self.options = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), options

    def forward(self, query: Any, key: Any, value: Any) -> Any:
        return self.after(hal.attention(self.before(query), key, value, enable_gqa=True, **self.options))


@pytest.mark.parametrize("autograd", ["native", "explicit"])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (2, None), "softcap": 3.0}, {"scale": 0.3}])
def test_a_traced_module_computes_new_data_and_new_lengths(
    fake: Fake, generator: torch.Generator, autograd: str, options: dict[str, Any]
) -> None:
    fake("alpha", time=1e-15, autograd=autograd)
    layer = Layer(**options)
    traced = torch.jit.trace(layer, tuple(draw(generator)))
    for len_q, len_k in ((7, 7), (5, 9)):
        tensors = draw(generator, len_q=len_q, len_k=len_k)
        query = layer.before(tensors[0])
        want = layer.after(reference(query, *tensors[1:], enable_gqa=True, **options).out.float())
        assert relative_error(traced(*tensors), want) <= 1e-5


@pytest.mark.parametrize("autograd", ["native", "explicit"])
@pytest.mark.parametrize("traced_with_gradients", [True, False])
def test_a_traced_call_has_the_gradients_that_its_tensors_ask_for_when_it_runs(
    fake: Fake, generator: torch.Generator, autograd: str, traced_with_gradients: bool
) -> None:
    fake("alpha", time=1e-15, autograd=autograd)

    def call(query: Any, key: Any, value: Any) -> Any:
        return hal.attention(query, key, value, is_causal=True, enable_gqa=True)

    traced = torch.jit.trace(call, tuple(t.requires_grad_(traced_with_gradients) for t in draw(generator)))
    tensors = draw(generator)
    leaves = [tensors[0].requires_grad_(), tensors[1], tensors[2].requires_grad_()]
    grad_out = torch.randn(tensors[0].shape, generator=generator)
    for _ in range(3):  # the profiling executor replaces the graph after two runs
        for leaf in leaves:
            leaf.grad = None
        traced(*leaves).backward(grad_out)
    wide = [leaf.detach().requires_grad_() for leaf in leaves]
    want = reference_gradients(*wide, grad_out=grad_out, is_causal=True, enable_gqa=True)
    assert relative_error(leaves[0].grad, want.query) <= 1e-5
    assert relative_error(leaves[2].grad, want.value) <= 1e-5
    assert leaves[1].grad is None


def test_a_traced_call_draws_dropout_anew(fake: Fake, generator: torch.Generator) -> None:
    fake("alpha", time=1e-15)
    tensors = draw(generator)
    traced = torch.jit.trace(
        lambda q, k, v: hal.attention(q, k, v, dropout_p=0.5, enable_gqa=True), tuple(tensors), check_trace=False
    )
    assert not torch.equal(traced(*tensors), traced(*tensors))


def test_a_traced_module_is_saved_and_loaded_in_another_process(
    cpu: str, generator: torch.Generator, tmp_path: Path
) -> None:
    layer, tensors = Layer(), draw(generator)
    torch.jit.save(torch.jit.trace(layer, tuple(tensors)), tmp_path / "layer.pt")
    tensors = draw(generator)
    torch.save([*tensors, layer(*tensors)], tmp_path / "data.pt")
    script = (
        "import sys, torch, hal_core.frontend.torch_ops\n"
        "*tensors, want = torch.load(sys.argv[2])\n"
        "print(torch.allclose(torch.jit.load(sys.argv[1])(*tensors), want, atol=1e-6))"
    )
    paths = [str(tmp_path / name) for name in ("layer.pt", "data.pt")]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"], done.stderr


def test_a_traced_call_runs_under_the_selection_it_was_traced_under(fake: Fake, generator: torch.Generator) -> None:
    one, two = fake("one"), fake("two")
    tensors = draw(generator)
    with hal.use("two"):
        traced = torch.jit.trace(Layer(), tuple(tensors))
        before = len(two.ran)
        traced(*tensors)
        assert len(two.ran) == before + 1
    with pytest.raises(RuntimeError, match=r"under another hal\.use"), hal.use("one"):  # TorchScript wraps the error
        traced(*tensors)
    assert not one.ran


def test_a_bound_call_cannot_be_traced(fake: Fake, generator: torch.Generator) -> None:
    fake("alpha", time=1e-15)
    tensors = draw(generator)
    bound = hal.bind(*tensors, enable_gqa=True)
    bound(*tensors)  # and not either after a call whose shapes it has accepted
    with pytest.raises(ContractError, match=r"torch\.jit\.trace met a bound call"):
        torch.jit.trace(lambda q, k, v: bound(q, k, v), tuple(tensors))


def test_a_symbolic_trace_is_refused_by_a_sentence() -> None:
    with pytest.raises(
        ContractError, match=r"query is a Proxy of torch\.fx: trace with torch\.export or torch\.compile"
    ):
        torch.fx.symbolic_trace(Layer())

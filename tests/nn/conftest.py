"""Pairs of models on eager and on hal attention."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hal_nn  # noqa: E402

import hal_core as hal  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from fakes import FakeBackend, full  # noqa: E402

hal_nn.register_huggingface()


def relative_error(got: Any, want: Any) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def build(kind: Any, config: Any, attention: str, seed: int) -> Any:
    """A model with random weights and a config of its own."""
    torch.manual_seed(seed)
    own = copy.deepcopy(config)
    own._attn_implementation = attention
    return kind(own).eval()


@pytest.fixture
def pair(seed: int) -> Callable[..., tuple[Any, Any]]:
    """(eager, hal) of one class and config: equal weights, separate configs."""

    def make(kind: Any, config: Any) -> tuple[Any, Any]:
        eager, ours = build(kind, config, "eager", seed), build(kind, config, "hal", seed)
        assert eager.config is not ours.config
        assert eager.config._attn_implementation == "eager"
        assert ours.config._attn_implementation == "hal"
        for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        return eager, ours

    return make


@pytest.fixture
def error() -> Callable[[Any, Any], float]:
    """||got - want|| / ||want||."""
    return relative_error


@pytest.fixture
def device() -> Iterator[Callable[..., str]]:
    """device("alpha", masks=...): registers a simulated device with these capabilities for a test; gives its id."""
    names: list[str] = []

    def add(name: str, **capabilities: Any) -> str:
        hal.register(FakeBackend(name, fidelity="simulated", capabilities=full(**capabilities)))
        names.append(name)
        return f"{name}:0"

    yield add
    for name in names:
        hal.unregister(name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""A router on fake devices whose times a test sets: no clock of this machine decides anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import hal_router  # noqa: E402
from hal_router import control  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core.frontend import execution  # noqa: E402
from hal_core.plugin_api import LoadFailure, registry  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from fakes import FakeBackend, FakeSession, full  # noqa: E402


class Clock:
    """Seconds that only a test and its fake devices let pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which calls are timed."""
    found = Clock()
    monkeypatch.setattr(execution, "perf_counter", found)
    return found


@pytest.fixture
def device(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeBackend]]:
    """device(name, estimate, takes): a fake device. Its attribute `takes(request)` gives the seconds that a call lets
    pass, and `error` is what a call raises, where it is set.
    """
    names: list[str] = []
    for real in hal.devices():  # this machine's own devices take no time by the fake clock
        monkeypatch.setitem(registry.avoided, real.id, LoadFailure(real.id, "", "test", "a test has its own devices"))
    registry.changed()

    class Timed(FakeSession):
        def compute_attention(self, *given: Any, **more: Any) -> Any:
            backend: Any = self.backend
            clock.now += backend.takes(given[0][3])
            if backend.error is not None:
                raise backend.error
            return super().compute_attention(*given, **more)

    def make(name: str, estimate: Any, takes: Any = None, **traits: Any) -> FakeBackend:
        backend: Any = FakeBackend(name, time=estimate, open=Timed, **({"capabilities": full()} | traits))
        if takes is None:  # the clock advances by what the device itself says, unless a test says otherwise
            takes = lambda request: float(estimate)  # noqa: E731
        backend.takes = takes if callable(takes) else lambda request: float(takes)
        backend.error = None
        hal.register(backend, name=name)
        names.append(name)
        return backend  # type: ignore[no-any-return]

    torch.set_num_threads(1)
    yield make
    for name in names:
        hal.unregister(name)
    monkeypatch.undo()
    registry.changed()


@pytest.fixture
def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The process's router, enabled with an empty cache folder."""
    monkeypatch.setenv("HAL_CACHE", str(tmp_path))
    hal_router.enable()
    yield control.router
    hal_router.disable()


@pytest.fixture
def tensors() -> Callable[..., tuple[Any, Any, Any]]:
    """tensors(length): query, key and value of [1, 2, length, 8]."""

    def make(length: int = 16) -> tuple[Any, Any, Any]:
        drawn = torch.Generator().manual_seed(length)
        return tuple(torch.randn(1, 2, length, 8, generator=drawn) for _ in range(3))  # type: ignore[return-value]

    return make

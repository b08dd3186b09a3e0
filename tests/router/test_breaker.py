"""Devices that fail, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hal_router
import pytest
import torch
from hal_router.breaker import Breakers, is_device_fault

import hal_core as hal
from hal_core.plugin_api import registry


class Later:
    """Timers that a test lets ring."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, function: Callable[[], None]) -> None:
        self.waiting.append((seconds, function))

    def ring(self) -> float:
        seconds, function = self.waiting.pop(0)
        function()
        return seconds


@pytest.fixture
def later(router: Any) -> Later:
    router.breakers.later = Later()
    return router.breakers.later  # type: ignore[no-any-return]


def test_a_failing_device_is_gone_round_and_taken_again_after_a_probe(
    device: Any, router: Any, later: Later, tensors: Any
) -> None:
    first = device("first", 1e-6)
    device("second", 5e-6)
    q, k, v = tensors()
    hal.attention(q, k, v)
    assert hal.explain(q, k, v).chosen == "first:0"
    first.error = OSError("the link is down")
    with pytest.raises(OSError, match="link is down"):
        hal.attention(q, k, v)
    assert hal_router.state()["breakers"]["first:0"]["state"] == "open"
    assert hal.explain(q, k, v).chosen == "second:0"
    hal.attention(q, k, v)
    with hal.prefer(["first", "second"]):
        assert hal.explain(q, k, v).chosen == "second:0"
    with pytest.raises(OSError, match="link is down"):
        hal.attention(q, k, v, backend="first")
    assert later.ring() == 1.0  # the probe fails: twice the time
    assert hal_router.state()["breakers"]["first:0"]["state"] == "open"
    first.error = None
    assert later.ring() == 2.0
    assert hal_router.state()["breakers"]["first:0"]["state"] == "closed"
    assert "first:0" not in registry.avoided
    assert hal.explain(q, k, v).chosen == "first:0"


def test_doctor_and_explain_show_an_open_breaker(device: Any, router: Any, later: Later, tensors: Any) -> None:
    from hal_router.plugin import hal_doctor

    first = device("first", 1e-6)
    device("second", 5e-6)
    assert hal_doctor() == []
    first.error = RuntimeError("device lost")
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="device lost"):
        hal.attention(q, k, v)
    [table] = hal_doctor()
    assert ["first:0", "open", "RuntimeError: device lost"] in [list(row) for row in table.rows]
    assert "its breaker is open: RuntimeError: device lost" in str(hal.explain(q, k, v))


def test_a_named_call_that_succeeds_closes_the_breaker(device: Any, router: Any, later: Later, tensors: Any) -> None:
    first = device("first", 1e-6)
    device("second", 5e-6)
    q, k, v = tensors()
    first.error = OSError("the link is down")
    with pytest.raises(OSError, match="link"):
        hal.attention(q, k, v)
    first.error = None
    hal.attention(q, k, v, backend="first")
    assert hal_router.state()["breakers"]["first:0"]["state"] == "closed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("VK_ERROR_OUT_OF_DEVICE_MEMORY"),
        hal.MemoryLimitError("x:0", 1, 1, 1),
        hal.ContractError("malformed"),
        hal.UnsupportedError("refused"),
        ValueError("of the caller"),
    ],
)
def test_lack_of_memory_and_wrong_input_open_no_breaker(
    device: Any, router: Any, tensors: Any, error: Exception
) -> None:
    only = device("only", 1e-6)
    only.error = error
    with pytest.raises(type(error)):
        hal.attention(*tensors())
    assert not is_device_fault(error)
    assert "only:0" not in registry.avoided


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), OSError(5), hal.DeviceUnavailableError("gone")]
)
def test_faults_of_a_device_are_known(error: Exception) -> None:
    assert is_device_fault(error)


def test_disabling_closes_every_breaker(device: Any, router: Any, later: Later, tensors: Any) -> None:
    only = device("only", 1e-6)
    only.error = OSError("down")
    with pytest.raises(OSError, match="down"):
        hal.attention(*tensors())
    assert "only:0" in registry.avoided
    hal_router.disable()
    assert "only:0" not in registry.avoided
    later.ring()  # a timer that was set before does nothing
    assert "only:0" not in registry.avoided


def test_waiting_times_double_up_to_a_minute() -> None:
    later = Later()

    def fail(name: str) -> None:
        raise OSError(name)

    breakers = Breakers(lambda: 0.0, later, fail)
    try:
        breakers.failed("none:0", OSError("down"))
        assert [later.ring() for _ in range(9)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    finally:
        breakers.reset()


def test_a_hybrid_module_goes_round_a_failing_device(device: Any, router: Any, later: Later) -> None:
    hal_nn = pytest.importorskip("hal_nn")
    first = device("first", 1e-6)
    device("second", 5e-6)
    module = hal_nn.HybridFlashAttention(16, 2, devices=["first", "second"]).eval()
    hidden = torch.randn(1, 8, 16)
    with torch.no_grad():
        module(hidden)
        first.error = OSError("the link is down")
        with pytest.raises(OSError, match="link"):
            module(hidden)
        module(hidden)
        assert module.last_device_used == "second:0"
        first.error = None
        later.ring()
        module(hidden)
    assert module.last_device_used == "first:0"
    assert (module.degraded, module.recovered) == (1, 1)


def test_a_hot_photonic_chip_is_shown_as_held(router: Any, tensors: Any) -> None:
    photonics = pytest.importorskip("hal_photonics")
    del photonics
    from hal_photonics.simulator.thermal import Signal

    session: Any = hal.session("photonic:0")
    q, k, v = (torch.randn(1, 2, 16, 64) for _ in range(3))
    try:
        session.supervisor.signal(Signal.ABOVE_THROTTLE)
        registry.changed()
        assert hal.explain(q, k, v, allow_simulated=True).chosen != "photonic:0"
        assert "throttled" in hal_router.state()["breakers"]["photonic:0"]["held"]
        session.supervisor.signal(Signal.BELOW_THROTTLE)
        session.supervisor.signal(Signal.BELOW_DERATE)
        registry.changed()
        hal.explain(q, k, v, allow_simulated=True)
        assert hal_router.state()["breakers"]["photonic:0"]["held"] == ""
    finally:
        session.close()

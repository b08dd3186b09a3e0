"""Backends that are registered, opened and closed at run time, in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes import FakeBackend, draw

import hal_core as hal
from hal_core import BackendSpec, DeviceUnavailableError, PluginError, UnknownBackendError
from hal_core.registry import registry

Fake = Callable[..., FakeBackend]


def test_a_backend_registered_at_run_time_is_there_and_unregistered_is_gone(fake: Fake) -> None:
    backend = fake("alpha", count=2)
    assert [d.id for d in registry.find("alpha")] == ["alpha:0", "alpha:1"]
    assert {"alpha:0", "alpha:1"} <= {d.id for d in hal.devices()}
    assert registry.backend_of("alpha:1") is backend
    session = hal.session("alpha:1")
    assert hal.session("alpha:1") is session
    hal.unregister("alpha")
    assert session.closed == 1
    assert "alpha:0" not in {d.id for d in hal.devices()}
    with pytest.raises(UnknownBackendError):
        hal.session("alpha:1")


def test_a_spec_registered_at_run_time_is_imported_when_it_is_needed() -> None:
    hal.register(BackendSpec(name="later", target="fakes:no_such_backend"))
    try:
        with pytest.raises(DeviceUnavailableError, match="no_such_backend"):
            hal.session("later")
    finally:
        hal.unregister("later")


def test_the_name_of_a_backend_comes_from_its_devices() -> None:
    hal.register(FakeBackend("named"))
    assert registry.find("named")[0].id == "named:0"
    hal.unregister("named")
    with pytest.raises(PluginError, match="pass its name"):
        hal.register(FakeBackend("nobody", absent="no card"))


def test_a_name_that_is_taken_is_refused_and_the_first_stays(fake: Fake) -> None:
    first = fake("alpha")
    with pytest.raises(PluginError, match="registered already"):
        hal.register(FakeBackend("alpha"))
    assert registry.backend_of("alpha:0") is first


@pytest.mark.parametrize("name", ["Alpha", "", "a-b", "0a"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises((hal.HalError, ValueError)):
        hal.register(FakeBackend("alpha"), name=name)
    assert "alpha" not in {e.spec.name for e in registry.entries()}


def test_a_bound_call_raises_after_its_backend_is_gone(fake: Fake, generator: torch.Generator) -> None:
    fake("alpha", bound=True)
    tensors = draw(generator)
    call = hal.bind(*tensors, backend="alpha")
    call(*tensors)
    hal.unregister("alpha")
    with pytest.raises(DeviceUnavailableError, match="alpha:0 was unregistered"):
        call(*tensors)
    fake("alpha")
    with pytest.raises(DeviceUnavailableError, match="bind again"):
        call(*tensors)
    hal.attention(*tensors, backend="alpha")


def test_a_decision_does_not_outlive_its_backend(fake: Fake, generator: torch.Generator) -> None:
    tensors = draw(generator)
    slow, fast = fake("slow", time=1e-10), fake("fast", time=1e-12)
    hal.attention(*tensors)
    hal.unregister("fast")
    hal.attention(*tensors)
    faster = fake("faster", time=1e-13)
    hal.attention(*tensors)
    assert [len(b.ran) for b in (slow, fast, faster)] == [1, 1, 1]


def test_the_closest_name_is_suggested(fake: Fake) -> None:
    fake("photonic_toy")
    with pytest.raises(UnknownBackendError, match=r"unknown backend 'fotonic_toy:0' \(did you mean 'photonic_toy'\?\)"):
        registry.find("fotonic_toy:0")
    with pytest.raises(UnknownBackendError, match=r"installed are .*photonic_toy"):
        registry.find("zzzzzz")
    with pytest.raises(UnknownBackendError, match="as text"):
        registry.find(7)  # type: ignore[arg-type]


def test_installed_but_absent_says_so_and_never_unknown(fake: Fake) -> None:
    fake("ghost", absent="no /dev/ghost0: load the kernel module")
    with pytest.raises(DeviceUnavailableError, match="ghost is installed but has no device: no /dev/ghost0"):
        hal.session("ghost")
    with pytest.raises(DeviceUnavailableError, match="load the kernel module"):
        hal.attention(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), backend="ghost:0")
    fake("pair", count=2)
    with pytest.raises(DeviceUnavailableError, match=r"pair:7 is not present: pair has pair:0 or pair:1"):
        hal.session("pair:7")


def open_slowly(backend: Any, device: hal.Device) -> hal.SimpleSession:
    threading.Event().wait(0.02)
    return hal.SimpleSession(lambda *given: given)


def test_a_device_is_opened_once_by_many_threads(fake: Fake) -> None:
    backend = fake("alpha", open=open_slowly)
    backend_sessions: list[object] = []
    with ThreadPoolExecutor(8) as threads:
        backend_sessions = list(threads.map(lambda _: hal.session("alpha"), range(8)))
    assert len(set(map(id, backend_sessions))) == 1
    assert backend.opened == ["alpha:0"]


def test_closing_closes_every_session_once_and_use_opens_again(fake: Fake, generator: torch.Generator) -> None:
    backend, tensors = fake("alpha"), draw(generator)
    want = hal.attention(*tensors, backend="alpha")
    registry.close()
    registry.close()
    assert [s.closed for s in backend.sessions] == [1]
    assert torch.equal(hal.attention(*tensors, backend="alpha"), want)
    assert len(backend.sessions) == 2


def test_a_session_that_its_user_closed_is_opened_again(fake: Fake, generator: torch.Generator) -> None:
    backend, tensors = fake("alpha"), draw(generator)
    want = hal.attention(*tensors, backend="alpha")
    first = hal.session("alpha")
    first.close()
    assert hal.session("alpha") is not first
    assert torch.equal(hal.attention(*tensors, backend="alpha"), want)
    assert len(backend.sessions) == 2


def test_a_device_that_does_not_open_is_passed_over_by_automatic_selection(
    fake: Fake, generator: torch.Generator
) -> None:
    def fails(backend: FakeBackend, device: hal.Device) -> None:
        raise OSError("the card fell off the bus")

    broken, good = fake("broken", time=1e-13, open=fails), fake("good", time=1e-12)
    tensors = draw(generator)
    decision = hal.explain(*tensors)
    assert decision.chosen == "good:0"
    for _ in range(2):
        hal.attention(*tensors)
    assert len(good.ran) == 2
    assert broken.opened == ["broken:0"]
    reasons = [r for c in decision.candidates if c.device.id == "broken:0" for r in c.refusals]
    assert [r.code for r in reasons] == [hal.Code.UNAVAILABLE]
    assert "the card fell off the bus" in reasons[0].offered
    with hal.prefer(["broken", "good"]):
        hal.attention(*tensors)
    assert len(good.ran) == 3
    with pytest.raises(hal.HalError, match="the card fell off the bus"):
        hal.attention(*tensors, backend="broken")
    for _ in range(2):
        with pytest.raises(DeviceUnavailableError, match="the card fell off the bus"):
            hal.session("broken")
    assert broken.opened == ["broken:0"]


@pytest.mark.parametrize("part", ["capabilities", "check", "estimate"])
def test_a_backend_that_raises_is_passed_over(fake: Fake, generator: torch.Generator, part: str) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("the firmware is confused")

    broken, good = fake("broken", time=1e-13, count=2), fake("good", time=1e-12)
    setattr(broken, part, fails)
    tensors = draw(generator)
    for _ in range(2):
        hal.attention(*tensors)
    assert len(good.ran) == 2
    with pytest.raises(hal.HalError, match="the firmware is confused"):
        hal.attention(*tensors, backend="broken")


def test_the_plugin_api_lists_its_names() -> None:
    import hal_core.plugin_api as api

    assert {"SessionBase", "load_calibration", "pooled_size", "attention"} <= set(dir(api))
    assert all(hasattr(api, name) for name in dir(api))

"""Devices that hang: waits that end, calls that are refused meanwhile, and what comes back when the device goes on."""

from __future__ import annotations

from typing import Any

import pytest
from failing_driver import Failing, bound, works

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import reference, relative_error

pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_compute import waits


def test_a_wait_that_never_ends_gives_up_and_the_device_opens_again(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = registry.backend_of(device).open(device)
    run, query = bound(session)
    gpu = session.recorder.gpu
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkWaitSemaphores", 2))  # VK_TIMEOUT
        with pytest.raises(hal.DeviceUnavailableError, match=r"did not compute attention .*16 x 16.* within 300 s"):
            run(query, query, query)
        with pytest.raises(hal.DeviceUnavailableError, match=r"did not end .*compute attention.*close the session"):
            run(query, query, query)
        with pytest.raises(hal.DeviceUnavailableError, match="finish what was queued within 300 s"):
            session.synchronize()
        session.close()
    with registry.backend_of(device).open(device) as again:
        works(again)


def test_a_hanging_device_is_waited_for_once_and_not_for_every_recording(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = registry.backend_of(device).open(device)
    for length in (8, 16, 24):
        run, query = bound(session, length)
        run(query, query, query)
    gpu, patience = session.recorder.gpu, []
    wait = gpu.wait
    monkeypatch.setattr(
        gpu, "wait", lambda number, what, seconds: patience.append(seconds) or wait(number, what, seconds)
    )
    monkeypatch.setattr(gpu, "_lib", Failing(gpu._lib, "vkWaitSemaphores", 2))  # VK_TIMEOUT
    session.close()
    assert [seconds for seconds in patience if seconds] == [waits.GRACE]
    with pytest.raises(hal.DeviceUnavailableError, match="close the session"):
        run(query, query, query)


def test_a_recording_that_hangs_is_not_waited_for_again_and_runs_once_the_device_goes_on(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, query = bound(session)
    run(query, query, query)
    gpu, patience = session.recorder.gpu, []
    wait = gpu.wait
    with monkeypatch.context() as patch:
        patch.setattr(
            gpu, "wait", lambda number, what, seconds: patience.append(seconds) or wait(number, what, seconds)
        )
        patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkWaitSemaphores", 2))  # VK_TIMEOUT
        with pytest.raises(hal.DeviceUnavailableError, match="did not compute attention"):
            run(query, query, query)
        for _ in range(2):
            with pytest.raises(hal.DeviceUnavailableError, match=r"did not end .*compute attention.*close the session"):
                run(query, query, query)
        assert patience == [waits.TIMEOUT, 0.0, 0.0]
    session.synchronize()
    assert relative_error(run(query, query, query), reference(query, query, query).out) <= 1e-5


def test_memory_of_a_recording_that_hung_comes_back_when_the_device_goes_on(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, query = bound(session)
    gpu, pool = session.recorder.gpu, session.recorder.pool
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkWaitSemaphores", 2))  # VK_TIMEOUT
        with pytest.raises(hal.DeviceUnavailableError, match="did not compute attention"):
            run(query, query, query)
    assert pool.in_use > 0
    session.synchronize()
    works(session)
    session.recorder.forget()
    assert pool.in_use == 0


def test_a_wait_lasts_as_long_as_it_was_given_in_pieces_that_can_be_interrupted(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, pieces = session.recorder.gpu, []

    class Slow(Failing):
        def _fail(self, *given: Any) -> int:
            pieces.append(given[2] * 1e-9)
            return 2  # VK_TIMEOUT

    monkeypatch.setattr(gpu, "_spins", False)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Slow(gpu._lib, "vkWaitSemaphores", 2))
        with pytest.raises(hal.DeviceUnavailableError, match=r"did not end within 2.5 s"):
            gpu.wait(0, "end", 2.5)
    assert pieces == pytest.approx([1.0, 1.0, 0.5])


def test_every_wait_is_given_a_time_out(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, seen = session.recorder.gpu, []
    wait = gpu._lib.vkWaitSemaphores

    class Watching(Failing):
        def __getattr__(self, name: str) -> Any:
            assert name not in ("vkDeviceWaitIdle", "vkQueueWaitIdle"), "these wait without end"
            return (
                (lambda *given: seen.append(given[2]) or wait(*given))
                if name == self._name
                else getattr(self._lib, name)
            )

    monkeypatch.setattr(gpu, "_spins", False)
    monkeypatch.setattr(gpu, "_lib", Watching(gpu._lib, "vkWaitSemaphores", 0))
    works(session)
    session.memory.trim()
    session.close()
    assert seen
    assert max(seen) <= 1e9, "Python is not interrupted while the driver waits"

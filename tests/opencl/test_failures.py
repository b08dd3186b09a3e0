"""What goes wrong below: a lost device, memory that the driver has not got, damaged binaries, platforms that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

pytest.importorskip("hal_opencl.backend", exc_type=ImportError)
cl = pytest.importorskip("pyopencl")
from hal_compute import waits  # noqa: E402
from hal_opencl import discovery, memory  # noqa: E402
from hal_opencl.runtime import binaries, engine  # noqa: E402
from hal_opencl.session import OpenClSession  # noqa: E402

HOST_MEMORY, DEVICE_MEMORY, RESOURCES, QUEUE, NOT_AVAILABLE = -6, -4, -5, -36, -2


SOURCE = "__kernel void nothing(__global int *x) { x[0] = 1; }"


class Failing:
    """pyopencl, but for a function that fails with a code."""

    def __init__(self, name: str, code: int) -> None:
        self._name, self._code = name, code

    def __getattr__(self, name: str) -> Any:
        return self._fail if name == self._name else getattr(cl, name)

    def _fail(self, *given: Any, **options: Any) -> None:
        kind = cl.MemoryError if self._code in (HOST_MEMORY, DEVICE_MEMORY, RESOURCES) else cl.LogicError
        raise kind(cl._cl._ErrorRecord(f"cl{self._name}", self._code, ""))


def works(session: Any) -> bool:
    query = torch.randn(1, 2, 40, 32)
    request = hal.AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=40, len_k=40, dim_qk=32, dim_v=32, dtype="float32"
    )
    return relative_error(session.bind(request)(query, query, query), reference(query, query, query).out) <= 1e-5


@pytest.mark.parametrize("code", [NOT_AVAILABLE, RESOURCES, QUEUE])
@pytest.mark.parametrize("name", ["enqueue_nd_range_kernel", "enqueue_marker"])
def test_a_lost_device_is_said_to_be_lost_and_opens_again(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    with OpenClSession(device, discovery.find().handles[device.id]) as session:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "cl", Failing(name, code))
            with pytest.raises(hal.DeviceUnavailableError, match=r"was lost .*: close its session and open it again"):
                works(session)
        with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
            works(session)
        assert session.memory.stats().in_use == 0
    with OpenClSession(device, discovery.find().handles[device.id]) as session:
        assert works(session)


def test_the_registry_opens_a_lost_device_again_once_its_session_is_closed(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, query = hal.session(device.id), torch.randn(1, 2, 16, 32)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "cl", Failing("enqueue_nd_range_kernel", QUEUE))
        with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
            hal.attention(query, query, query, backend=device.id)
    session.close()
    assert hal.session(device.id) is not session
    out = hal.attention(query, query, query, backend=device.id)
    assert relative_error(out, reference(query, query, query).out) <= 1e-5


class Hanging:
    """pyopencl whose programs and markers are said to run until `end` is called."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return self._start if name in ("enqueue_nd_range_kernel", "enqueue_marker") else getattr(cl, name)

    def _start(self, *given: Any) -> Any:
        self._events.append(SimpleNamespace(command_execution_status=cl.command_execution_status.RUNNING))
        return self._events[-1]

    def end(self) -> None:
        for event in self._events:
            event.command_execution_status = cl.command_execution_status.COMPLETE


@pytest.fixture
def hanging(session: OpenClSession, monkeypatch: pytest.MonkeyPatch) -> Hanging:
    """What a session on a device that hangs speaks to; waits give up at once."""
    driver, waited = Hanging(), session.engine.wait
    monkeypatch.setattr(engine, "cl", driver)
    monkeypatch.setattr(waits, "GRACE", 0.01)
    monkeypatch.setattr(session.engine, "wait", lambda what, timeout=0.01, event=None: waited(what, timeout, event))
    return driver


def test_what_still_runs_keeps_its_memory_until_it_ends(
    session: OpenClSession, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(hal.DeviceUnavailableError, match=r"did not compute attention .*40 x 40.* within 0.01 s"):
        works(session)
    kept = [release.__self__ for _, _, release in session.engine._abandoned]
    assert kept
    assert all(lease._views and (lease._shared or lease._regions) for lease in kept)
    with pytest.raises(hal.DeviceUnavailableError, match=r"did not end .*\(compute attention .*close the session"):
        works(session)
    hanging.end()
    monkeypatch.undo()
    assert works(session)
    assert not session.engine._abandoned
    assert not any(lease._views or lease._shared or lease._regions for lease in kept)
    assert session.memory.stats().in_use == 0


def test_a_hanging_device_is_waited_for_once_when_it_is_closed(
    session: OpenClSession, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(hal.DeviceUnavailableError, match="did not compute attention"):
        works(session)
    waited, ended = [], session.engine.end_within

    def wait(*given: Any) -> bool:
        waited.append(given[1])
        return ended(*given)

    monkeypatch.setattr(engine, "_hanging", [])
    monkeypatch.setattr(session.engine, "end_within", wait)
    monkeypatch.setattr(session.engine, "wait", lambda *given, **more: waited.append(given))
    monkeypatch.setattr(session.memory.ring, "trim", lambda: waited.append("the ring"))
    session.close()
    assert waited == [waits.GRACE]
    assert engine._hanging == [session.engine], (
        "its queue is never given back: the driver could wait for it without end"
    )
    assert session.engine._abandoned


@pytest.mark.parametrize(("code", "whose"), [(DEVICE_MEMORY, "device"), (RESOURCES, "device"), (HOST_MEMORY, "host")])
def test_memory_that_the_driver_has_not_got_is_named_and_the_session_stays_usable(
    session: OpenClSession, monkeypatch: pytest.MonkeyPatch, code: int, whose: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "cl", Failing("Buffer", code))
        with pytest.raises(hal.MemoryLimitError, match=rf"out of {whose} memory in clBuffer .*call trim\(\)"):
            works(session)
    assert session.memory.stats().in_use == 0
    assert works(session)


def test_an_error_of_the_driver_names_what_was_asked(session: OpenClSession, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "cl", Failing("enqueue_nd_range_kernel", -54))
        with pytest.raises(hal.DeviceUnavailableError, match=r"could not start .*INVALID_WORK_GROUP_SIZE"):
            works(session)
    assert works(session)


def test_binaries_are_kept_and_a_damaged_one_is_made_anew(
    device: hal.Device, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_contexts", {})  # as in a new process
    with OpenClSession(device, discovery.find().handles[device.id]) as first:
        assert works(first)
    kept = {path: path.read_bytes() for path in (own_cache / "opencl").iterdir()}
    assert kept
    assert {path.suffix for path in kept} == {".program"}
    compiled: list[Any] = []

    def compile_anew(*given: Any) -> Any:
        if len(given) == 2:  # from source; a binary comes with its device
            compiled.append(given)
        return cl.Program(*given)

    monkeypatch.setattr(
        binaries,
        "cl",
        SimpleNamespace(
            Program=compile_anew, Error=cl.Error, program_info=cl.program_info, CompilerWarning=cl.CompilerWarning
        ),
    )
    handle = discovery.find().handles[device.id]
    engine._contexts.clear()
    with OpenClSession(device, handle) as again:
        assert works(again)
    assert not compiled
    for damage in (
        lambda data: data[:-1],
        lambda data: data[:60] + b"\0" + data[61:],
        lambda data: b"",
        lambda data: b"x" * 99,
    ):
        compiled.clear()
        for path, data in kept.items():
            path.write_bytes(damage(data))
        engine._contexts.clear()
        with OpenClSession(device, handle) as again:
            assert works(again)
        assert len(compiled) == len(kept)
        compiled.clear()
        engine._contexts.clear()
        with OpenClSession(device, handle) as again:
            assert works(again)
        assert not compiled


def test_a_compilers_remarks_do_not_reach_the_user(session: OpenClSession, monkeypatch: pytest.MonkeyPatch) -> None:
    class Remarking(cl.Program):  # type: ignore[misc]
        def build(self, *given: Any, **options: Any) -> Any:
            warnings.warn("a remark", cl.CompilerWarning, stacklevel=2)
            return super().build(*given, **options)

    monkeypatch.setattr(binaries, "_source", lambda program: SOURCE)
    monkeypatch.setattr(binaries.cl, "Program", Remarking)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.engine.kernel("any", "nothing").function_name == "nothing"


def test_another_driver_has_files_of_its_own(device: hal.Device, session: OpenClSession) -> None:
    from hal_opencl.runtime.binaries import Programs

    handle = discovery.find().handles[device.id]
    names = ("vendor", "name", "version", "driver_version")
    other = SimpleNamespace(platform=handle.platform, **{name: getattr(handle, name) for name in names})
    here = Programs(None, handle).path("source", ["-DX=1"])
    assert Programs(None, other).path("source", ["-DX=1"]) == here
    other.driver_version += ".1"
    assert Programs(None, other).path("source", ["-DX=1"]) != here
    assert Programs(None, handle).path("source", ["-DX=2"]) != here
    assert Programs(None, handle).path("sauce", ["-DX=1"]) != here


def test_a_cache_that_cannot_be_written_costs_the_cache_alone(
    device: hal.Device, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("HAL_CACHE", str(blocked))
    with OpenClSession(device, discovery.find().handles[device.id]) as session:
        assert works(session)


def made_up(name: str, kind: int, **more: Any) -> Any:
    values = {
        "type": kind,
        "name": name,
        "vendor": "a vendor",
        "extensions": "",
        "max_compute_units": 4,
        "local_mem_size": 1 << 16,
        "preferred_vector_width_float": 4,
        "global_mem_size": 1 << 30,
        "driver_version": "1",
        "available": True,
        "compiler_available": True,
        "platform": SimpleNamespace(name="made up"),
    }
    return SimpleNamespace(**(values | more))


class Broken:
    """A device whose driver answers no question."""

    type = cl.device_type.GPU

    @property
    def available(self) -> bool:
        raise cl.LogicError(cl._cl._ErrorRecord("clGetDeviceInfo", NOT_AVAILABLE, ""))


def found(monkeypatch: pytest.MonkeyPatch, *platforms: Any) -> discovery.Found:
    monkeypatch.setattr(cl, "get_platforms", lambda: list(platforms))
    return discovery.find.__wrapped__()


def test_devices_of_all_platforms_are_found_and_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise cl.RuntimeError(cl._cl._ErrorRecord("clGetDeviceIDs", -1, ""))

    gpu, cpu = made_up("a GPU", cl.device_type.GPU), made_up("a CPU", cl.device_type.CPU)
    idle = made_up("asleep", cl.device_type.GPU, available=False)
    result = found(
        monkeypatch,
        SimpleNamespace(name="first", get_devices=lambda: [cpu, Broken(), idle]),
        SimpleNamespace(name="second", get_devices=fail),
        SimpleNamespace(name="third", get_devices=lambda: [gpu]),
    )
    assert [(d.id, d.model) for d in result.devices] == [("opencl:0", "a GPU"), ("opencl:1", "a CPU")]
    assert result.handles["opencl:0"] is gpu
    assert result.devices[0].fidelity is hal.Fidelity.HARDWARE
    assert "kernel: local-memory tiles" in result.devices[0].features
    assert "kernel: vector rows" in result.devices[1].features


def test_without_pyopencl_the_device_is_absent_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    result = discovery.find.__wrapped__()
    assert not result.devices
    assert "pip install pyopencl" in result.reason


def test_platforms_without_a_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = found(monkeypatch, SimpleNamespace(name="lonely ", get_devices=lambda: [Broken()]))
    assert not result.devices
    assert "lonely" in result.reason
    assert "DEVICE_NOT_AVAILABLE" in result.reason


def test_a_device_is_chosen_by_its_id() -> None:
    """PoCL shows as many devices as it is told to."""
    program = """
import torch, hal_core as hal
ids = [d.id for d in hal.devices() if d.family == "opencl"]
q = torch.randn(1, 1, 8, 32)
for id in ids:
    out = hal.attention(q, q, q, backend=id)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
first, second = (hal.session(id).engine.handle for id in ids[:2])
assert first != second
print(ids)
"""
    if not any("Portable" in d.driver for d in discovery.find().devices):
        pytest.skip("PoCL is not installed; Debian: apt-get install pocl-opencl-icd")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"POCL_DEVICES": "pthread pthread"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'opencl:0', 'opencl:1'" in done.stdout


def test_kernels_are_offered_without_another_devices_plugin() -> None:
    program = (
        "import torch, hal_core as hal\n"
        "print(hal.kernel('reduce_sum', 'opencl:0')(torch.ones(1000)).item(), [d.family for d in hal.devices()])"
    )
    if not discovery.find().devices:
        pytest.skip(discovery.find().reason)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HAL_PLUGINS": "opencl,compute"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1000.0 ['opencl'" in done.stdout

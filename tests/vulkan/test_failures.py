"""What goes wrong below: a lost device, memory that the driver has not got, damaged caches, waits without end."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import commands, recorder  # noqa: E402
from hal_vulkan._vk import logical  # noqa: E402
from hal_vulkan.pipelines import cache_path  # noqa: E402
from hal_vulkan.session import VulkanSession  # noqa: E402

HOST_MEMORY, DEVICE_MEMORY, LOST = -1, -2, -4  # VkResult


class Failing:
    """A driver whose function `name` returns `result` instead of doing anything; a wait for a lost device still waits,
    since this device is not lost and works on."""

    def __init__(self, lib: Any, name: str, result: int) -> None:
        self._lib, self._name, self._result = lib, name, result

    def __getattr__(self, name: str) -> Any:
        if (self._name, name) == ("vkWaitSemaphores", "vkGetSemaphoreCounterValue"):
            return lambda *given: self._result  # what a wait on a card looks at first
        return self._fail if name == self._name else getattr(self._lib, name)

    def _fail(self, *given: Any) -> int:
        if (self._name, self._result) == ("vkWaitSemaphores", LOST):
            self._lib.vkWaitSemaphores(*given)
        return self._result


def bound(session: Any, length: int = 16) -> tuple[Any, torch.Tensor]:
    query = torch.randn(1, 2, length, 32)
    request = hal.AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=length, len_k=length, dim_qk=32, dim_v=32, dtype="float32"
    )
    return session.bind(request), query


def works(session: Any) -> None:
    run, query = bound(session, 24)
    assert relative_error(run(query, query, query), reference(query, query, query).out) <= 1e-5


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["vkQueueSubmit", "vkWaitSemaphores"])
def test_a_lost_device_is_said_to_be_lost_and_opens_again(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, name: str, recorded: bool
) -> None:
    with registry.backend_of(device).open(device) as session:
        run, query = bound(session)
        if recorded:
            run(query, query, query)
        gpu = session.recorder.gpu
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "_lib", Failing(gpu._lib, name, LOST))
            with pytest.raises(hal.DeviceUnavailableError, match=r"was lost .*: close its session and open it again"):
                run(query, query, query)
        with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
            run(query, query, query)
    with registry.backend_of(device).open(device) as session:
        works(session)


def test_a_lost_device_gives_all_its_memory_back(device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "STREAM_FROM", 4096)
    adapter = backend_module.find().adapters[device.id]
    with VulkanSession(
        device, adapter._replace(is_cpu=False)
    ) as session:  # staging, a ring, and memory that is not mapped
        (run, query), (small, few) = bound(session, 64), bound(session, 4)
        run(query, query, query)
        small(few, few, few)
        gpu, pool, staging, ring = (getattr(session.recorder, name) for name in ("gpu", "pool", "staging", "ring"))
        assert min(pool.reserved, staging.reserved, ring.nbytes) > 0
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkQueueSubmit", LOST))
            with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
                run(query, query, query)
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkWaitSemaphores", LOST))
            session.close()
    assert (pool.reserved, staging.reserved, ring.nbytes) == (0, 0, 0)


def test_the_registry_opens_a_lost_device_again_once_its_session_is_closed(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = hal.session(device.id)
    gpu, query = session.recorder.gpu, torch.randn(1, 2, 16, 32)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkQueueSubmit", LOST))
        with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
            hal.attention(query, query, query, backend=device.id)
    hal.session(device.id).close()
    assert hal.session(device.id) is not session
    assert (
        relative_error(hal.attention(query, query, query, backend=device.id), reference(query, query, query).out)
        <= 1e-5
    )


@pytest.mark.parametrize(("result", "whose"), [(DEVICE_MEMORY, "device"), (HOST_MEMORY, "host")])
def test_memory_that_the_driver_has_not_got_is_named_and_the_session_stays_usable(
    session: Any, monkeypatch: pytest.MonkeyPatch, result: int, whose: str
) -> None:
    gpu, (run, query) = session.recorder.gpu, bound(session)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Failing(gpu._lib, "vkAllocateMemory", result))
        with pytest.raises(hal.MemoryLimitError, match=rf"out of {whose} memory in vkAllocateMemory .*call trim\(\)"):
            run(query, query, query)
    assert session.memory.stats().in_use == 0
    works(session)


@pytest.mark.parametrize("name", ["vkCreateBuffer", "vkBindBufferMemory", "vkMapMemory", "vkAllocateCommandBuffers"])
def test_a_call_that_fails_half_way_leaves_nothing_behind(
    session: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpu, (run, query) = session.recorder.gpu, bound(session)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", Failing(gpu._lib, name, DEVICE_MEMORY))
        with pytest.raises(hal.MemoryLimitError, match=name):
            run(query, query, query)
    stats = session.memory.stats()
    assert stats.in_use == 0
    assert stats.pooled in (0, session.recorder.pool.reserved)
    works(session)


class Counting:
    """A driver whose calls are counted, and which may fail in one of them."""

    def __init__(self, lib: Any, failing: str = "", result: int = DEVICE_MEMORY) -> None:
        self._lib, self._failing, self._result, self.called = lib, failing, result, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.called[name] += 1
            return self._result if name == self._failing else getattr(self._lib, name)(*given)

        return call


@pytest.mark.parametrize("failing", ["vkAllocateMemory", "vkBindBufferMemory", "vkMapMemory", "no memory type fits"])
def test_memory_that_is_not_had_leaves_no_buffer_behind(
    session: Any, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    gpu = session.recorder.gpu
    lib = Counting(gpu._lib, failing)
    monkeypatch.setattr(gpu, "_lib", lib)
    if failing == "no memory type fits":
        monkeypatch.setattr(gpu, "_memory_types", SimpleNamespace(memoryTypeCount=0))
    with pytest.raises(hal.HalError):
        gpu.allocate(4096, host=True)
    assert lib.called["vkCreateBuffer"] == lib.called["vkDestroyBuffer"] == 1
    assert lib.called["vkFreeMemory"] == lib.called["vkAllocateMemory"]


@pytest.mark.parametrize("failing", ["PipelineCache", "CommandPool", "Semaphore", "QueryPool", "nothing"])
def test_a_device_that_cannot_be_opened_or_is_closed_leaves_nothing_behind(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ffi, lib = logical.api()
    counting = Counting(lib, f"vkCreate{failing}")
    monkeypatch.setattr(logical, "api", lambda: (ffi, counting))
    if failing == "nothing":
        with registry.backend_of(device).open(device) as session:
            works(session)
    else:
        with pytest.raises(hal.MemoryLimitError, match=f"vkCreate{failing}"):
            registry.backend_of(device).open(device)
    for kind in ("Device", "PipelineCache", "CommandPool", "Semaphore", "QueryPool", "Buffer", "ShaderModule"):
        made = counting.called[f"vkCreate{kind}"] - (kind == failing)
        assert counting.called[f"vkDestroy{kind}"] == made, kind


@pytest.mark.parametrize("failing", ["ComputePipelines", "PipelineLayout", "DescriptorSetLayout", "ShaderModule"])
def test_a_pipeline_that_the_driver_refuses_leaves_nothing_behind(
    session: Any, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    gpu, (run, query) = session.recorder.gpu, bound(session)
    lib = Counting(gpu._lib, f"vkCreate{failing}")
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_lib", lib)
        with pytest.raises(hal.MemoryLimitError, match=f"vkCreate{failing}"):
            run(query, query, query)
    for kind in ("PipelineLayout", "DescriptorSetLayout", "ShaderModule"):
        made = lib.called[f"vkCreate{kind}"] - (kind == failing)
        assert lib.called[f"vkDestroy{kind}"] == made
    works(session)


def test_a_driver_without_room_for_recordings_gets_theirs_back(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    works(session)
    gpu, pool, refused = session.recorder.gpu, session.recorder.pool, []
    create = pool._create

    def once(nbytes: int) -> Any:
        if not refused:
            refused.append(nbytes)
            gpu._check(DEVICE_MEMORY, "vkAllocateMemory", nbytes)
        return create(nbytes)

    monkeypatch.setattr(pool, "_create", once)
    nbytes = session.recorder.pool.reserved
    region = session.recorder.cut(pool, nbytes)  # does not fit the block that there is
    assert refused == [region.size]
    assert session.recorder.kept_bytes == 0
    pool.free(region)
    works(session)


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
    assert patience == [commands.GRACE]
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
        assert patience == [commands.TIMEOUT, 0.0, 0.0]
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


def test_a_clock_that_starts_again_between_two_stamps_still_tells_the_time(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = session.recorder.gpu

    class Stamping(Failing):
        def _fail(self, *given: Any) -> int:
            given[5][0], given[5][1] = 2**36 - 10, 30
            return 0

    monkeypatch.setattr(gpu, "_stamp_bits", 36)
    monkeypatch.setattr(gpu, "_lib", Stamping(gpu._lib, "vkGetQueryPoolResults", 0))
    assert gpu.stamped_seconds() == pytest.approx(40 * gpu.adapter.limits["timestampPeriod"] * 1e-12)


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


@pytest.fixture
def cache(device: hal.Device) -> Path:
    """The file of a pipeline cache that a session wrote."""
    path = cache_path(backend_module.find().adapters[device.id])
    path.unlink(missing_ok=True)
    with registry.backend_of(device).open(device) as session:
        works(session)
    if path.stat().st_size < 64:  # the digest, and the header that every driver must write
        pytest.skip("this driver writes no header before its pipeline cache")
    return path


@pytest.mark.parametrize("damage", ["another driver's", "cut short", "one byte changed", "empty"])
def test_a_cache_that_is_not_this_drivers_or_is_damaged_is_left_alone(
    device: hal.Device, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    good = cache.read_bytes()
    middle = len(good) // 2
    uuid = backend_module.find().adapters[device.id].cache_uuid
    foreign = good[32:].replace(uuid, bytes(255 - byte for byte in uuid))
    bad = {
        "another driver's": sha256(foreign).digest() + foreign,
        "cut short": good[:-7],
        "one byte changed": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "empty": b"",
    }[damage]
    assert bad != good
    cache.write_bytes(bad)
    with registry.backend_of(device).open(device) as session:
        assert session.recorder.gpu.cache_loaded == 0
        works(session)
    cache.write_bytes(good)
    with registry.backend_of(device).open(device) as session:
        assert session.recorder.gpu.cache_loaded > 0


def test_a_cache_folder_that_cannot_be_made_costs_the_cache_alone(session: Any, tmp_path: Path) -> None:
    works(session)
    (tmp_path / "file").touch()
    session.recorder.shaders.save(tmp_path / "file" / "vulkan" / "x.pipelines")


def test_a_tensor_over_the_range_limit_is_refused_by_the_session_too(session: Any) -> None:
    pool = session.recorder.pool
    with pytest.raises(hal.MemoryLimitError, match=f"{pool.largest:,}"):
        session.recorder.cut(pool, pool.largest + 1)
    works(session)


def test_a_dtype_that_no_shader_has_is_refused_with_what_is_offered(device: hal.Device) -> None:
    query = torch.randn(1, 1, 8, 32, dtype=torch.float64)
    with pytest.raises(hal.UnsupportedError, match=r"dtype +float64 asked, .*float16.* offered"):
        hal.attention(query, query, query, backend=device.id)
    with VulkanSession(device, backend_module.find().adapters[device.id]) as session:
        works(session)

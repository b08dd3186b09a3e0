"""What goes wrong below: a lost device, memory that the driver has not got, damaged caches."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_driver import DEVICE_MEMORY, HOST_MEMORY, LOST, Counting, Failing, bound, works

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import discovery  # noqa: E402
from hal_vulkan.runtime import open_device  # noqa: E402
from hal_vulkan.runtime._vk import logical  # noqa: E402
from hal_vulkan.runtime.pipelines import cache_path  # noqa: E402
from hal_vulkan.session import VulkanSession  # noqa: E402


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
    monkeypatch.setattr(open_device, "STREAM_FROM", 4096)
    adapter = discovery.find().adapters[device.id]
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


@pytest.mark.parametrize("name", ["vkCreateBuffer", "vkBindBufferMemory", "vkAllocateCommandBuffers"])
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


@pytest.mark.parametrize("failing", ["Device", "PipelineCache", "CommandPool", "Semaphore", "QueryPool", ""])
def test_a_device_that_cannot_be_opened_or_is_closed_leaves_nothing_behind(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    ffi, lib = logical.api()
    counting = Counting(lib, f"vkCreate{failing}")
    monkeypatch.setattr(logical, "api", lambda: (ffi, counting))
    if not failing:
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


@pytest.fixture
def cache(device: hal.Device) -> Path:
    """The file of a pipeline cache that a session wrote."""
    path = cache_path(discovery.find().adapters[device.id])
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
    uuid = discovery.find().adapters[device.id].cache_uuid
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
    with VulkanSession(device, discovery.find().adapters[device.id]) as session:
        works(session)

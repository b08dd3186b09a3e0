"""Memory that another interface of the same card sees: CUDA on a card that has it, a file mapping of lavapipe's
elsewhere.
"""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_compute import waits  # noqa: E402
from hal_vulkan import discovery  # noqa: E402
from hal_vulkan.runtime.sharing import SharedCard  # noqa: E402
from hal_vulkan.session import VulkanSession  # noqa: E402


class MappedCard(SharedCard):
    """Lavapipe's exported memory mapped once more, as CUDA maps a graphics card's. Keeps the order of what happened."""

    kind = place = "cpu"

    def __init__(self, gpu: Any) -> None:
        super().__init__(gpu)
        self.events: list[str] = []

    def _import(self, block: Any) -> torch.Tensor:
        self.events.append("import")
        page = mmap.PAGESIZE  # lavapipe has its own notes on the first
        return torch.frombuffer(mmap.mmap(self._gpu.export(block), block.nbytes, offset=page), dtype=torch.uint8)

    def _alias(self, bytes_there: torch.Tensor, ended: Callable[[], None]) -> torch.Tensor:
        array = bytes_there.numpy().view(Traced)
        weakref.finalize(array, ended).atexit = False
        return torch.from_numpy(array)

    def _drop(self, block: Any) -> None:
        self.events.append("drop")

    def enter(self) -> None:
        self.events.append("enter")

    def run(self, commands: Any, what: str, timeout: float) -> None:
        self._gpu.wait(self._gpu.submit(commands), what, timeout)
        self.events.append("run")

    def settle(self, timeout: float) -> bool:
        self.events.append("settle")
        return True

    def close(self) -> None:
        self.events.append("close")


class Traced(np.ndarray):
    """An array that can be followed to its end."""


@pytest.fixture(params=["mapped", "cuda"])
def session(request: pytest.FixtureRequest, device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A session whose tensors can be shared, on each kind of card."""
    adapter = discovery.find().adapters[device.id]
    if request.param == "cuda":
        index, why = discovery.cuda_index(adapter)
        if index is None:
            pytest.skip(f"{device.id} shares no memory with CUDA: {why}")
        with VulkanSession(device, adapter) as opened:
            yield opened
    else:
        if "memory_export" not in adapter.features or not adapter.is_cpu:
            pytest.skip("this device's exported memory is no file that a process can map")
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        with VulkanSession(attrs.evolve(device, reads=("cpu", "cuda:0")), adapter._replace(is_cpu=False)) as opened:
            opened.recorder._card = MappedCard(opened.recorder.gpu)
            yield opened


def place(session: Any) -> str:
    return str(session.recorder.card.place)


def asked(query: torch.Tensor, key: torch.Tensor, **options: Any) -> hal.AttentionRequest:
    (batch, heads, len_q, dim), dtype = query.shape, str(query.dtype).removeprefix("torch.")
    return hal.AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=key.shape[1],
        len_q=len_q,
        len_k=key.shape[2],
        dim_qk=dim,
        dim_v=dim,
        dtype=dtype,
        **options,
    )


def fill(seed: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Draw the tensors' values; gives them in float64 on the host."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(t.shape, generator=generator) for t in tensors]
    for tensor, values in zip(tensors, drawn, strict=True):
        tensor.copy_(values)
    return [t.double().cpu() for t in tensors]


def test_tensors_in_the_devices_memory_are_read_and_written_where_they_lie(session: Any, seed: int) -> None:
    memory = session.memory
    buffers = [memory.allocate((2, 2, 33, 32), "float32") for _ in range(4)]
    query, key, value, out = (memory.to_torch(buffer) for buffer in buffers)
    assert str(query.device) == place(session)
    prepared, made = session.prepare_attention(query, key, value, request=asked(query, key)), []
    begin = session.recorder.gpu.begin
    session.recorder.gpu.begin = lambda *given: made.append(given) or begin(*given)
    for n in range(3):
        want = reference(*fill(seed + n, query, key, value)).out
        found = session.compute_attention(prepared, out=out).out
        assert found.data_ptr() == out.data_ptr()
        assert relative_error(out.cpu(), want) <= 1e-5
    assert memory.stats().copies == 0
    assert len(made) == 1
    for buffer in buffers:
        memory.free(buffer)


def test_a_result_of_another_dtype_is_turned_into_it_where_it_lies(session: Any, seed: int) -> None:
    memory = session.memory
    query = memory.to_torch(memory.allocate((1, 2, 16, 32), "float16"))
    out = memory.to_torch(memory.allocate((1, 2, 16, 32), "float32"))
    (wide,) = fill(seed, query)
    prepared = session.prepare_attention(query, query, query, request=asked(query, query))
    for _ in range(2):  # recorded, and run again
        assert session.compute_attention(prepared, out=out.fill_(0)).out is out
        assert relative_error(out.cpu(), reference(wide, wide, wide).out) <= 2e-3


def test_other_tensors_of_the_card_are_copied_there_and_counted(session: Any, seed: int) -> None:
    query, key, value = (torch.empty(1, 2, 21, 40, device=place(session)) for _ in range(3))
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    want = reference(*fill(seed, query, key, value)).out
    request = asked(query, key)
    for n in range(1, 3):
        out = session.bind(request)(query, key, value)
        assert str(out.device) == place(session)
        assert relative_error(out.cpu(), want) <= 1e-5
        assert session.memory.stats().copies == 4 * n
    assert session.recorder.staging.allocations == 0, "nothing passed through the host"


def test_a_slice_of_shared_memory_that_no_shader_can_read_is_copied(session: Any, seed: int) -> None:
    whole = session.memory.to_torch(session.memory.allocate((1, 2, 64, 33), "float32"))
    (wide,) = fill(seed, whole)
    tensor, values = whole[..., 1:], wide[..., 1:]  # neither contiguous nor aligned
    out = session.bind(asked(tensor, tensor))(tensor, tensor, tensor)
    assert relative_error(out.cpu(), reference(values, values, values).out) <= 1e-5
    assert session.memory.stats().copies > 0


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_gradients_and_the_log_sum_exp_come_from_the_card_too(session: Any, boolean: bool, seed: int) -> None:
    query, key, value, grad = (torch.empty(1, 2, 19, 32, device=place(session)) for _ in range(4))
    mask = torch.empty(1, 1, 19, 19, device=place(session))
    wide = fill(seed, query, key, value, grad, mask)
    mask, dense = (mask > -1, wide[4] > -1) if boolean else (mask, wide[4])
    kind = hal.MaskKind.BOOLEAN if boolean else hal.MaskKind.ADDITIVE
    request = asked(query, key, lse=True, mask=kind, grads=frozenset("qkv"))
    prepared = session.prepare_attention(query, key, value, request=request)
    out, lse = session.compute_attention(prepared, mask)
    grads = session.compute_attention_backward(prepared, out, lse, grad, mask)
    want = reference(*wide[:3], dense)
    assert relative_error(out.cpu(), want.out) <= 1e-5
    assert relative_error(lse.cpu(), want.lse) <= 1e-5
    leaves = [t.requires_grad_() for t in wide[:3]]
    torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=dense).backward(wide[3])
    assert all(relative_error(x.cpu(), leaf.grad) <= 2e-5 for x, leaf in zip(grads, leaves, strict=False))


def test_memory_stays_while_somebody_has_a_tensor_of_it_and_comes_back_then(session: Any) -> None:
    memory = session.memory
    buffer = memory.allocate((64, 64), "float32")
    consumer = torch.from_dlpack(buffer).fill_(7)
    assert bool((memory.to_torch(buffer) == 7).all())
    memory.free(buffer)
    assert memory.stats().in_use == 0
    held = session.recorder.pool.in_use
    other = memory.allocate((64, 64), "float32")
    memory.to_torch(other).fill_(1)
    assert bool((consumer == 7).all())
    del consumer
    gc.collect()
    memory.stats()
    assert session.recorder.pool.in_use == held, "the first came back, the second is out"
    del other, buffer  # never freed: the memory comes back all the same
    gc.collect()
    assert memory.stats().in_use == session.recorder.pool.in_use == 0
    assert memory.trim() > 0
    with pytest.raises(hal.ContractError, match="of float31 was given"):
        memory.allocate((2,), "float31")
    again = memory.allocate((2,), "float32")
    memory.free(again)
    with pytest.raises(hal.ContractError, match="freed"):
        memory.free(again)


def test_memory_that_ends_during_a_wait_comes_back_after_the_next_one(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, recorder = session.memory, session.recorder
    held = [memory.to_torch(memory.allocate((64, 64), "float32")) for _ in range(2)]
    each, settle = recorder.pool.in_use // 2, recorder.settle

    def late() -> None:
        settle()
        held.clear()  # as another thread might, with work of its own behind this wait
        gc.collect()

    monkeypatch.setattr(recorder, "settle", late)
    held.pop()
    gc.collect()
    memory.stats()
    assert recorder.pool.in_use == each
    memory.stats()
    assert recorder.pool.in_use == 0


def test_vulkan_and_every_cuda_stream_wait_for_each_other(session: Any) -> None:
    if session.recorder.card.kind != "cuda":
        pytest.skip("a mapped file has no streams")
    busy, streams = torch.randn(4096, 4096, device="cuda"), [torch.cuda.Stream() for _ in range(3)]
    request, seen = asked(torch.empty(1, 1, 64, 64), torch.empty(1, 1, 64, 64)), []
    torch.cuda.synchronize()
    for n in range(12):  # the tensors are filled late, behind other work; the results are read at once
        with torch.cuda.stream(streams[n % 3]):
            late = busy
            for _ in range(8):
                late = late @ busy
            query = torch.full((1, 1, 64, 64), float(n), device="cuda") + 0 * late[0, 0].nan_to_num(0, 0, 0)
            seen.append(session.bind(request)(query, query, query).mean())
    torch.cuda.synchronize()
    assert [round(float(mean), 3) for mean in seen] == [float(n) for n in range(12)]


@pytest.mark.parametrize("count", [1, 8_388_609, 10_000_019])  # blocks of odd sizes beyond the pool's own
def test_buffers_of_any_size_are_shared_whole(session: Any, count: int) -> None:
    tensor = session.memory.to_torch(session.memory.allocate((count,), "float32"))
    tensor.fill_(2)
    assert float(tensor[-1]) == 2.0
    assert float(tensor.double().sum()) == 2.0 * count


def test_a_thread_that_never_saw_the_card_reads_in_place(session: Any, seed: int) -> None:
    memory = session.memory
    query, out = (memory.to_torch(memory.allocate((1, 1, 8, 32), "float32")) for _ in range(2))
    (values,) = fill(seed, query)
    prepared = session.prepare_attention(query, query, query, request=asked(query, query))
    session.compute_attention(prepared, out=out.fill_(0))
    out.fill_(0)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(session.compute_attention, prepared, out=out).result()
    assert relative_error(out.cpu(), reference(values, values, values).out) <= 1e-5


def test_no_recording_outlives_the_memory_that_it_reads_in_place(session: Any, seed: int) -> None:
    memory, pool = session.memory, session.recorder.pool
    buffers = [memory.allocate((1, 1, 1 << 18, 32), "float32") for _ in range(2)]  # blocks of their own
    query = memory.to_torch(memory.allocate((1, 1, 4, 32), "float32"))
    key, value = (memory.to_torch(buffer)[:, :, :16] for buffer in buffers)
    fill(seed, query, key, value)
    session.bind(asked(query, key))(query, key, value)
    assert len(session.recorder._kept) == 1
    for buffer in buffers:
        memory.free(buffer)
    del key, value
    gc.collect()
    memory.stats()
    before = pool.reserved
    pool.trim()  # as the pool does by itself where it comes to its limit
    assert pool.reserved < before
    assert not session.recorder._kept


def test_memory_that_cannot_be_shared_is_not_kept(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(block: Any) -> torch.Tensor:
        raise hal.DeviceUnavailableError("the other interface does not take it")

    with monkeypatch.context() as patch:
        patch.setattr(session.recorder.card, "_import", refuse)
        with pytest.raises(hal.DeviceUnavailableError, match="does not take it"):
            session.memory.allocate((64,), "float32")
    assert session.recorder.pool.in_use == 0


def test_threads_that_never_saw_the_card_make_memory_and_give_it_back(session: Any) -> None:
    memory, pool = session.memory, session.recorder.pool
    with ThreadPoolExecutor(1) as thread:
        buffer = thread.submit(memory.allocate, (1024,), "float32").result()
    assert float(memory.to_torch(buffer).fill_(2).sum()) == 2048.0
    memory.free(buffer)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(memory.trim).result() > 0
    assert pool.reserved == 0


@pytest.mark.parametrize("result", [2, -4])  # VK_TIMEOUT, VK_ERROR_DEVICE_LOST
def test_memory_that_ended_is_not_waited_for_when_a_failed_device_is_closed(
    session: Any, monkeypatch: pytest.MonkeyPatch, result: int
) -> None:
    query = session.memory.to_torch(session.memory.allocate((1, 1, 8, 32), "float32"))
    session.memory.free(session.memory.allocate(((8 << 20) + 1,), "float32"))  # leaves a block without a use
    fill(0, query)
    session.bind(asked(query, query))(query, query, query)
    session.synchronize()  # this device ends its work; only what it is asked fails from here on
    gpu, wait, patience, given_up = session.recorder.gpu, session.recorder.gpu.wait, [], len(session.memory._ended)
    del query
    gc.collect()
    assert len(session.memory._ended) > given_up

    class Silent:
        """A driver that answers no question about its progress."""

        def __getattr__(self, name: str) -> Any:
            known = name not in ("vkWaitSemaphores", "vkGetSemaphoreCounterValue")
            return getattr(usual, name) if known else lambda *given: result

    usual = gpu._lib
    monkeypatch.setattr(gpu, "wait", lambda *given: patience.append(given[1:]) or wait(*given))
    monkeypatch.setattr(gpu, "_lib", Silent())
    dropped, drop = [], session.recorder.card._drop
    monkeypatch.setattr(session.recorder.card, "_drop", lambda block: dropped.append(block) or drop(block))
    session.close()
    assert bool(dropped) == (result != 2), "giving memory back would wait for a device that hangs"
    assert patience[0] == ("finish before it is closed", waits.GRACE)
    waited = [seconds for _, seconds in patience if seconds]
    assert (len(waited) == 1) == (result == 2), "a lost device is asked again, and answers at once"


def test_a_tensor_outlives_the_session_that_made_its_memory(session: Any) -> None:
    tensor = session.memory.to_torch(session.memory.allocate((32, 32), "float32")).fill_(3)
    session.close()
    assert bool((tensor == 3).all())


def test_a_closed_sessions_memory_can_be_freed_and_not_had(session: Any) -> None:
    memory = session.memory
    kept, freed = (memory.allocate((64, 64), "float32") for _ in range(2))
    tensor = memory.to_torch(kept).fill_(3)
    query = torch.empty(1, 1, 8, 32, device=place(session))
    session.bind(asked(query, query))(query, query, query)
    session.close()
    assert (memory.stats().in_use, memory.stats().pooled) == (0, 0)
    memory.free(freed)
    memory.free(kept)
    assert bool((tensor == 3).all())
    del tensor, kept, freed
    gc.collect()
    assert (memory.stats().in_use, memory.stats().pooled) == (0, 0)
    assert session.device_seconds is None
    with pytest.raises(hal.DeviceUnavailableError, match=r"was closed: take a new one"):
        memory.allocate((64,), "float32")


def test_memory_stays_where_torchs_work_does_not_end(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, card, pool = session.memory, session.recorder.card, session.recorder.pool
    query = memory.to_torch(memory.allocate((1, 1, 8, 32), "float32"))
    fill(0, query)
    session.bind(asked(query, query))(query, query, query)
    held = pool.in_use
    with monkeypatch.context() as patch:
        patch.setattr(card, "settle", lambda timeout: False)
        del query
        gc.collect()
        with pytest.raises(
            hal.DeviceUnavailableError, match=r"did not end what was given up \(torch's work on .*close the"
        ):
            memory.stats()
        assert memory.trim() == 0
        assert pool.in_use == held
    memory.allocate((4,), "float32")
    assert memory.trim() > 0


def test_memory_that_outlives_its_session_goes_with_its_last_tensor(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = session.recorder.card
    if card.kind != "cuda":
        pytest.skip("a mapped file is unmapped by the array over it")
    freed, called = [], card._called
    monkeypatch.setattr(card, "_called", lambda name, *given: freed.append(name) or called(name, *given))
    tensor = session.memory.to_torch(session.memory.allocate((1 << 26,), "float32")).fill_(1)
    half = tensor[: 1 << 25]
    session.close()
    del tensor
    gc.collect()
    assert float(half.sum()) == 1 << 25
    assert "cuMemFree" not in freed
    del half
    gc.collect()
    assert freed[-4:] == ["cuCtxPushCurrent", "cuMemFree", "cuDestroyExternalMemory", "cuCtxPopCurrent"]


def test_torchs_work_is_ordered_before_memory_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    device = next((d for d in hal.devices() if d.family == "vulkan" and d.fidelity == "emulated"), None)
    if device is None:
        pytest.skip("no Vulkan driver for a CPU is installed")
    adapter = discovery.find().adapters[device.id]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with VulkanSession(attrs.evolve(device, reads=("cpu", "cuda:0")), adapter._replace(is_cpu=False)) as session:
        card = session.recorder._card = MappedCard(session.recorder.gpu)
        query = torch.randn(1, 1, 8, 32)
        session.bind(asked(query, query))(query, query, query)
        assert card.events == ["import", "enter", "run"]
        card.events.clear()
        session.memory.trim()
        assert card.events.index("settle") < card.events.index("drop")
    assert card.events[-1] == "close"

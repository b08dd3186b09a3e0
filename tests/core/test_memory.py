"""The pool: reuse, limits, and memory that others still read."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hal_core import Buffer, ContractError, MemoryLimitError, PooledMemory
from hal_core.plugin_api import pooled_size


def test_a_buffer_is_of_the_shape_and_dtype_asked_for() -> None:
    memory = PooledMemory()
    buffer = memory.allocate((2, 3, 5), "bfloat16")
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((2, 3, 5), "bfloat16", 60)
    tensor = memory.to_torch(buffer)
    assert (tuple(tensor.shape), tensor.dtype) == ((2, 3, 5), torch.bfloat16)
    assert memory.allocate((0, 4), "float32").nbytes == 0


def test_two_live_buffers_never_share_memory() -> None:
    memory = PooledMemory()
    buffers = [memory.allocate((100,), "float32") for _ in range(20)]
    for number, buffer in enumerate(buffers):
        buffer.tensor.fill_(number)
    assert [buffer.tensor.unique().item() for buffer in buffers] == list(range(20))


def test_a_freed_block_is_used_again() -> None:
    memory = PooledMemory()
    first = memory.allocate((1000,), "float32")
    address = first.tensor.data_ptr()
    memory.free(first)
    second = memory.allocate((900,), "float32")
    assert second.tensor.data_ptr() == address
    stats = memory.stats()
    assert (stats.allocations, stats.reuses) == (2, 1)


def test_the_figures_add_up() -> None:
    memory = PooledMemory()
    one, two = memory.allocate((256,), "float32"), memory.allocate((1024,), "float32")
    before = memory.stats()
    assert before.in_use >= one.nbytes + two.nbytes
    assert before.pooled == 0
    memory.free(one)
    memory.free(two)
    after = memory.stats()
    assert (after.in_use, after.pooled, after.peak) == (0, before.in_use, before.in_use)
    assert memory.trim() == before.in_use
    assert memory.stats().pooled == 0
    assert memory.trim() == 0


def test_freeing_twice_is_an_error_and_changes_nothing() -> None:
    memory = PooledMemory()
    buffer = memory.allocate((8,), "float32")
    memory.free(buffer)
    figures = memory.stats()
    with pytest.raises(ContractError, match="freed"):
        memory.free(buffer)
    assert memory.stats() == figures
    assert buffer.freed
    with pytest.raises(ContractError, match="freed"):
        memory.to_torch(buffer)
    with pytest.raises(ContractError, match="freed"):
        torch.from_dlpack(buffer)


def test_a_buffer_of_another_manager_is_not_freed_here() -> None:
    buffer = PooledMemory().allocate((8,), "float32")
    with pytest.raises(ContractError, match="another memory manager"):
        PooledMemory().free(buffer)
    assert not buffer.freed


def test_a_request_over_the_limit_is_refused_before_it_is_allocated() -> None:
    memory = PooledMemory(name="toy:0", limit=10_000)
    held = memory.allocate((1024,), "float32")
    figures = memory.stats()
    with pytest.raises(MemoryLimitError) as caught:
        memory.allocate((10_000,), "float32")
    assert memory.stats() == figures
    error = caught.value
    assert error.requested >= 40_000
    assert (error.in_use, error.limit) == (figures.in_use, 10_000)
    for number in (error.requested, error.in_use, error.limit):
        assert f"{number:,}" in str(error)
    assert "toy:0" in str(error)
    assert "or raise the limit of its PooledMemory." in str(error)
    memory.free(held)
    memory.allocate((1024,), "float32")  # the refusal took nothing away


def test_live_buffers_add_up_to_the_limit() -> None:
    memory = PooledMemory(limit=4096)
    held = [memory.allocate((256,), "float32") for _ in range(4)]
    with pytest.raises(MemoryLimitError, match="4,096 in use"):
        memory.allocate((1,), "float32")
    memory.free(held.pop())
    memory.allocate((256,), "float32")


def test_pooled_blocks_are_given_up_before_the_limit_refuses() -> None:
    memory = PooledMemory(limit=8192)
    for buffer in [memory.allocate((512,), "float32") for _ in range(4)]:
        memory.free(buffer)
    assert memory.stats().pooled == 8192
    memory.allocate((2048,), "float32")
    stats = memory.stats()
    assert stats.in_use + stats.pooled <= 8192


@pytest.mark.parametrize(("shape", "dtype"), [((2, -1), "float32"), ((2,), "float33"), ((2,), "int64")])
def test_malformed_shapes_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ContractError, match="was given"):
        PooledMemory().allocate(shape, dtype)


@pytest.mark.parametrize("consume", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
def test_a_consumer_that_outlives_its_buffer_is_never_overwritten(consume: object) -> None:
    memory = PooledMemory()
    buffer = memory.allocate((4096,), "float32")
    buffer.tensor.fill_(7)
    view = consume(buffer)  # type: ignore[operator]
    memory.free(buffer)
    del buffer
    for _ in range(20):
        memory.allocate((4096,), "float32").tensor.fill_(-1)
    assert (np.asarray(view) == 7).all()


def test_a_view_that_outlives_its_buffer_is_never_overwritten() -> None:
    memory = PooledMemory()
    buffer = memory.allocate((64, 64), "float32")
    buffer.tensor.fill_(7)
    row = memory.to_torch(buffer)[3, 5:9]
    memory.free(buffer)
    for _ in range(20):
        memory.allocate((64, 64), "float32").tensor.fill_(-1)
    assert row.tolist() == [7] * 4


def test_a_block_goes_back_to_the_pool_once_its_consumer_is_gone() -> None:
    memory = PooledMemory()
    buffer = memory.allocate((4096,), "float32")
    view = np.from_dlpack(buffer)
    assert view.shape == (4096,)
    del view
    gc.collect()
    memory.free(buffer)
    assert memory.stats().pooled > 0


def test_dlpack_shares_memory_both_ways() -> None:
    memory = PooledMemory()
    buffer = memory.allocate((3, 4), "float32")
    array, tensor = np.from_dlpack(buffer), torch.from_dlpack(buffer)
    tensor.fill_(2)
    assert (array == 2).all()
    assert buffer.__dlpack_device__() == (1, 0)


def test_a_host_tensor_comes_in_without_a_copy() -> None:
    memory = PooledMemory()
    tensor = torch.arange(12.0).view(3, 4).requires_grad_()
    buffer = memory.to_backend(tensor)
    assert buffer.tensor.data_ptr() == tensor.data_ptr()
    assert not buffer.tensor.requires_grad
    memory.free(buffer)
    stats = memory.stats()
    assert (stats.copies, stats.copied, stats.in_use, stats.pooled) == (0, 0, 0, 0)
    assert tensor.sum() == 66  # its memory is still its own


def test_a_copy_is_counted() -> None:
    """A tensor on torch's meta device lies elsewhere, as one of another accelerator would."""
    memory = PooledMemory("meta")
    memory.to_backend(torch.zeros(4, 8))
    stats = memory.stats()
    assert (stats.copies, stats.copied) == (1, 128)
    assert stats.in_use >= 128


def test_a_large_block_wastes_little() -> None:
    memory = PooledMemory()
    memory.allocate((5 << 20,), "float8_e5m2")
    assert memory.stats().in_use <= 6 << 20


def test_threads_never_get_the_same_block_and_leave_nothing_behind() -> None:
    memory = PooledMemory()
    clashes: list[tuple[float, float]] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for step in range(200):
            buffer = memory.allocate((64 + step % 3 * 500,), "float32")
            buffer.tensor.fill_(number)
            low, high = buffer.tensor.aminmax()
            if not low == high == number:
                clashes.append((float(low), float(high)))
            memory.free(buffer)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert not clashes
    stats = memory.stats()
    assert stats.in_use == 0
    assert stats.allocations == 1600
    assert memory.trim() == stats.pooled


def freed_by_four(memory: PooledMemory, buffer: Buffer) -> list[bool]:
    start = threading.Barrier(4)

    def free(_: int) -> bool:
        start.wait()
        try:
            memory.free(buffer)
        except ContractError:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(free, range(4)))


def test_one_buffer_freed_by_many_threads_is_freed_once() -> None:
    for _ in range(50):
        memory = PooledMemory()
        assert sum(freed_by_four(memory, memory.allocate((128,), "float32"))) == 1
        assert memory.stats().in_use == 0
        assert memory.stats().pooled == memory.trim() == 512


@pytest.mark.parametrize("nbytes", [0, 1, 512, 513, 65_536, 65_537, 1_000_000, (8 << 20) + 1, 100_000_000])
def test_pooled_size_is_what_the_pool_takes(nbytes: int) -> None:
    memory = PooledMemory()
    memory.allocate((nbytes,), "float8_e4m3fn")
    assert memory.stats().in_use == pooled_size(nbytes) >= nbytes

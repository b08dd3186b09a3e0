"""What a GPU does with input and conditions that cannot work: forks, full memory, failed launches, tensors
elsewhere.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, Causal
from hal_core.registry import registry

FORKED = """
import json, os, sys
import torch
import hal_core as hal
query = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
calls = {
    "attention": lambda: hal.attention(query, query, query, backend="cuda:0"),
    "bind": lambda: hal.bind(query, query, query, backend="cuda:0")(query, query, query),
    "session": lambda: hal.session("cuda:0"),
}
if sys.argv[1] == "opened":
    bound = hal.bind(query, query, query, backend="cuda:0")
    calls["bound"] = lambda: bound(query, query, query)
    del calls["session"]  # the open one is handed out; what it is asked to run is refused
    calls["bound"]()
read, write = os.pipe()
if not os.fork():
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = [False, "ran"]
        except Exception as error:
            found[name] = [isinstance(error, hal.HalError), str(error)]
    os.write(write, json.dumps(found).encode())
    os._exit(0)
os.wait()
parent = bool(torch.isfinite(hal.attention(query, query, query, backend="cuda:0")).all())
print(json.dumps([json.loads(os.read(read, 1 << 16)), parent]))
"""


@pytest.mark.parametrize("before", ["opened", "touched"])
def test_a_forked_process_is_refused_and_its_parent_goes_on(gpu: str, before: str) -> None:
    """opened: the session is the parent's. touched: the parent used CUDA, and the child asks for the device first."""
    ran = subprocess.run(
        [sys.executable, "-c", FORKED, before], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found, parent = json.loads(ran.stdout.splitlines()[-1])
    for name, (named, sentence) in found.items():
        assert named, f"{name}: {sentence}"
        assert "spawn" in sentence, f"{name}: {sentence}"
    assert parent


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def test_a_call_without_memory_names_the_bytes_and_later_calls_run(gpu: str) -> None:
    query = normal(1, 64, 8192, 128)  # as large as its output: 128 MiB
    hal.attention(query, query, query, backend=gpu)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    held = [torch.empty(free - (120 << 20), dtype=torch.uint8, device="cuda")]
    try:
        with pytest.raises(hal.MemoryLimitError) as caught:
            hal.attention(query, query, query, backend=gpu)
        small = query[:, :1, :64]
        assert math.isfinite(float(hal.attention(small, small, small, backend=gpu).sum()))  # what fits still runs
    finally:
        held.clear()  # a failure's traceback must not keep the memory from other tests
        torch.cuda.empty_cache()
    assert caught.value.requested == query.numel() * 2
    assert caught.value.limit == total
    assert caught.value.in_use + caught.value.requested > total
    assert bool(torch.isfinite(hal.attention(query, query, query, backend=gpu)).all())


def test_a_failed_launch_is_named_and_leaves_the_given_output_alone(gpu: str) -> None:
    """More batch entries than a grid has: the door refuses them, so the session is asked directly."""
    batch = 65536 + 8
    given = normal(batch, 1, 1, 16)
    request = AttentionRequest(
        batch=batch,
        heads_q=1,
        heads_kv=1,
        len_q=1,
        len_k=1,
        dim_qk=16,
        dim_v=16,
        dtype="bfloat16",
        device=gpu,
        causal=Causal.BOTTOM_RIGHT,
        softcap=3.0,
    )
    with pytest.raises(hal.UnsupportedError, match="batch"):
        hal.attention(given, given, given, causal="bottom_right", softcap=3.0, backend=gpu)
    session = hal.session(gpu)
    out = torch.full_like(given, 7.0)
    prepared = session.prepare_attention(given, given, given, request=request)
    with pytest.raises(hal.DeviceUnavailableError, match="did not start"):
        session.compute_attention(prepared, out=out)
    torch.cuda.synchronize()
    assert bool((out == 7.0).all())
    assert bool(torch.isfinite(hal.attention(given[:9], given[:9], given[:9], backend=gpu)).all())


def moved(name: str) -> dict[str, Any]:
    """A paged or packed call with one tensor of it left on the host."""
    if name.startswith("cu_"):
        ends = torch.tensor([0, 20, 64], dtype=torch.int32, device="cuda")
        tables = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return {**tables, name: tables[name].cpu(), "max_seqlen_q": 44, "max_seqlen_k": 44}
    pages = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    tables = {"page_table": pages, "cache_seqlens": torch.full((1,), 64, dtype=torch.int32, device="cuda")}
    return {**tables, name: tables[name].cpu()}


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "page_table", "cache_seqlens"])
def test_a_table_on_another_device_is_refused(gpu: str, name: str) -> None:
    query = normal(1, 2, 64, 64)
    with pytest.raises(hal.ContractError, match=f"{name} on cpu and query on cuda:0 were given"):
        hal.attention(query, query, query, backend=gpu, **moved(name))


def test_tensors_of_several_devices_are_refused(gpu: str) -> None:
    query = normal(1, 2, 64, 64)
    with pytest.raises(hal.ContractError, match="move them to one device"):
        hal.attention(query, query.cpu(), query, backend=gpu)
    with pytest.raises(hal.ContractError, match="move the mask"):
        hal.attention(query, query, query, torch.ones(64, 64, dtype=torch.bool), backend=gpu)


def test_a_head_size_or_a_cache_s_gradient_without_a_kernel_names_what_is_offered(gpu: str) -> None:
    wide = normal(1, 1, 32, 264)
    with pytest.raises(hal.UnsupportedError, match=r"head_dim +264 asked, 1 to 256 offered"):
        hal.attention(wide, wide, wide, backend=gpu)
    query = normal(1, 1, 32, 64).requires_grad_()
    cache, scale = query.detach().to(torch.float8_e4m3fn), torch.ones(1, device="cuda")
    with pytest.raises(hal.UnsupportedError, match="gradients through a cache of float8_e4m3fn"):
        hal.attention(query, cache, cache, key_scale=scale, value_scale=scale, backend=gpu)


def plan_of(lists: list[list[int]], block: int = 64) -> BlockPlan:
    most = max(map(len, lists))
    padded = [row + [0] * (most - len(row)) for row in lists]
    indices = torch.tensor(padded, dtype=torch.int32, device="cuda").view(1, 1, len(lists), most)
    counts = torch.tensor([len(row) for row in lists], dtype=torch.int32, device="cuda").view(1, 1, -1)
    return BlockPlan(block, block, indices, counts)


def test_a_plan_that_does_not_tile_is_refused(gpu: str) -> None:
    """By its shape; its entries lie on the device and are trusted."""
    query = normal(1, 1, 256, 64)
    with pytest.raises(hal.ContractError, match="block_plan"):
        hal.attention(query, query, query, block_plan=plan_of([[0], [1]]), backend=gpu)


def test_a_block_listed_twice_is_read_once(gpu: str) -> None:
    query, key, value = (normal(1, 2, 256, 64) for _ in range(3))
    twice = plan_of([[3, 0, 3, 3], [1, 1], [2], [0, 2, 1, 0]])
    once = plan_of([[0, 3], [1], [2], [0, 1, 2]])
    got, want = (hal.attention(query, key, value, block_plan=plan, backend=gpu) for plan in (twice, once))
    assert float((got.float() - want.float()).norm() / want.float().norm()) <= 3e-3


def test_cupy_memory_is_ordered_by_its_stream(gpu: str) -> None:
    """A freed block is handed out again on the stream whose work may still use it, and on no other."""
    pytest.importorskip("cupy")
    from hal_cuda.memory import CudaMemory

    memory, side = CudaMemory(0, source="cupy"), torch.cuda.Stream()
    buffer = memory.allocate((1 << 20,), "float32")
    address = buffer.tensor.data_ptr()
    torch.cuda._sleep(20_000_000)
    buffer.tensor.fill_(1.0)
    memory.free(buffer)
    del buffer
    with torch.cuda.stream(side):
        other = memory.allocate((1 << 20,), "float32")
        assert other.tensor.data_ptr() != address
    again = memory.allocate((1 << 20,), "float32")
    assert again.tensor.data_ptr() == address
    assert memory.stats().reuses >= 1
    for held in (other, again):
        memory.free(held)
    del other, again, held
    torch.cuda.synchronize()
    assert memory.trim() >= 4 << 20


def test_blocks_come_from_the_allocator_of_the_given_array(gpu: str) -> None:
    cupy = pytest.importorskip("cupy")
    memory, pool = hal.session(gpu).memory, cupy.get_default_memory_pool()
    array = cupy.zeros(16, dtype=cupy.float32)
    used, held = pool.used_bytes(), torch.cuda.memory_allocated()
    beside = memory.allocate((1 << 18,), "float32", like=array)
    assert pool.used_bytes() - used == 1 << 20
    assert torch.cuda.memory_allocated() == held
    own = memory.allocate((1 << 18,), "float32", like=torch.zeros(1, device="cuda"))
    assert torch.cuda.memory_allocated() - held >= 1 << 20
    assert pool.used_bytes() - used == 1 << 20
    beside.tensor.fill_(2.0)
    own.tensor.copy_(beside.tensor)
    assert float(own.tensor.sum()) == 2.0 * (1 << 18)
    memory.free(beside)
    memory.free(own)


def test_buffers_are_counted_limited_and_trimmed(gpu: str) -> None:
    from hal_cuda.memory import CudaMemory

    torch.cuda.empty_cache()
    memory = CudaMemory(0, limit=3 << 20)
    first = memory.allocate((1 << 18,), "float32")
    second = memory.allocate((1 << 18,), "float32")
    with pytest.raises(hal.MemoryLimitError) as caught:
        memory.allocate((1 << 19,), "float32")
    assert (caught.value.requested, caught.value.in_use, caught.value.limit) == (1 << 21, 2 << 20, 3 << 20)
    assert memory.stats().in_use == 2 << 20
    host = memory.to_backend(torch.arange(10.0))
    assert host.tensor.tolist() == list(range(10))
    assert memory.stats().copies == 1
    memory.free(first)
    memory.free(second)
    memory.free(host)
    del first, second, host
    assert memory.stats().in_use == 0
    assert memory.stats().peak >= 2 << 20
    memory.trim()
    assert memory.stats().pooled == torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def test_every_device_is_described(gpu: str) -> None:
    device = registry.find(gpu)[0]
    assert device.memory is not None
    assert device.model == torch.cuda.get_device_name(0)
    assert device.driver.startswith("NVIDIA ")

"""Without a process group: the whole sequence on one device, its keys block by block, within a limit of memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hal_parallel
import pytest
import torch
from hal_parallel.description import Given, describe
from hal_parallel.draws import Draws
from hal_parallel.streaming import choose_blocks

import hal_core as hal
from hal_core import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:hal_parallel. there is no process group")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small blocks: more threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def norm_error(got: torch.Tensor, want: torch.Tensor) -> float:
    dead = want == -torch.inf  # log-sum-exp of rows without a key
    assert torch.equal(dead, got == -torch.inf)
    got, want = (tensor.detach().double().masked_fill(dead, 0) for tensor in (got, want))
    return float((got - want).norm() / want.norm())


def drawn(length: int, heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(1, heads, length, 16, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["cpu", "opencl", "vulkan"])
def test_blocks_give_the_result_of_one_call(backend):
    if not any(device.family == backend for device in hal.devices()):
        pytest.skip(f"{backend} has no device here")
    tensors = drawn(700)
    mask = torch.rand(1, 1, 700, 700) > 0.2
    want, lse = hal.attention(*tensors, mask, is_causal=True, return_lse=True, backend="cpu")
    flowing = torch.randn_like(want)
    wanted = torch.autograd.grad(want, tensors, flowing)
    got = hal_parallel.attention(*tensors, None, mask, is_causal=True, return_lse=True, backend=backend, memory=400_000)
    found = torch.autograd.grad(got.out, tensors, flowing)
    assert norm_error(got.out, want) < 1e-5
    assert norm_error(got.lse, lse) < 1e-5
    assert max(map(norm_error, found, wanted)) < 1e-5


def test_keys_past_a_devices_buffer_range_stream():
    """More keys than a buffer of the device may hold: hal.attention refuses them, blocks of heads are served."""
    if not any(device.family == "vulkan" for device in hal.devices()):
        pytest.skip("vulkan has no device here")
    torch.manual_seed(1)
    query, (key, value) = torch.randn(1, 8, 32, 64), (torch.randn(1, 8, 70_000, 64) for _ in range(2))
    request = hal.explain(query, key, value, backend="vulkan")
    if request.chosen is not None:
        pytest.skip("vulkan:0 holds 143 MB in a buffer")
    got = hal_parallel.attention(query, key, value, backend="vulkan")
    assert norm_error(got, hal.attention(query, key, value, backend="cpu")) < 1e-5


def test_dropout_is_that_of_the_ranks():
    """The pattern is the positions' own, with blocks of any size."""
    tensors = [tensor.detach() for tensor in drawn(300)]
    given = {"dropout_p": 0.4, "rng": (3, 4), "backend": "cpu"}
    one, many = (hal_parallel.attention(*tensors, memory=memory, **given) for memory in (1 << 30, 200_000))
    assert norm_error(many, one) < 1e-6
    weights = (tensors[0] @ tensors[1].mT * 0.25).softmax(-1)
    keep = Draws(0.4, (3, 4)).keep(1, 2, torch.arange(300), torch.arange(300))
    assert norm_error(one, weights * keep / 0.6 @ tensors[2]) < 1e-5


def test_noise_is_the_same_in_blocks_of_any_size():
    tensors = [tensor.detach() for tensor in drawn(300)]
    given = {"is_causal": True, "backend": "lightmatter:0"}
    if not any(device.id == given["backend"] for device in hal.devices()):
        pytest.skip("the plugin of lightmatter is not installed")
    one, many = (hal_parallel.attention(*tensors, memory=size, rng=(3, 4), **given) for size in (1 << 30, 2_000_000))
    assert norm_error(many, one) < 1e-6
    assert norm_error(hal_parallel.attention(*tensors, rng=(3, 5), **given), one) > 1e-4


def test_entries_and_heads_apart_give_the_same():
    """Grouped heads, a mask and dropout whose pattern differs by batch entry and head, in small blocks and in one."""
    torch.manual_seed(5)
    sizes = ((4, 96), (2, 80), (2, 80))
    tensors = [torch.randn(2, heads, length, 16, requires_grad=True) for heads, length in sizes]
    masks = [torch.randn(*shape, 80, requires_grad=True) for shape in ((2, 4, 96), (1, 1, 96), (1, 4, 1))]
    for mask in masks:
        results = []
        for memory in (1 << 30, 700_000):
            given = {"dropout_p": 0.4, "rng": (3, 4), "enable_gqa": True, "backend": "cpu", "memory": memory}
            out = hal_parallel.attention(*tensors, None, mask, **given)
            results.append([out, *torch.autograd.grad(out.square().sum(), (*tensors, mask))])
        assert max(map(norm_error, *results)) < 1e-5


def described(length: int, grads: bool = False, dtype: torch.dtype = torch.float32, batch: int = 1) -> Any:
    query = torch.empty(batch, 8, length, 64, requires_grad=grads, dtype=dtype)
    given, places = Given(query, query, query, None), ("contiguous", None, (None, None))
    return describe(given, 1, 0.0, {"backend": "cpu"}, places, False)


def test_blocks_shrink_with_the_memory():
    """First fewer batch entries, then fewer heads, then fewer rows and keys."""
    found = described(1 << 16, batch=2)
    requests = [choose_blocks(found, memory << 20, False).inner.request for memory in (4096, 900, 128, 16)]
    sizes = [(r.batch, r.heads_kv, r.len_q, r.len_k) for r in requests]
    assert sizes[0] == (2, 8, 1 << 16, 1 << 16)
    assert sizes[1] == (1, 8, 1 << 16, 1 << 16)
    assert sizes[2] == (1, 1, 1 << 16, 1 << 16)
    assert sizes[3][:2] == (1, 1)
    assert max(sizes[3]) < 1 << 16


def test_too_little_memory_is_refused_with_what_is_enough():
    """Sums of 16-bit gradients are 32 bits wide; the bytes that the refusal names are enough."""
    found = described(1 << 14, grads=True, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="Nothing was allocated") as refused:
        choose_blocks(found, 2 << 20, False)
    enough = int(re.search(r"pass memory=(\d+) or more", str(refused.value))[1])
    assert choose_blocks(found, enough, False).needed == enough
    with pytest.raises(UnsupportedError):
        choose_blocks(found, enough - 1, False)
    assert choose_blocks(found, None, False).needed > enough, "without a limit the calls alone are bounded"


def test_the_configured_limit_is_the_limit():
    found = described(1 << 14)
    free = choose_blocks(found, None, False).needed
    limit = hal.memory("cpu:0").stats().in_use + (6 << 20)  # what other tests keep counts too
    try:
        hal.configure(memory_limit={"cpu:0": limit})
        assert choose_blocks(found, None, False).needed <= limit < free
    finally:
        hal.configure()


def test_it_says_once_that_there_is_one_device():
    code = (
        "import torch, hal_parallel, warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): hal_parallel.attention(*[torch.zeros(1, 1, 4, 8)] * 3, backend='cpu')\n"
        "print([str(each.message) for each in said if 'hal_parallel' in str(each.message)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    said = (
        "['hal_parallel: there is no process group, so the whole sequence runs on one device, its keys block by block']"
    )
    assert done.stdout.strip() == said, done.stderr


#: Peak resident set beside inputs and results, in MiB, and the error on some rows against float64.
PEAK = """
import json, sys, threading, time, torch, warnings
warnings.simplefilter("ignore")
import hal_core as hal, hal_parallel
length, memory, backward, device = json.loads(sys.argv[1])

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * 1024

def watched(function):
    peak, done = [resident()], threading.Event()
    def look():
        while not done.is_set():
            peak.append(resident()); time.sleep(0.02)
    thread = threading.Thread(target=look); thread.start()
    before, result = peak[0], function()
    done.set(); thread.join()
    return result, max(peak) - before

draw = lambda n: [torch.randn(1, 8, n, 64, requires_grad=bool(backward)) for _ in range(3)]
small = draw(700)
warm = hal_parallel.attention(*small, is_causal=True, backend=device, memory=memory)
if backward:  # with a given gradient: torch imports what takes 25 MiB for the first of those
    torch.autograd.grad(warm, small, torch.ones_like(warm))
tensors = draw(length)
call = lambda: hal_parallel.attention(*tensors, is_causal=True, backend=device, memory=memory, return_lse=True)
result, peak = watched(call)
beside = [peak - result.out.nbytes - result.lse.nbytes]
rows = torch.tensor([0, 1, length // 2, length - 1])
with torch.no_grad():
    query, key, value = (tensor.double() for tensor in tensors)
    scores = query[:, :, rows] @ key.mT / 8
    scores.masked_fill_(torch.arange(length) > rows[:, None], -torch.inf)
    want = scores.softmax(-1) @ value
    error = float((result.out[:, :, rows] - want).norm() / want.norm())
    del scores, key, value, query
if backward:
    flowing = torch.randn_like(result.out)
    grads, peak = watched(lambda: torch.autograd.grad(result.out, tensors, flowing))
    beside.append(peak - sum(grad.nbytes for grad in grads))
print(json.dumps([[size / 2**20 for size in beside], error]))
"""


def peaks(length: int, memory: int, backward: bool, device: str = "cpu", threads: int = 2) -> list[float]:
    command = [sys.executable, "-c", PEAK, json.dumps([length, memory, backward, device])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found, error = json.loads(done.stdout.splitlines()[-1])
    print(found, error)
    assert error < 1e-5
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the resident set is read from Linux's /proc")
def test_blocks_stay_within_the_memory():
    """A whole call of 4096 tokens and its gradients take 32 MiB of partial results beside them."""
    assert max(peaks(4096, 8 << 20, True, threads=1)) < 8


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the resident set is read from Linux's /proc")
@pytest.mark.parametrize("backward", [False, True])
def test_64k_tokens_stay_within_128_mib(backward):
    assert max(peaks(1 << 16, 128 << 20, backward)) < 128

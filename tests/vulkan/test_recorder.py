"""Calls recorded once and run again, tensors read where they lie, and the staging ring of devices without mapped
memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import discovery  # noqa: E402
from hal_vulkan.runtime import command_buffer, open_device, recorder, staging  # noqa: E402
from hal_vulkan.runtime._vk import Bound  # noqa: E402
from hal_vulkan.session import VulkanSession  # noqa: E402


@pytest.fixture
def unmapped(device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session that treats the device's memory as a graphics card's, with tensors of 4 KiB and more in the ring."""
    monkeypatch.setattr(open_device, "STREAM_FROM", 4096)
    adapter = discovery.find().adapters[device.id]
    with VulkanSession(device, adapter._replace(is_cpu=False)) as opened:
        ring = opened.recorder.ring = staging.StagingRing(opened.recorder.gpu, slots=3, slot_bytes=8192)
        ring._take("")
        for slot in ring._slots:
            slot.host.fill_(255)  # NaN in every float format
        yield opened


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def request(query: torch.Tensor, key: torch.Tensor, **changes: Any) -> hal.AttentionRequest:
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
        **changes,
    )


def recordings(session: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one whenever a command buffer is made."""
    made: list[Any] = []
    begin = session.recorder.gpu.begin
    monkeypatch.setattr(session.recorder.gpu, "begin", lambda *given: made.append(given) or begin(*given))
    return made


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": hal.Causal.TOP_LEFT},
    "window and softcap": {"window": (9, 4), "softcap": 3.0},
    "log-sum-exp": {"lse": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_call_of_a_known_shape_runs_its_recording_on_its_own_tensors(
    session: Any, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, seed: int
) -> None:
    shapes = (2, 4, 13, 40), (2, 2, 21, 40), (2, 2, 21, 40)
    options, made = KINDS[kind], recordings(session, monkeypatch)
    for n in range(4):
        query, key, value = draw(seed + n, *shapes, dtype=dtype)
        key = key.transpose(2, 3).contiguous().transpose(2, 3) if n % 2 else key
        asked = request(query, key, **options)
        given = {name: option for name, option in options.items() if name != "lse"}
        want = reference(query, key, value, **given)
        found = session.bind(asked)(query, key, value)
        out = found.out if asked.lse else found
        assert relative_error(out, want.out) <= (1e-5 if dtype == torch.float32 else 2e-3)
        if asked.lse:
            assert relative_error(found.lse, want.lse) <= (1e-5 if dtype == torch.float32 else 1e-3)
    assert len(made) == 1


@pytest.mark.parametrize("boolean", [True, False])
def test_a_recording_takes_each_calls_own_mask(
    session: Any, monkeypatch: pytest.MonkeyPatch, boolean: bool, seed: int
) -> None:
    made = recordings(session, monkeypatch)
    kind = hal.MaskKind.BOOLEAN if boolean else hal.MaskKind.ADDITIVE
    for n in range(3):
        query, key, value, mask = draw(seed + n, (2, 2, 9, 32), (2, 2, 17, 32), (2, 2, 17, 32), (2, 1, 1, 17))
        mask = mask > 0 if boolean else mask
        asked = request(query, key, mask=kind)
        prepared = session.prepare_attention(query, key, value, request=asked)
        out = session.compute_attention(prepared, mask).out
        assert relative_error(out, reference(query, key, value, mask).out) <= 1e-5
    assert len(made) == 1


def test_a_mask_of_another_layout_is_another_call(session: Any, seed: int) -> None:
    query, key, value, one, many = draw(seed, *[(2, 2, 9, 32)] * 3, (1, 1, 9, 9), (2, 2, 9, 9))
    prepared = session.prepare_attention(query, key, value, request=request(query, key, mask=hal.MaskKind.ADDITIVE))
    for mask in (one.expand(2, 2, 9, 9), many, one.expand(2, 2, 9, 9), many.transpose(2, 3)):
        out = session.compute_attention(prepared, mask).out
        assert relative_error(out, reference(query, key, value, mask).out) <= 1e-5


def test_gradients_of_a_known_shape_run_their_recording(
    session: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    made = recordings(session, monkeypatch)
    for n in range(3):
        query, key, value, grad = draw(seed + n, *[(1, 2, 11, 32)] * 4)
        asked = request(query, key, lse=True, grads=frozenset("qkv"))
        prepared = session.prepare_attention(query, key, value, request=asked)
        out, lse = session.compute_attention(prepared)
        found = session.compute_attention_backward(prepared, out, lse, grad)
        leaves = [t.double().requires_grad_() for t in (query, key, value)]
        torch.nn.functional.scaled_dot_product_attention(*leaves).backward(grad.double())
        assert all(relative_error(x, leaf.grad) <= 2e-5 for x, leaf in zip(found, leaves, strict=False))
    assert len(made) == 2  # a forward and a backward


def test_recordings_and_their_memory_are_bounded_and_given_back(
    session: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(recorder, "KEPT", 5)
    for length in range(1, 12):
        query = draw(seed, (1, 1, length, 32))[0]
        session.bind(request(query, query))(query, query, query)
        assert len(session.recorder._kept) <= 5
    kept, stats = session.recorder.kept_bytes, session.memory.stats()
    assert stats.in_use == 0
    assert 0 < kept <= stats.pooled
    monkeypatch.setattr(recorder, "KEPT_BYTES", 2 * kept)
    monkeypatch.setattr(recorder, "KEPT_PART", 1 << 60)
    query = draw(seed, (1, 1, 1024, 32))[0]
    session.bind(request(query, query))(query, query, query)
    assert session.recorder.kept_bytes <= kept, "a call that would fill the room alone is not kept"
    assert session.memory.trim() >= kept
    assert session.recorder.kept_bytes == session.recorder.pool.reserved == 0
    assert bool(session.bind(request(query, query))(query, query, query).isfinite().all())


def test_recordings_make_room_for_a_call_that_needs_their_memory(device: hal.Device, seed: int) -> None:
    with VulkanSession(device, discovery.find().adapters[device.id], 1 << 20) as session:
        for length in (8, 300, 340, 380, 420, 460):  # together more than the limit
            query = draw(seed, (1, 1, length, 64))[0]
            out = session.bind(request(query, query))(query, query, query)
            assert relative_error(out, reference(query, query, query).out) <= 1e-5


def test_threads_share_a_recording_without_mixing_their_tensors(session: Any, seed: int) -> None:
    def one(n: int) -> float:
        query, key, value = draw(seed + n, *[(1, 2, 24, 32)] * 3)
        return relative_error(session.bind(request(query, key))(query, key, value), reference(query, key, value).out)

    with ThreadPoolExecutor(6) as threads:
        assert max(threads.map(one, range(60))) <= 1e-5


def test_large_tensors_on_a_cpus_device_are_read_and_written_where_they_lie(session: Any, seed: int) -> None:
    limits = session.recorder.adapter.limits
    if not session.recorder.mapped or not limits["hostPointerAlignment"]:
        pytest.skip("this device does not take the host's memory")
    shape = (1, 2, open_device.IMPORT_FROM // (2 * 64 * 4), 64)
    query = draw(seed, (1, 2, 16, 64))[0]
    key, value = draw(seed + 1, shape, shape)
    run, want = session.bind(request(query, key)), reference(query, key, value).out
    assert relative_error(run(query, key, value), want) <= 1e-5
    assert session.memory.stats().copied == 2 * query.nbytes  # the query and its result, small as they are
    shifted = torch.empty(key.numel() + 1)[1:].view(shape).copy_(key)
    assert shifted.data_ptr() % limits["minStorageBufferOffsetAlignment"]
    assert relative_error(run(query, shifted, value), want) <= 1e-5
    assert session.memory.stats().copied == 4 * query.nbytes + key.nbytes


def test_imported_memory_outlives_the_tensor_that_was_made_for_the_call(session: Any, seed: int) -> None:
    for n in range(6):  # a boolean mask becomes numbers, large enough to be imported, that only the recording holds
        query, key, value, grad = draw(seed + n, *[(1, 4, 256, 32)] * 4)
        mask = torch.rand(1, 4, 256, 256, generator=torch.Generator().manual_seed(seed + n)) > 0.3
        assert mask.numel() * 4 >= open_device.IMPORT_FROM
        asked = request(query, key, lse=True, grads=frozenset("qkv"), mask=hal.MaskKind.BOOLEAN)
        prepared = session.prepare_attention(query, key, value, request=asked)
        out, lse = session.compute_attention(prepared, mask)
        grads = session.compute_attention_backward(prepared, out, lse, grad, mask)
        assert relative_error(out, reference(query, key, value, mask).out) <= 1e-5
        assert all(bool(x.isfinite().all()) for x in grads[:3])


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (40, torch.float32), (32, torch.float16)])
@pytest.mark.parametrize("strided", [False, True])
def test_the_staging_ring_carries_tensors_of_any_layout(
    unmapped: Any, dim: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    for n in range(2):  # recorded, and run again
        query, key, value = draw(seed + n, (1, 3, 77, dim), (1, 3, 150, dim), (1, 3, 150, dim), dtype=dtype)
        if strided:
            query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
        out = unmapped.bind(request(query, key))(query, key, value)
        assert relative_error(out, reference(query, key, value).out) <= (1e-5 if dtype == torch.float32 else 2e-3)
    assert unmapped.recorder.ring.nbytes == 3 * 8192


def test_split_keys_are_merged_in_every_run_of_a_recording(
    unmapped: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The last work group counts the others: from zero on, in memory that held anything, and leaves zero for the
    next.
    """
    gpu = unmapped.recorder.gpu
    allocate = gpu.allocate

    def used(nbytes: int, **how: Any) -> Any:
        block, filling = allocate(nbytes, **how), gpu.begin()
        gpu.fill(filling, Bound(block, 0, nbytes), 7)
        gpu.end(filling)
        gpu.wait(gpu.submit(filling), "fill memory", 30.0)
        gpu.drop(filling)
        return block

    monkeypatch.setattr(gpu, "allocate", used)
    for n in range(6):
        keys = 700 + n % 2  # two recordings in turn
        query, key, value = draw(seed + n, (1, 8, 1, 32), (1, 2, keys, 32), (1, 2, keys, 32))
        out = unmapped.bind(request(query, key))(query, key, value)
        assert relative_error(out, reference(query, key, value).out) <= 1e-5
    assert len(unmapped.recorder._kept) == 2
    (dispatched,) = unmapped.recorder.shaders.made
    assert dispatched[0] == "forward_rows.float32", "and nothing merges after it"


def test_the_ring_stays_bounded_and_is_given_back(unmapped: Any, seed: int) -> None:
    query, key, value = draw(seed, *[(1, 4, 500, 64)] * 3)
    unmapped.bind(request(query, key))(query, key, value)
    assert unmapped.recorder.staging.peak < query.nbytes, "large tensors pass through the ring alone"
    assert unmapped.memory.trim() > unmapped.recorder.ring.nbytes == 0
    add = unmapped.kernel("vector_add")
    assert torch.equal(add(query.view(-1), key.view(-1)), query.view(-1) + key.view(-1))


def test_strided_rows_longer_than_a_slot_pass_through_the_ring(unmapped: Any, seed: int) -> None:
    add, (long, tall) = unmapped.kernel("vector_add"), draw(seed, (10000,), (3000, 2))
    assert torch.equal(add(long[::2], long[1::2]), long[::2] + long[1::2])
    assert torch.equal(add(tall.t(), tall.t()), 2 * tall.t())


def test_a_recording_writes_into_the_tensor_that_it_is_given(session: Any, seed: int) -> None:
    query, key, value = draw(seed, *[(1, 2, 12, 32)] * 3)
    want = reference(query, key, value).out
    prepared = session.prepare_attention(query, key, value, request=request(query, key))
    places = [torch.empty(want.shape), torch.empty(1, 12, 2, 32).transpose(1, 2), torch.empty(want.shape).double()]
    for out in places * 2:
        assert session.compute_attention(prepared, out=out.fill_(0)).out is out
        assert relative_error(out, want) <= 1e-5


def test_kernels_beside_attention_are_recorded_for_their_shapes_and_numbers(
    session: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    step, made = session.kernel("reaction_diffusion_step"), recordings(session, monkeypatch)
    u, v = draw(seed, (3, 9, 11), (3, 9, 11))
    mean = u.mean()
    for _ in range(20):
        u, v = step(u, v, dt=0.5, reaction=0.0)
    assert len(made) == 2, "kept when the numbers come again"
    assert torch.isclose(u.mean(), mean, atol=1e-5)
    assert u.std() < 0.6, "twenty steps smooth the field; one step done twenty times over would not"
    step(u, v, dt=0.25, reaction=0.0)
    assert len(made) == 3


@pytest.mark.parametrize("shape", [(16, 12, 30, 32), (1, 8, 512, 40), (40000,), (3, 70000), (1, 1, 1, 32769)])
def test_small_copies_of_any_layout_are_whole(shape: tuple[int, ...], seed: int) -> None:
    source = draw(seed, shape)[0]
    for given in (source, source.transpose(0, -1), source.half()):
        target = torch.full([*given.shape[:-1], given.shape[-1] + 3], 7.0)[..., : given.shape[-1]]
        command_buffer._copy(target, given, 1 << 30)
        assert torch.equal(target, given.float())


def test_steps_of_changing_lengths_push_no_recording_out(
    session: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    query, field = draw(seed, (1, 1, 8, 32), (1, 8, 8))
    run, step = session.bind(request(query, query)), session.kernel("ricci_flow_step")
    run(query, query, query)
    for n in range(recorder.KEPT + 10):
        step(0.1 * field, 1e-6 * n)
    kept = len(session.recorder._kept)
    assert kept <= 2
    made = recordings(session, monkeypatch)
    run(query, query, query)
    assert not made
    for _ in range(5):
        step(0.1 * field, 0.01)
    assert len(made) == 2, "a length that comes again is recorded, and run from then on"

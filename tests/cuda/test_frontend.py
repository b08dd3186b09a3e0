"""Own kernels behind PyTorch's operators, as far as it needs no GPU: activations, statistics, `varlen_attn`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import hal_cuda
import pytest
import torch
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def somewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that is taken to have a GPU: this torch may have no kernels for one."""
    from hal_cuda.frontend import activation

    monkeypatch.setattr(activation, "find_devices", lambda name: [])
    hal_cuda.deactivate_sdpa()
    yield
    hal_cuda.deactivate_sdpa()


def replaced() -> bool:
    """Whether own kernels are behind PyTorch's operator."""
    from hal_cuda.frontend import activation

    name = "aten::_scaled_dot_product_flash_attention"
    there = torch._C._dispatch_dump(name)
    assert (activation._state.installed is not None) == ("hal_cuda" in there), there
    return "hal_cuda" in there


def test_nothing_is_active_on_import() -> None:
    code = "import hal_cuda, sys; assert 'torch' not in sys.modules; hal_cuda.activate_sdpa; import torch; "
    code += "assert 'hal_cuda' not in torch._C._dispatch_dump('aten::_scaled_dot_product_flash_attention')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cuda import discovery
    from hal_cuda.runtime import nvml

    from hal_core.registry import registry

    def absent() -> int:
        raise nvml.NvmlError("no NVIDIA driver is installed")

    monkeypatch.setattr(discovery.nvml, "count", absent)
    registry.refresh("cuda")
    with pytest.raises(hal.DeviceUnavailableError, match="driver"):
        hal_cuda.activate_sdpa()
    assert not replaced()


def test_activations_end_one_by_one_or_together(somewhere: None) -> None:
    assert not hal_cuda.deactivate_sdpa()
    first = hal_cuda.activate_sdpa()
    with hal_cuda.activate_sdpa():
        assert replaced()
    assert replaced()
    first.remove()
    first.remove()
    assert not replaced()
    hal_cuda.activate_sdpa()
    hal_cuda.activate_sdpa()
    assert replaced()
    assert hal_cuda.deactivate_sdpa()
    assert not hal_cuda.deactivate_sdpa()
    assert not replaced()


def test_a_block_ends_with_an_error_too(somewhere: None) -> None:
    with pytest.raises(ZeroDivisionError), hal_cuda.activate_sdpa():
        raise ZeroDivisionError
    assert not replaced()


def test_overlapping_blocks_of_threads(somewhere: None) -> None:
    """The kernels stay until the last block ends, in whichever order they end."""
    with hal_cuda.activate_sdpa() as outer:
        inner = hal_cuda.activate_sdpa()
        outer.remove()
        assert replaced()
    assert replaced()
    inner.remove()
    assert not replaced()

    def toggle() -> None:
        for _ in range(20):
            with hal_cuda.activate_sdpa():
                assert replaced()

    failed: list[BaseException] = []

    def work() -> None:
        try:
            toggle()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not replaced()


def test_torchs_registry_of_implementations_knows_it(somewhere: None) -> None:
    from torch.nn import attention

    assert "HAL" in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("HAL")
    assert replaced()
    attention.restore_flash_attention_impl()
    assert not replaced()


def test_counts_of_many_threads_add_up() -> None:
    from hal_cuda.frontend.statistics import Counts

    counts = Counts()

    def count() -> None:
        for _ in range(500):
            counts.own("one")
            counts.original("two", "a reason")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.read(reset=True) == ({"one": 2000}, {"two": 2000}, {"a reason": 2000})
    assert counts.read() == ({}, {}, {})


class Aux:
    lse = True


def plain(
    q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence [length, heads, dim] in float64; the diagonal ends in the last row and key."""
    group = q.shape[1] // k.shape[1]
    query, key, value = (t.double().transpose(0, 1) for t in (q, k, v))
    key, value = (t.repeat_interleave(group, 0) for t in (key, value))
    scores = query @ key.mT * (scale or q.shape[2] ** -0.5)
    apart = torch.arange(k.shape[0])[None] - torch.arange(q.shape[0])[:, None] - (k.shape[0] - q.shape[0])
    seen = torch.ones_like(apart, dtype=torch.bool)
    if window[0] >= 0:
        seen &= apart >= -window[0]
    if window[1] >= 0:
        seen &= apart <= window[1]
    scores = scores.masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ value).transpose(0, 1), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (6, 0), (4, 3)])
@pytest.mark.parametrize("same", [True, False], ids=["same lengths", "own lengths"])
def test_packed_sequences(window: tuple[int, int], same: bool) -> None:
    ends_q = [0, 5, 5, 20]
    ends_k = ends_q if same else [0, 9, 12, 30]
    q = torch.randn(20, 4, 16, requires_grad=True)
    k, v = (torch.randn(ends_k[-1], 2, 16, requires_grad=True) for _ in range(2))
    cu_q = torch.tensor(ends_q, dtype=torch.int32)
    cu_k = cu_q if same else torch.tensor(ends_k, dtype=torch.int32)
    given = (q, k, v, cu_q, cu_k, 15, max(b - a for a, b in pairwise(ends_k)))
    options: dict[str, Any] = {"window_size": window, "scale": 0.3, "enable_gqa": True}
    if window == (4, 3) and not same:
        with pytest.raises(hal.UnsupportedError, match=r"window without causal.*torch\.nn\.attention\.varlen"):
            hal_cuda.varlen_attn(*given, **options)
        return
    out, lse = hal_cuda.varlen_attn(*given, **options, return_aux=Aux)
    assert relative_error(out, hal_cuda.varlen_attn(*given, **options)) <= 1e-5
    parts = [
        plain(q[a:b], k[c:d], v[c:d], window, 0.3)
        for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)
    ]
    want = torch.cat([part[0] for part in parts])
    assert relative_error(out, want) <= 1e-5
    assert relative_error(lse, torch.cat([part[1] for part in parts], 1)) <= 1e-5
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    for one, two in zip(found, torch.autograd.grad(want, (q, k, v), grad.double()), strict=True):
        assert relative_error(one, two) <= 1e-5


def test_pages_of_a_cache() -> None:
    held, page, heads = [7, 12], 4, 2
    pool_k, pool_v = (torch.randn(8, page, heads, 16) for _ in range(2))
    table = torch.tensor([[5, 2, 0], [1, 7, 3]], dtype=torch.int32)
    q = torch.randn(6, 4, 16)
    cu_q = torch.tensor([0, 3, 6], dtype=torch.int32)
    used = torch.tensor(held, dtype=torch.int32)
    options: dict[str, Any] = {"enable_gqa": True, "block_table": table, "window_size": (-1, 0)}
    out, lse = hal_cuda.varlen_attn(q, pool_k, pool_v, cu_q, None, 3, 12, seqused_k=used, return_aux=Aux, **options)
    for place, length in enumerate(held):
        k, v = (pool[table[place].long()].flatten(0, 1)[:length] for pool in (pool_k, pool_v))
        want, want_lse = plain(q[3 * place : 3 * place + 3], k, v, (-1, 0))
        assert relative_error(out[3 * place : 3 * place + 3], want) <= 1e-5
        assert relative_error(lse[:, 3 * place : 3 * place + 3], want_lse) <= 1e-5
    given = (q, pool_k, pool_v, cu_q, None)
    with pytest.raises(hal.ContractError, match="seqused_k"):
        hal_cuda.varlen_attn(*given, 3, 12, **options)
    with pytest.raises(hal.UnsupportedError, match="differ in number"):
        hal_cuda.varlen_attn(*given, 4, 12, seqused_k=used, **options)


def test_varlen_attn_refuses_as_pytorchs_does() -> None:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, 4], dtype=torch.int32)
    q, k = torch.randn(4, 6, 8), torch.randn(4, 4, 8)
    for options in ({}, {"enable_gqa": True}):
        said = []
        for call in (hal_cuda.varlen_attn, varlen_attn):
            with pytest.raises(ValueError, match="heads") as told:
                call(q, k, k, ends, ends, 4, 4, **options)
            said.append(str(told.value))
        assert said[0] == said[1]
    with pytest.raises(hal.UnsupportedError, match="num_splits=1"):
        hal_cuda.varlen_attn(k, k, k, ends, ends, 4, 4, num_splits=1)
    with pytest.raises(hal.UnsupportedError, match="seqused_k without a block_table"):
        hal_cuda.varlen_attn(k, k, k, ends, ends, 4, 4, seqused_k=ends[1:])

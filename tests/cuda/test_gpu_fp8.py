"""FP8 attention on a GPU of compute capability 9.0, and what its sums in two levels are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_reference import draw, error, exact
from torch import Tensor

import hal_core as hal
from hal_core.registry import registry

#: Normal draws: weights and operands keep 4 significant bits.
BOUND = 0.06
CASES = [
    # len_q, len_k, options
    (1024, 1024, {}),
    (1024, 1024, {"causal": "top_left"}),
    (1000, 777, {}),
    (333, 1500, {"causal": "bottom_right"}),
    (700, 333, {"causal": "bottom_right"}),
    (500, 461, {"causal": "top_left", "diagonal": 7}),
    (1, 300, {}),
    (130, 1, {}),
]


@pytest.fixture
def hopper(gpu: str) -> str:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FP8 attention needs compute capability 9.0")
    return gpu


def fp8(device: str, *given: Tensor, scales: str = "block", centred: bool = False, **options: Any) -> Any:
    with hal.use(device, options={"fp8": scales + " centred" * centred}), torch.no_grad():
        return hal.attention(*given, return_lse=True, enable_gqa=True, **options)


def path(device: str, levels: int, *given: Tensor) -> Any:
    """The FP8 path with sums in one or two levels."""
    from hal_cuda.kernels.fp8.launch import Fp8Path

    request = hal.explain(*given, backend=device).request
    session: Any = registry.session(device)
    return Fp8Path(request, session._context, levels=levels)


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_fp8_agrees_with_float64(hopper: str, seed: int, dim: int, scales: str, centred: bool) -> None:
    for place, (len_q, len_k, options) in enumerate(CASES):
        layout = "heads last" if place % 2 else "heads first"
        query = draw(seed + place, 2, 4, len_q, dim, torch.bfloat16, layout)
        key, value = (draw(seed + place + i, 2, 2, len_k, dim, torch.bfloat16, layout) for i in (100, 200))
        out, lse = exact(query, key, value, **options)
        dead = torch.isneginf(lse)
        for _ in range(3):  # a race shows as an error that moves
            got = fp8(hopper, query, key, value, scales=scales, centred=centred, **options)
            assert not bool(torch.isnan(got.out).any())
            assert error(got.out, out) <= BOUND, (len_q, len_k, options)
            assert torch.equal(torch.isneginf(got.lse), dead)
            assert bool((got.out[dead] == 0).all())
            assert float((got.lse[~dead] - lse[~dead]).abs().max()) <= 0.3


@pytest.mark.parametrize(("dim_qk", "dim_v"), [(192, 128), (64, 128), (128, 64), (64, 256), (256, 40)])
def test_a_value_size_of_its_own(hopper: str, seed: int, dim_qk: int, dim_v: int) -> None:
    query, key = (draw(seed + i, 1, 2, 500, dim_qk, torch.bfloat16) for i in range(2))
    value = draw(seed + 2, 1, 2, 500, dim_v, torch.bfloat16)
    got = fp8(hopper, query, key, value, causal="top_left")
    assert error(got.out, exact(query, key, value, causal="top_left")[0]) <= BOUND


def test_centred_keys_bear_a_large_common_part(hopper: str, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 2, 1000, 128, torch.bfloat16) for i in range(3))
    key = key + 30 * draw(seed + 3, 1, 2, 1, 128, torch.bfloat16)
    out, lse = exact(query, key, value)
    got = fp8(hopper, query, key, value, centred=True)
    # bfloat16 keys of that size have steps of 1/8 themselves, so `exact` has the same ones.
    assert error(got.out, out) <= BOUND
    assert error(got.lse, lse) <= 1e-2
    assert error(fp8(hopper, query, key, value).out, out) > 2 * BOUND


def test_long_sums_of_values_of_one_sign_need_two_levels(hopper: str, seed: int) -> None:
    query, key = draw(seed, 1, 1, 128, 128, torch.bfloat16), draw(seed + 1, 1, 1, 131072, 128, torch.bfloat16)
    value = torch.ones_like(key)
    two, one = (path(hopper, levels, query, key, value)(query, key, value).out.float() for levels in (2, 1))
    assert float((two - 1).abs().max()) <= 0.03
    assert float((one - 1).abs().max()) > 0.1


def test_magnitudes_are_of_no_matter(hopper: str, seed: int) -> None:
    """Scales carry them: of heads, and of blocks."""
    query, key, value = (draw(seed + i, 1, 2, 512, 128, torch.bfloat16) for i in range(3))
    scaled = value.clone()
    scaled[:, :, :256] *= 2.0**-20
    scaled[:, 1] *= 2.0**30
    want = exact(query, key, scaled)[0]
    got = fp8(hopper, query, key, scaled).out
    for head in range(2):
        assert error(got[:, head], want[:, head]) <= BOUND
    small = fp8(hopper, query * 2.0**-30, key * 2.0**30, value).out
    assert torch.equal(small, fp8(hopper, query, key, value).out)


def test_fp8_is_replayed_in_a_graph(hopper: str, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 2, 512, 128, torch.bfloat16) for i in range(3))
    want = fp8(hopper, query, key, value).out
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = fp8(hopper, query, key, value).out
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)

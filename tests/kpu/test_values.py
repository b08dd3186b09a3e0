"""Products inside `array_values` come from the stepped PEs and equal torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hal_kpu.profiles.profile import load
from hal_kpu.simulator import values
from hal_kpu.simulator.values import array_values

SMALL = load("t4x4")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("dataflow", ["os", "ws", "is"])
def test_integers_are_equal_bit_for_bit(dtype, dataflow, seed):
    a, b = draw(seed, 2, 5, 9, dtype=dtype), draw(seed, 2, 9, 6, dtype=dtype)
    with array_values(SMALL, dataflow) as counted:
        got = a @ b
    assert counted.active_macs == 2 * 5 * 9 * 6
    assert got.dtype == dtype
    assert torch.equal(got, a @ b)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_floats_agree_and_keep_their_type(dtype, error, seed):
    a, b, c = (draw(seed, *shape, dtype=dtype) for shape in ((5, 9), (9, 6), (6,)))
    for function in (
        lambda: a @ b,
        lambda: torch.addmm(c, a, b, beta=0.5, alpha=2),
        lambda: a @ b[:, 0],
        lambda: a[0] @ b[:, 1],
    ):
        want = function()
        with array_values(SMALL) as counted:
            got = function()
        assert counted.products == 1
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert (got.double() - want.double()).norm() <= error * want.double().norm()


@pytest.mark.parametrize(("axes", "transposed"), [*itertools.product((1, 2, 3), (False, True))])
def test_convolutions_and_their_gradients_agree(axes, transposed, seed):
    for groups, stride, padding, dilation in itertools.product((1, 2), (1, 2), (0, 1), (1, 2)):
        window, space = [3, 2, 3][:axes], [7, 8, 6][:axes]
        x = draw(seed, 2, 4, *space)
        w = draw(seed, 4, 6 // groups, *window) if transposed else draw(seed, 6, 4 // groups, *window)
        more = 1 if transposed and max(stride, dilation) > 1 else 0
        how = [[stride] * axes, [padding] * axes, [dilation] * axes, transposed, [more] * axes, groups]
        want = torch.convolution(x, w, draw(seed, 6), *how)
        grad = draw(seed, *want.shape)

        def backward(grad=grad, x=x, w=w, how=how):
            return torch.ops.aten.convolution_backward(grad, x, w, [6], *how, [True, True, True])

        wanted = [want, *backward()]
        with array_values(SMALL) as counted:
            got = [torch.convolution(x, w, draw(seed, 6), *how), *backward()]
        assert counted.products == 3
        for mine, theirs in zip(got, wanted, strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), how


def test_a_late_register_is_seen_in_the_values(monkeypatch, seed):
    a, b = draw(seed, 4, 6), draw(seed, 6, 4)
    real = values.multiply
    monkeypatch.setattr(values, "multiply", lambda *args: real(*args, delays=(("right", 1, 1),)))
    with array_values(SMALL):
        got = a @ b
    assert (got - a @ b).norm() > 0.1 * (a @ b).norm()


def test_complex_and_empty_products_stay_with_torch():
    a = torch.ones(2, 2, dtype=torch.complex64)
    with array_values(SMALL) as counted:
        assert torch.equal(a @ a, torch.full((2, 2), 2 + 0j))
        assert (torch.ones(2, 0) @ torch.ones(0, 3)).eq(0).all()
    assert counted.products == 0

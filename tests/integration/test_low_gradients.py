"""Gradients of rows whose additive mask is very low everywhere: a float32 log-sum-exp does not hold their sum.

The queries of these rows are 0, so that their weights are equal in any precision.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import hal_core as hal  # noqa: E402
from hal_core.testing import reference, reference_gradients, relative_error  # noqa: E402

LOWEST = torch.finfo(torch.float32).min
LEN_Q, LEN_K = 12, 200


@pytest.fixture(params=["cpu", "opencl", "vulkan", "kpu"])
def device(request):
    try:
        return hal.session(f"{request.param}:0") and f"{request.param}:0"
    except hal.HalError as error:
        pytest.skip(str(error))


def operands(fill, seed):
    """Query, key, value, mask and the gradient that flows back; every third row is masked by `fill` wholly, the next in
    part.
    """
    torch.manual_seed(seed)
    query, key, value = torch.randn(2, 4, LEN_Q, 16), torch.randn(2, 2, LEN_K, 16), torch.randn(2, 2, LEN_K, 16)
    mask = torch.zeros(2, 1, LEN_Q, LEN_K)
    mask[:, :, 0::3], query[:, :, 0::3] = fill, 0
    mask[:, :, 1::3, 5:] = fill
    mask[:, :, 3, 2::3] = -torch.inf
    return query, key, value, mask, torch.randn(2, 4, LEN_Q, 16)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"softcap": 4.0}, {"window": (None, 150)}], ids=str)
@pytest.mark.parametrize("fill", [-300.0, -1e4, -1e9, LOWEST])
def test_gradients_of_low_rows_agree_with_float64(device, fill, options, seed):
    *tensors, mask, grad_out = operands(fill, seed)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    result = hal.attention(*leaves, mask, enable_gqa=True, backend=device, **options)
    (result[0] if options.get("return_lse") else result).backward(grad_out)
    given = {name: value for name, value in options.items() if name != "return_lse"}
    wanted = reference_gradients(*leaves, mask, grad_out=grad_out, enable_gqa=True, **given)
    for leaf, grad in zip(leaves, wanted, strict=False):
        assert relative_error(leaf.grad, grad) <= 2e-5


@pytest.mark.parametrize("fill", [-300.0, LOWEST])
def test_a_part_of_the_keys_takes_the_log_sum_exp_of_all(device, fill, seed):
    """What a ring does: each part's backward is given the result for all keys, low rows beside ordinary ones."""
    query, key, value, mask, grad_out = operands(fill, seed)
    grad_out[:, :, 0::3] = 0  # of these rows the parts' shares are lost
    session, named = hal.session(device), {"enable_gqa": True, "return_lse": True}
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    wanted = reference_gradients(*leaves, mask, grad_out=grad_out, enable_gqa=True)
    out, lse = (t.detach().float() for t in reference(query, key, value, mask, enable_gqa=True))
    total, found = torch.zeros(query.shape), []
    for keys in (slice(0, 60), slice(60, LEN_K)):
        part = [query, key[:, :, keys], value[:, :, keys]]
        decision = hal.explain(*part, mask[..., keys], backend=device, **named)
        prepared = session.prepare_attention(*(t.detach() for t in part), request=decision.request)
        grads = session.compute_attention_backward(prepared, out, lse, grad_out, mask[..., keys])
        total += grads.query
        found.append(grads)
    assert relative_error(total, wanted.query) <= 2e-5
    assert relative_error(torch.cat([g.key for g in found], 2), wanted.key) <= 2e-5
    assert relative_error(torch.cat([g.value for g in found], 2), wanted.value) <= 2e-5


@pytest.mark.parametrize("fill", [-300.0, -1e9, LOWEST])
def test_parts_of_equal_keys_merge_to_the_whole(device, fill, seed):
    query, key, value, mask, grad_out = operands(fill, seed)
    mask[:, :, 3, 2::3] = fill  # as many keys in each part
    leaves, half = [tensor.requires_grad_() for tensor in (query, key, value)], LEN_K // 2
    outs, sums = zip(
        *(
            hal.attention(
                query,
                key[:, :, keys],
                value[:, :, keys],
                mask[..., keys],
                enable_gqa=True,
                return_lse=True,
                backend=device,
            )
            for keys in (slice(0, half), slice(half, LEN_K))
        ),
        strict=True,
    )
    out, lse = hal.merge_partials(torch.stack(outs), torch.stack(sums))
    want = reference(query, key, value, mask, enable_gqa=True)
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse, want.lse) <= 1e-5
    out.backward(grad_out)
    wanted = reference_gradients(*leaves, mask, grad_out=grad_out, enable_gqa=True)
    for leaf, grad in zip(leaves, wanted, strict=False):
        assert relative_error(leaf.grad, grad) <= 2e-5

"""Kernels of very short rows, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hal_cuda.kernels.gradients import OwnBackward
from hal_cuda.kernels.portable import short_launch
from hal_cuda.kernels.portable.dropout import dropout_pattern
from hal_cuda.kernels.portable.short_launch import ShortBackward, ShortPath, takes
from interpreted_device import CHIP, CONTEXT
from torch import Tensor

from hal_core import Grads
from hal_core.testing import reference, reference_gradients, relative_error
from hal_core.testing.reference import request_of

RNG = (5, 1 << 40)
BOUND = 2e-3


def unused(*given: Any) -> Any:
    raise AssertionError("the tensors suit the kernel")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (None, {}),
        (None, {"causal": "bottom_right", "softcap": 3.0}),
        (None, {"window": (5, 2), "diagonal": 1, "dropout_p": 0.3}),
        ((1, 2, 20, 33), {}),
        ((1, 2, 20, 33), {"dropout_p": 0.3, "causal": "top_left"}),
        ((3, 1, 1, 33), {}),
        ((3, 2, 20, 33), {"softcap": 3.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_results_and_gradients_agree_with_float64(
    generator: torch.Generator, shape: tuple[int, ...] | None, options: dict[str, Any], kind: str
) -> None:
    draw = lambda *size: torch.randn(size, generator=generator).half()  # noqa: E731
    query, key, value = draw(3, 2, 20, 16), draw(3, 2, 33, 16), draw(3, 2, 33, 24)
    mask: Tensor | None = None
    grads = {"q", "k", "v"}
    if shape is not None:
        visible = torch.rand(shape, generator=generator) > 0.3
        if shape[2] > 1:
            visible[:, :, ::7] = False
        mask = visible if kind == "boolean" else draw(*shape).masked_fill(~visible, -math.inf)
        grads |= {"mask"} if kind == "additive" and shape[0] == 1 else set()
    request = replace(request_of(query, key, value, mask, grads=frozenset(grads), **options), lse=True)
    out, lse = ShortPath(request, CONTEXT, unused)(query, key, value, mask, None, None, RNG)
    keep = None
    if request.dropout:
        keep = dropout_pattern(CHIP, (3, 2, 20, 33), request.dropout, RNG, "cpu")
    else:
        want, want_lse = reference(query, key, value, mask, request=request)
        assert relative_error(out, want) <= BOUND
        assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
        assert relative_error(lse[~torch.isneginf(lse)], want_lse[~torch.isneginf(lse)]) <= 1e-3
    grad_out, grad_lse = draw(*out.shape), torch.randn(lse.shape, generator=generator)
    found = ShortBackward(request, CONTEXT)(query, key, value, out, lse, grad_out, mask, grad_lse, RNG)
    assert found is not None
    given: dict[str, Any] = {"grad_out": grad_out, "grad_lse": grad_lse, "keep": keep}
    exact = reference_gradients(query, key, value, mask, request=request, **given)
    for name, got, right in zip(Grads._fields, found, exact, strict=True):
        assert (got is None) == (right is None), name
        if got is not None:
            assert relative_error(got, right) <= BOUND, name


def test_gradients_of_a_part_of_the_keys_follow_the_whole_log_sum_exp(generator: torch.Generator) -> None:
    """What rings and split keys need: weights are those of all keys."""
    query, grad_out = (torch.randn(2, 2, 20, 16, generator=generator).half() for _ in range(2))
    key, value = (torch.randn(2, 2, 40, 16, generator=generator).half() for _ in range(2))
    request = replace(request_of(query, key, value, grads=frozenset("qkv")), lse=True)
    out, lse = ShortPath(request, CONTEXT, unused)(query, key, value)
    want = reference_gradients(query, key, value, grad_out=grad_out)
    half = replace(request, len_k=24)
    given = (query, key[:, :, :24], value[:, :, :24], out, lse, grad_out, None, None, None)
    found = ShortBackward(half, CONTEXT)(*given)
    assert found is not None
    assert relative_error(found.key, want.key[:, :, :24]) <= BOUND


def test_rows_wholly_at_a_masks_lowest_number_weigh_their_keys_alike(generator: torch.Generator) -> None:
    query, key, value, grad_out = (torch.randn(2, 2, 20, 16, generator=generator).half() for _ in range(4))
    mask = torch.zeros(1, 1, 20, 20)
    mask[:, :, 3:9] = torch.finfo(torch.float32).min
    request = replace(request_of(query, key, value, mask, grads=frozenset("qkv"), scale=2.0**-30), lse=True)
    out, lse = ShortPath(request, CONTEXT, unused)(query, key, value, mask)
    found = ShortBackward(request, CONTEXT)(query, key, value, out, lse, grad_out, mask, None, None)
    want = reference_gradients(query, key, value, mask, grad_out=grad_out, request=request)
    assert found is not None
    assert relative_error(found.value, want.value) <= BOUND


def test_which_requests_go_there(generator: torch.Generator) -> None:
    query = torch.randn(256, 4, 49, 32, generator=generator).half()
    request = request_of(query, query, query, grads=frozenset("qkv"))
    assert takes(request)
    assert OwnBackward("portable", replace(request, lse=True), CONTEXT)._short is not None
    for change in ({"len_k": 65}, {"len_q": 16}, {"dim_v": 72}, {"heads_kv": 2}, {"batch": 2}, {"dtype": "float32"}):
        assert not takes(replace(request, **change))  # type: ignore[arg-type]
    assert short_launch.mask_groups(request) == 64

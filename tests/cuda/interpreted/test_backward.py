"""The portable Triton backward in Triton's interpreter, against gradients in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hal_cuda.kernels.portable.backward_launch import PortableBackward, backward_memory
from hal_cuda.kernels.portable.dropout import dropout_pattern
from hal_cuda.kernels.portable.launch import PortablePath
from interpreted_device import CHIP, CONTEXT, context
from torch import Tensor

from hal_core import BlockPlan, Grads, SequenceMetadata
from hal_core.testing import reference_gradients, relative_error
from hal_core.testing.reference import request_of

RNG = (5, 1 << 40)


def gradients(
    generator: torch.Generator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    through_lse: bool = True,
    wanted: str = "qkvm",
    **options: Any,
) -> tuple[Grads, Grads]:
    """(found, wanted in float64) from the portable forward's own output, with a random gradient of it."""
    wants_mask = mask is not None and mask.dtype != torch.bool and "m" in wanted
    grads = frozenset({*wanted} & {*"qkv"}) | ({"mask"} if wants_mask else set())
    request = request_of(query, key, value, mask, plan=plan, tables=tables, grads=grads, **options)
    request = replace(request, lse=True)
    wide = mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
    out, lse = PortablePath(request, CONTEXT)(query, key, value, wide, plan, tables, RNG)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator) if through_lse else None
    backward = PortableBackward(request, CONTEXT)
    found = backward(query, key, value, out, lse, grad_out, mask, plan, tables, grad_lse=grad_lse, rng=RNG)
    keep = None
    if request.dropout:
        keep = dropout_pattern(CHIP, (*out.shape[:3], key.shape[2]), request.dropout, RNG, "cpu")  # type: ignore[arg-type]
    given = {"grad_out": grad_out, "grad_lse": grad_lse, "plan": plan, "tables": tables, "keep": keep}
    return found, reference_gradients(query, key, value, mask, request=request, **given)


def agree(pair: tuple[Grads, Grads], bound: float = 1e-5) -> None:
    for name, found, want in zip(Grads._fields, *pair, strict=True):
        assert (found is None) == (want is None), name
        if found is not None:
            assert relative_error(found, want) <= bound, name


def draw(
    generator: torch.Generator,
    len_q: int,
    len_k: int,
    dim: int = 24,
    dim_v: int = 0,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = ((batch, heads[0], len_q, dim), (batch, heads[1], len_k, dim), (batch, heads[1], len_k, dim_v or dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (37, 53, {}),
        (64, 64, {"causal": "top_left"}),
        (70, 33, {"causal": "bottom_right"}),
        (40, 90, {"causal": "bottom_right", "diagonal": -9, "window": (20, 0)}),
        (33, 47, {"window": (7, 3), "diagonal": 2}),
        (70, 80, {"window": (None, 3)}),
        (80, 70, {"window": (3, None)}),
        (40, 64, {"softcap": 2.0}),
        (64, 40, {"softcap": 3.0, "causal": "top_left"}),
        (1, 70, {"causal": "bottom_right"}),
    ],
)
def test_gradients_agree_with_float64(
    generator: torch.Generator, len_q: int, len_k: int, options: dict[str, Any]
) -> None:
    agree(gradients(generator, *draw(generator, len_q, len_k), **options))

"""Attention that skips tiles, in Triton's interpreter. Run by tests/cuda/test_interpreted.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_cuda.paths import candidates
from interpreted_device import CHIP, InterpretedBackend
from torch import Tensor

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import reference, relative_error

DEVICE = "interpreted:0"


@pytest.fixture(autouse=True)
def device() -> Any:
    hal.register(InterpretedBackend(), name="interpreted")
    yield
    hal.unregister("interpreted")


def drawn(generator: torch.Generator, far: float = 0.0, len_q: int = 70, len_k: int = 300) -> tuple[Tensor, ...]:
    """Query, key and value; the middle keys' scores lie `far` below the others', natural units."""
    query, key, value = (
        torch.randn(1, heads, length, 32, generator=generator) for heads, length in ((4, len_q), (2, len_k), (2, len_k))
    )
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :, 64:256, 0] = -far * 32**0.5
    return query.half(), key.half(), value.half()


def attend(threshold: int, *given: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
    with hal.use(DEVICE, options={"skip_tiles": threshold}), torch.no_grad():
        result = hal.attention(*given, enable_gqa=True, return_lse=True, **options)
    return result.out, result.lse, registry.session(DEVICE).skipped_tiles()


def exact(*given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    request = hal.explain(*given, backend=DEVICE, enable_gqa=True, return_lse=True, **options).request
    found = reference(*given, request=request)
    return found.out, found.lse


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"causal": "bottom_right"}], ids=str)
@pytest.mark.parametrize("lengths", [(70, 300), (130, 65)])
def test_without_negligible_tiles_nothing_is_skipped(
    options: dict[str, Any], lengths: tuple[int, int], generator: torch.Generator
) -> None:
    given = drawn(generator, 0.0, *lengths)
    out, lse, counted = attend(100, *given, **options)
    want, want_lse = exact(*given, **options)
    assert relative_error(out, want) <= 2e-3
    finite = torch.isfinite(want_lse)
    assert torch.equal(finite, torch.isfinite(lse))
    assert relative_error(lse[finite], want_lse[finite]) <= 1e-3
    assert counted.lost == 0.0
    assert counted.tiles > 0


def test_negligible_tiles_are_skipped_counted_and_bounded(generator: torch.Generator) -> None:
    given = drawn(generator, 20.0)
    out, lse, counted = attend(10, *given)
    assert counted.tiles == 2 * 4 * 5  # tiles of 64 rows, heads, tiles of 64 keys
    assert counted.skipped == 2 * 4 * 3  # keys 64 to 255 of every row tile
    assert counted.share == 0.6
    want, want_lse = exact(*given)
    lost = 1 - (lse.double() - want_lse).exp()  # of the sum of weights
    assert 0 < counted.lost < 2**-10 * 192
    assert lost.max() <= counted.lost + 1e-5
    assert relative_error(out, want) <= 2e-3 + counted.lost
    assert registry.session(DEVICE).skipped_tiles() == (0, 0, 0.0)  # counted anew


def test_a_low_threshold_keeps_what_a_high_one_skips(generator: torch.Generator) -> None:
    given = drawn(generator, 8.0)
    exactly, coarsely = attend(60, *given)[2], attend(4, *given)[2]
    assert exactly.skipped == 0
    assert coarsely.skipped > 0
    assert coarsely.lost > 0


def test_a_nan_reaches_the_result(generator: torch.Generator) -> None:
    query, key, value = drawn(generator, 20.0)
    key[0, 0, 100, 3] = float("nan")
    out = attend(10, query, key, value)[0]
    assert out[0, :2].isnan().all()
    assert not out[0, 2:].isnan().any()


def test_tiles_are_never_skipped_unasked() -> None:
    given = (torch.zeros(1, 2, 128, 32, dtype=torch.float16),) * 3
    request = hal.explain(*given, backend=DEVICE).request
    assert "skipping" not in candidates(request, CHIP)


@pytest.mark.parametrize(
    "options", [{"window": (10, 0)}, {"softcap": 5.0}, {"attn_mask": torch.ones(128, 128, dtype=torch.bool)}], ids=str
)
def test_what_skipping_does_not_serve_is_refused(options: dict[str, Any]) -> None:
    given = (torch.zeros(1, 2, 128, 32, dtype=torch.float16),) * 3
    with hal.use(DEVICE, options={"skip_tiles": 10}), pytest.raises(hal.UnsupportedError, match="skip_tiles"):
        hal.attention(*given, **options)

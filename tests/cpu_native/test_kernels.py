"""The compiled kernels against float64, over every instruction set of this processor."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hypothesis")
native = pytest.importorskip("hal_cpu_native", reason="hal-cpu-native is not built here: make native")

from hypothesis import given, settings, strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from hal_core.testing import relative_error  # noqa: E402

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SETS = native.instruction_sets() or ("avx2",)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    band: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, all scores at once."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(key.shape[2])[None] - torch.arange(query.shape[2])[:, None]
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if band[0] is not None:
        seen &= distance >= band[0]
    if band[1] is not None:
        seen &= distance <= band[1]
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        seen &= mask > -math.inf
        scores = scores + mask.double()
    scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    return weights @ value, scores.logsumexp(-1)


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """A random call: sizes around block edges, strides, band, mask, softcap, scale, threads."""
    few = draw(st.booleans())
    batch, heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    len_q = draw(st.integers(1, 5)) if few else draw(st.sampled_from([1, 15, 17, 33, 64, 100, 257]))
    len_k = draw(st.sampled_from([1, 2, 63, 64, 65, 127, 130, 300, 513]))
    dim, dim_v = draw(st.sampled_from([8, 32, 40, 64, 96, 128])), draw(st.sampled_from([8, 24, 32, 64]))
    dtype = draw(st.sampled_from(list(BOUNDS)))
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    spread = draw(st.sampled_from([1.0, 1.0, 6.0]))
    query = (torch.randn(batch, len_q, heads_kv * group, dim) * spread).to(dtype).transpose(1, 2)
    more = draw(st.sampled_from([0, 1, 8]))  # odd row strides too
    key = torch.randn(batch, heads_kv, len_k, dim + more).to(dtype)[..., more:]
    value = torch.randn(batch, heads_kv, len_k, dim_v + more).to(dtype)[..., :dim_v]
    mask = None
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads_kv * group])))
        shape = (*shape, draw(st.sampled_from([1, len_q])), len_k)
        mask = torch.rand(shape) < draw(st.sampled_from([0.02, 0.5, 0.95]))
        if kind := draw(st.sampled_from([None, torch.float32, dtype])):
            hidden = draw(st.sampled_from([-math.inf, -math.inf, -1e4]))
            mask = (torch.randn(shape) * 3).masked_fill(~mask, hidden).to(kind)
            if draw(st.booleans()):  # keys apart in memory
                mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    ends = [None, 0, len_k - len_q, 7, -3]
    return {
        "operands": (query, key, value),
        "mask": mask,
        "band": (draw(st.sampled_from([None, None, -5, -100, len_k - len_q])), draw(st.sampled_from(ends))),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "threads": draw(st.sampled_from([1, 2, 3, 7])),
    }


@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=120)
@given(call=calls())
def test_every_call_agrees_with_float64(isa: str, call: dict[str, Any]) -> None:
    query, key, value = call["operands"]
    options = {name: call[name] for name in ("scale", "band", "softcap")}
    lse = torch.empty(query.shape[:3])
    out = native.attention(query, key, value, call["mask"], lse=lse, isa=isa, threads=call["threads"], **options)
    want, want_lse = reference(query, key, value, call["mask"], **options)
    empty = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool((out[empty] == 0).all())
    if not bool(empty.all()):
        assert relative_error(out, want) <= BOUNDS[query.dtype]
        assert float((lse.double() - want_lse)[~empty].abs().max()) <= 2e-5 * max(
            1.0, float(want_lse[~empty].abs().max())
        )


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("len_q", [1, 40])
def test_long_keys_and_split_keys_agree_with_float64(seed: int, isa: str, dtype: Any, len_q: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, n, 64).to(dtype) for heads, n in ((3, len_q), (3, 5000), (3, 5000)))
    lse = torch.empty(1, 3, len_q)
    out = native.attention(query, key, value, lse=lse, isa=isa, threads=4)
    want, want_lse = reference(query, key, value)
    assert relative_error(out, want) <= BOUNDS[dtype]
    assert relative_error(lse, want_lse) <= 1e-5


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("len_q", [3, 50])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_number_stays_alone(seed: int, isa: str, dtype: Any, len_q: int, bad: float) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, heads, n, 32).to(dtype) for heads, n in ((4, len_q), (2, 200), (2, 200)))
    clean = native.attention(query, key, value, isa=isa)
    query[1, 2, 1, 5] = bad
    out = native.attention(query, key, value, isa=isa)
    assert bool(out[1, 2, 1].isnan().all())
    others = torch.ones(out.shape[:3], dtype=torch.bool)
    others[1, 2, 1] = False
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("len_q", [1, 50])
def test_nan_in_keys_and_values_stays_with_its_head(seed: int, isa: str, len_q: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, heads, n, 32) for heads, n in ((4, len_q), (2, 200), (2, 200)))
    clean = native.attention(query, key, value, isa=isa)
    key[0, 1, 7], value[1, 0, 199] = math.nan, math.nan
    out = native.attention(query, key, value, isa=isa)
    for batch, heads in ((0, slice(0, 2)), (1, slice(2, 4))):
        assert torch.equal(out[batch, heads], clean[batch, heads])
    assert bool(out[0, 2:].isnan().all())
    assert bool(out[1, :2].isnan().all())


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("len_q", [2, 40])
def test_denormal_and_huge_inputs_are_right(seed: int, isa: str, dtype: Any, len_q: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, n, 32).to(dtype) for n in (len_q, 150, 150))
    for factors in ((1e-6, 1e-6, 1e-6), (100.0, 3.0, 100.0)):
        scaled = [(t.double() * f).to(dtype) for t, f in zip((query, key, value), factors, strict=True)]
        out = native.attention(*scaled, isa=isa)
        want, _ = reference(*scaled)
        step = 6e-8 if dtype is torch.float16 else 0.0  # the spacing of float16 near 0
        assert float((out.double() - want).norm()) <= 2 * BOUNDS[dtype] * float(want.norm()) + step * out.numel() ** 0.5


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("len_q", [2, 40])
def test_a_row_at_the_lowest_number_averages_its_values(seed: int, isa: str, dtype: Any, len_q: int) -> None:
    """-inf hides a key; the lowest finite number does not, which counts where a row has nothing else."""
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, n, 32).to(dtype) for n in (len_q, 150, 150))
    mask = torch.zeros(1, 1, len_q, 150)
    mask[..., 0, :], mask[..., 1, :], mask[..., 0, 100:] = torch.finfo(torch.float32).min, -math.inf, -math.inf
    lse = torch.empty(1, 2, len_q)
    out = native.attention(query, key, value, mask, lse=lse, isa=isa)
    assert relative_error(out[:, :, 0], value[:, :, :100].double().mean(2)) <= BOUNDS[dtype]
    assert bool((lse[..., 0] == torch.finfo(torch.float32).min).all())
    assert bool((out[:, :, 1] == 0).all())
    assert bool((lse[..., 1] == -math.inf).all())


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("len_q", [2, 40])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_keys_that_a_mask_hides_may_hold_anything(seed: int, isa: str, len_q: int, kind: Any) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, n, 32) for n in (len_q, 150, 150))
    mask = torch.rand(len_q, 150) < 0.5
    mask[:, 64:128] = False
    given = mask if kind is torch.bool else torch.zeros(len_q, 150).masked_fill(~mask, -math.inf)
    clean = native.attention(query, key, value, given, isa=isa)
    key[:, :, 64:128], value[:, :, 64:128] = math.nan, math.inf
    assert torch.equal(native.attention(query, key, value, given, isa=isa), clean)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)], ids=str)
def test_empty_operands_give_zeros(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, len_q, len_k = sizes
    lse = torch.zeros(batch, heads, len_q)
    out = native.attention(
        torch.randn(batch, heads, len_q, 32), *torch.randn(2, batch, heads, len_k, 32).unbind(), lse=lse
    )
    assert out.shape == (batch, heads, len_q, 32)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_equal_calls_give_equal_bits_for_any_number_of_threads(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 4, n, 64) for n in (300, 300, 300))
    first = native.attention(query, key, value, threads=1)
    assert all(torch.equal(first, native.attention(query, key, value, threads=n)) for n in (2, 3, 8))


def test_threads_of_callers_do_not_disturb_each_other(seed: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(seed)
    operands = [tuple(torch.randn(1, 4, n, 64) for _ in range(3)) for n in (100, 200, 300, 64)]
    want = [native.attention(*each) for each in operands]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: native.attention(*operands[n % 4]), range(64)))
    assert all(torch.equal(out, want[n % 4]) for n, out in enumerate(found))


def test_nothing_is_written_beside_the_results(seed: int) -> None:
    """Output and log-sum-exp lie inside larger tensors, whose other elements keep their values."""
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 3, n, 40).bfloat16() for n in (70, 90, 90))
    room = torch.full((2, 5, 80, 56), 7.0, dtype=torch.bfloat16)
    out = native.attention(query, key, value, out=room[:, 1:4, 5:75, 8:48])
    assert relative_error(out, reference(query, key, value)[0]) <= BOUNDS[torch.bfloat16]
    inside = torch.zeros(room.shape, dtype=torch.bool)
    inside[:, 1:4, 5:75, 8:48] = True
    assert bool((room[~inside] == 7).all())


@pytest.mark.parametrize("len_q", [1, 100])
def test_the_workspace_is_as_large_as_stated(seed: int, len_q: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 4, n, 64) for n in (len_q, 700, 700))
    needed = native.workspace_bytes((1, 4, 4, len_q, 700, 64, 64), "float32", 2)
    room = torch.full((needed + 4096,), 77, dtype=torch.uint8)
    out = native.attention(query, key, value, threads=2, workspace=room[:needed])
    assert relative_error(out, reference(query, key, value)[0]) <= 1e-5
    assert bool((room[needed:] == 77).all())
    with pytest.raises(native.NativeRefusal, match="smaller than"):
        native.attention(query, key, value, threads=2, workspace=room[: needed - 64])


PLAIN = (1, 2, 5, 32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "float64 is not taken"),
    "head size 20": ({"dim": 20}, "multiple of 8"),
    "head size 520": ({"dim": 520}, "multiple of 8"),
    "heads": ({"heads": 3}, "multiple of heads_kv"),
    "no threads": ({"threads": 0}, "threads"),
    "too many threads": ({"threads": 1 << 20}, "threads"),
    "scale 0": ({"scale": 0.0}, "scale"),
    "scale nan": ({"scale": math.nan}, "scale"),
    "softcap below 0": ({"softcap": -1.0}, "softcap"),
    "instruction set": ({"isa": "neon"}, "unknown"),
    "decode of many rows": ({"kernel": 2, "length": 17}, "16 rows"),
    "float64 mask": ({"mask": torch.zeros(5, 6, dtype=torch.float64)}, "bool, float32"),
    "mask with a gradient": ({"mask": torch.zeros(5, 6, requires_grad=True)}, "mask requires a gradient"),
    "gradient": ({"requires_grad": True}, "gradient"),
    "strided": ({"strided": True}, "stride"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_refused_by_name(name: str) -> None:
    options, message = REFUSED[name]
    options = dict(options)
    dtype, dim = options.pop("dtype", torch.float32), options.pop("dim", 32)
    query = torch.randn(1, options.pop("heads", 2), options.pop("length", 5), dim).to(dtype)
    key, value = torch.randn(2, 1, 2, 6, dim).to(dtype).unbind()
    if options.pop("requires_grad", False):
        query.requires_grad_()
    if options.pop("strided", False):
        key = key.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(native.NativeRefusal, match=message):
        native.attention(query, key, value, **options)


def test_reading_takes_any_length() -> None:
    for length in (1, 63, 64, 1 << 20, (1 << 20) + 5):
        native.read(torch.ones(length, dtype=torch.uint8), 2)

"""Compiled flows and Euler characteristics: against float64, on every instruction set, for any shape and threads."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
native = pytest.importorskip("hal_cpu_native", reason="hal-cpu-native is not built here: make native")

from hal_compute import references  # noqa: E402
from hal_cpu.kernels import compiled_fields  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402

NUMBERS = (0.2, 0.7, 1.3, 0.8, 0.5, 0.9, 0.3)
#: Shapes about the ends of vectors (8 and 16), of words (64) and of bands of rows (32), systems of one row or column.
SHAPES = [
    (1, 1),
    (1, 7),
    (5, 1),
    (3, 2),
    (2, 9, 8),
    (3, 16, 17),
    (2, 33, 15),
    (31, 63),
    (2, 64, 64),
    (65, 65),
    (2, 2, 32, 130),
]


def draw(seed: int, shape: tuple[int, ...]) -> Any:
    """Two fields that a step of NUMBERS does not blow up."""
    return (0.4 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))).unbind()


@pytest.fixture(params=["avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in native.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("shape", SHAPES)
def test_flows_agree_with_float64(shape: tuple[int, ...], steps: int, isa: str, seed: int) -> None:
    u, v = draw(seed, shape)
    want = references.reaction_diffusion_step(u.double(), v.double(), *NUMBERS, steps=steps)
    got = native.reaction_diffusion(u, v, NUMBERS, steps=steps, isa=isa)
    assert all(relative_error(x, y) <= 2e-6 for x, y in zip(got, want, strict=True))
    dt = 0.9 * float(torch.exp(2 * u.min()) / 4)
    flowed = native.ricci(u, dt, steps=steps, isa=isa)
    assert relative_error(flowed, references.ricci_flow_step(u.double(), dt, steps=steps)) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_counted_exactly(shape: tuple[int, ...], isa: str, seed: int) -> None:
    field, other = draw(seed, shape)
    field[other > 0.4] = torch.nan
    levels = torch.cat([torch.tensor([-0.5, 0.0, 0.3, 9.0]), field.flatten()[:1].nan_to_num()])
    got = native.euler(field, levels, isa=isa).sum(-1, dtype=torch.int64)
    assert torch.equal(got, references.euler_characteristic(field, levels))


@pytest.mark.parametrize("shape", [(3, 40, 41), (2, 200, 200), (1, 300, 150)])
def test_results_do_not_depend_on_threads(shape: tuple[int, ...], seed: int) -> None:
    u, v = draw(seed, shape)
    levels, dt = torch.tensor([0.0, 0.5]), 0.9 * float(torch.exp(2 * u.min()) / 4)
    results = []
    for threads in (1, 2, 5):
        pair = native.reaction_diffusion(u, v, NUMBERS, steps=9, threads=threads)
        results.append((*pair, native.ricci(u, dt, steps=9, threads=threads), native.euler(u, levels, threads=threads)))
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


def test_without_reaction_the_other_field_is_not_read(seed: int) -> None:
    """u^3 of a large value would be infinite, and infinity times a reaction of 0 no number."""
    u, v = draw(seed, (9, 20))
    u, v = 1e20 * u, torch.full_like(v, torch.nan)
    got = native.reaction_diffusion(u, v, (0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 0.0), steps=3)[0]
    want = references.reaction_diffusion_step(u.double(), u.double(), 0.5, 1.0, 1.0, 0.0, steps=3)[0]
    assert relative_error(got, want) <= 2e-6


def test_not_a_number_stays_with_the_neighbours(isa: str, seed: int) -> None:
    u, _ = draw(seed, (40, 40))
    clean = native.ricci(u, 1e-3, isa=isa)
    u[3, 5] = torch.nan
    got = native.ricci(u, 1e-3, isa=isa)
    seen = torch.zeros(40, 40, dtype=torch.bool)
    seen[3, 4:7] = seen[2:5, 5] = True
    assert torch.equal(got.isnan(), seen)
    assert torch.equal(got[~seen], clean[~seen])


def test_the_cpu_device_takes_them(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    calls: list[str] = []
    run = compiled_fields.run
    monkeypatch.setattr(compiled_fields, "run", lambda name, *rest: (calls.append(name), run(name, *rest)))
    u, v = draw(seed, (3, 12, 17))
    leaf, apart = (
        u.clone().requires_grad_(),
        v.mT.contiguous().mT,
    )  # results carry no gradient; other strides are copied
    got = hal.kernel("reaction_diffusion_step", "cpu:0")(leaf, apart, steps=3)
    assert all(
        torch.equal(x, y)
        for x, y in zip(got, native.reaction_diffusion(u, v, (0.1, 0.2, 1, 1, 0.5, 1, 0), steps=3), strict=True)
    )
    hal.kernel("ricci_flow_step", "cpu:0")(u, 1e-3)
    hal.kernel("euler_characteristic", "cpu:0")(u, torch.zeros(1))
    assert calls == [*compiled_fields.NAMES]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda u: native.ricci(u.double(), 0.1), "contiguous float32 on the CPU is taken"),
        (lambda u: native.ricci(u.mT, 0.1), "contiguous float32 on the CPU is taken"),
        (lambda u: native.ricci(u[0], 0.1), r"one shape \[..., height, width\]"),
        (lambda u: native.ricci(u, 0.1, steps=0), "a field has no elements or steps"),
        (lambda u: native.ricci(u, 0.1, threads=0), "threads is not from 1 to 1024"),
        (lambda u: native.ricci(u, 0.1, isa="sse"), "avx2, avx512"),
        (lambda u: native.ricci(u, 0.1, workspace=torch.empty(64, dtype=torch.uint8)), "the workspace is smaller"),
        (lambda u: native.reaction_diffusion(u, u[:2], NUMBERS), "one shape"),
        (lambda u: native.reaction_diffusion(u, u, NUMBERS[:3]), "7 are taken"),
        (lambda u: native.euler(u, torch.zeros(2, 2)), r"contiguous float32 \[T\]"),
        (lambda u: native.euler(u, torch.zeros(2), out=torch.zeros(2, 4)), r"int32 \[2, 5\]"),
    ],
)
def test_other_calls_are_refused_by_name(call: Any, words: str) -> None:
    with pytest.raises(native.NativeRefusal, match=words):
        call(torch.zeros(4, 6))

"""The kernel ladder: which step a device's features give, that it is what runs, and that every step is right."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error
from hal_core.testing.reference import request_of

pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import paths, tiling
from hal_vulkan.kernels import build_shaders
from hal_vulkan.runtime._vk import Adapter, MatrixShape
from hal_vulkan.runtime.command_buffer import VulkanCommandBuffer
from hal_vulkan.runtime.pipelines import VulkanShaderManager

BRAIN = ("bfloat16_matrix",)
BITS = (
    "cooperative_matrix",
    "memory_model",
    "float16",
    "full_subgroups",
    "nv2_reductions",
    "nv2_conversions",
    "nv2_per_element_operations",
)
SCOPE = ("device_scope",)
CASES = {
    "full": ((2, 2, 2, 64, 64, 32), {}),
    "ragged": ((1, 4, 2, 50, 37, 64), {}),
    "causal": ((1, 2, 1, 33, 70, 32), {"is_causal": True}),
    "window": ((1, 2, 2, 60, 60, 32), {"window": (5, 3)}),
    "softcap": ((1, 2, 2, 30, 40, 32), {"softcap": 2.0}),
    "boolean mask": ((1, 2, 2, 30, 40, 32), {"attn_mask": torch.bool}),
    "additive mask": ((1, 2, 2, 30, 40, 32), {"attn_mask": torch.float16}),
    "negative scale": ((1, 2, 2, 30, 40, 32), {"scale": -0.2}),
    "block plan": ((1, 2, 2, 130, 200, 32), {"plan": True}),
    "causal block plan": ((1, 2, 1, 200, 200, 64), {"plan": True, "is_causal": True}),
    "one row of a group": ((1, 8, 2, 1, 130, 64), {}),
    "few rows, split keys": ((1, 4, 1, 2, 600, 32), {}),
}
#: Of blocks of 64 tokens: the second, none, all, and three with one that ends with the keys.
PLAN = hal.BlockPlan(
    64,
    64,
    torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 3, 0]], dtype=torch.int32)[None, None],
    torch.tensor([1, 0, 4, 3], dtype=torch.int32)[None, None],
)


def adapter(
    features: tuple[str, ...], *, sides: tuple[int, ...] = (16,), is_cpu: bool = False, api: int = 3
) -> Adapter:
    """What a device with these features would report."""
    shapes = tuple(MatrixShape(side, side, side, "float16", "float32") for side in sides)
    limits = {"subgroupSize": 32, "maxComputeSharedMemorySize": 49152, "subgroupOperations": 0x7FF}
    known: dict[str, Any] = dict.fromkeys(Adapter._fields)
    known |= {
        "is_cpu": is_cpu,
        "api": (1, api, 0),
        "features": frozenset(features),
        "limits": limits,
        "matrices": shapes,
    }
    return Adapter(**known)


def test_all_bits_give_the_best_step() -> None:
    step = paths.matrix_step(adapter(BITS), "float16")
    assert step is not None
    assert (step.name, step.side) == ("nv2", 16)


@pytest.mark.parametrize("bit", BITS)
def test_a_missing_bit_costs_the_steps_that_use_it(bit: str) -> None:
    step = paths.matrix_step(adapter(tuple(b for b in BITS if b != bit)), "float16")
    assert (step.name if step else None) == ("khr" if bit.startswith("nv2_") else None)


@pytest.mark.parametrize(("lost", "left"), [(0x2, None), (0x10, "nv2")])
def test_a_missing_operation_of_subgroups_costs_the_steps_that_use_it(lost: int, left: str | None) -> None:
    whole = adapter(BITS + SCOPE)
    less = whole._replace(limits=whole.limits | {"subgroupOperations": 0x7FF & ~lost})
    assert [step.name for step in paths.matrix_steps(less, "float16")] == ([left] if left else [])
    assert paths.row_step(whole) is not None
    assert paths.row_step(less) is None


def test_what_a_step_cannot_hold_goes_to_plain_tiles() -> None:
    assert paths.matrix_step(adapter(BITS), "float32") is None
    assert paths.matrix_step(adapter(BITS, sides=()), "float16") is None
    assert paths.matrix_step(adapter(BITS, sides=(32,)), "float16") is None
    assert paths.matrix_step(adapter(BITS, is_cpu=True), "float16") is None


def test_bfloat16_needs_its_bit_and_its_matrices() -> None:
    shapes = (MatrixShape(16, 16, 16, "bfloat16", "float32"),)
    assert paths.matrix_step(adapter(BITS + BRAIN)._replace(matrices=shapes), "bfloat16") is not None
    assert paths.matrix_step(adapter(BITS)._replace(matrices=shapes), "bfloat16") is None
    assert paths.matrix_step(adapter(BITS + BRAIN), "bfloat16") is None


def test_vulkan_1_2_has_no_spirv_of_1_3() -> None:
    assert [step.name for step in paths.matrix_steps(adapter(BITS, api=2), "float16")] == ["khr"]


def test_the_doctors_words_follow_the_steps() -> None:
    assert paths.kernel_names(adapter(BITS + SCOPE)) == (
        "float16: 16x16x16 matrices in subgroups (VK_NV_cooperative_matrix2); bfloat16: tiles in shared memory; "
        "float32: tiles in shared memory; few query rows: lanes that share a key"
    )
    assert paths.kernel_names(adapter(())) == "tiles in shared memory"
    few = "tiles in shared memory; few query rows: lanes that share a key"
    assert paths.kernel_names(adapter(("full_subgroups", "device_scope"))) == few
    for bit in ("full_subgroups", "device_scope"):
        assert paths.kernel_names(adapter((bit,))) == "tiles in shared memory"
    assert "matrices" not in paths.kernel_names(adapter(BITS, is_cpu=True))
    assert "lanes" not in paths.kernel_names(adapter(BITS + SCOPE, is_cpu=True))


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["nv2", "khr"])
@pytest.mark.parametrize("lanes", [32, 64])
def test_cuts_fit_shared_memory_and_load_whole_tiles(dim: int, name: str, lanes: int) -> None:
    step = paths.MatrixStep(name, 16, lanes, 49152)
    for alone in (False, True):
        cuts = tiling.matrix_cuts(step, dim, alone=alone)
        assert cuts, "no cut for this head size"
        assert all(c.shared_bytes(dim) <= 49152 for c in cuts)
        assert all(c.keys * dim // 8 % (lanes if alone else c.threads) == 0 for c in cuts)
        if name == "khr":  # the lanes of a row of 16 take its keys by twice 4
            assert all(c.keys % (8 * lanes // 16) == 0 for c in cuts)


def instructions(spirv: bytes) -> Iterator[tuple[int, ...]]:
    """(opcode, operands ...) of a module."""
    words, at = struct.unpack(f"<{len(spirv) // 4}I", spirv), 5
    while at < len(words):
        count = words[at] >> 16
        yield words[at] & 0xFFFF, *words[at + 1 : at + count]
        at += count


@pytest.mark.parametrize("name", ["nv2", "khr"])
def test_bfloat16_modules_are_the_float16_ones_with_another_type(name: str) -> None:
    half = (build_shaders.FOLDER / f"forward_{name}.float16.spv").read_bytes()
    made = list(instructions(build_shaders.with_bfloat16(half)))
    kinds = [operands for code, *operands in made if code == 22]  # OpTypeFloat
    assert sorted(kind[1:] for kind in kinds) == [[16, 0], [32]]  # bfloat16 is the encoding 0
    assert {(17, 5116), (17, 5118)} <= set(made)
    capabilities = [code == 17 for code, *_ in made]
    assert capabilities == sorted(capabilities, reverse=True), "capabilities come first"
    assert len(made) == len(list(instructions(half))) + 3


def draw(shape: tuple[int, ...], options: dict[str, Any], seed: int) -> tuple[Any, ...]:
    """(query, key, value, options with a drawn mask)."""
    batch, heads, heads_kv, len_q, len_k, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, len_q, dim, generator=generator).half()
    key, value = (torch.randn(batch, heads_kv, len_k, dim, generator=generator).half() for _ in range(2))
    kind = options.get("attn_mask")
    if kind is not None:
        noise = torch.randn(len_q, len_k, generator=generator)
        options = options | {"attn_mask": noise > -0.5 if kind is torch.bool else noise.to(kind)}
    return query, key, value, options


def steps_of(session: Any) -> list[paths.MatrixStep]:
    found = paths.matrix_steps(session.recorder.adapter, "float16")
    if not found:
        pytest.skip(
            f"{session.recorder.adapter.name} ({session.recorder.adapter.driver}) reports no matrices for float16"
        )
    return found


@pytest.mark.slow  # a processor's driver compiles each shader for seconds
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["nv2", "khr"])
def test_every_matrix_step_agrees_with_float64(
    session: Any, name: str, case: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = next((step for step in steps_of(session) if step.name == name), None)
    if step is None:
        pytest.skip(f"{session.recorder.adapter.name} does not report what {name} needs")
    monkeypatch.setattr(tiling, "matrix_step", lambda adapter, dtype: step)
    monkeypatch.setattr(tiling, "row_step", lambda adapter: None)
    shape, options = CASES[case]
    query, key, value, options = draw(shape, options, seed)
    mask, plan = options.pop("attn_mask", None), None
    if options.pop("plan", False):
        blocks = -(-shape[3] // 64)
        plan = PLAN._replace(indices=PLAN.indices[:, :, :blocks], counts=PLAN.counts[:, :, :blocks])
    out, lse = call(session, query, key, value, mask, options, plan)
    want, want_lse = reference(query, key, value, mask, plan=plan, **options)
    seen = want_lse > -torch.inf
    assert relative_error(out, want) <= 2e-3
    assert relative_error(lse[seen], want_lse[seen]) <= 1e-5
    assert (lse[~seen] == -torch.inf).all()
    assert f"forward_{name}.float16" in ran(session)


FEW = {
    "one row of a group": ((1, 8, 2, 1, 130, 64), {}),
    "three rows": ((1, 2, 2, 3, 45, 32), {"is_causal": True}),
    "a window, split keys": ((1, 4, 1, 2, 600, 32), {"window": (300, 5)}),
    "a mask and a softcap": ((2, 4, 2, 1, 70, 80), {"attn_mask": torch.bool, "softcap": 3.0}),
    "wide rows": ((1, 1, 1, 2, 30, 256), {}),
    "many splits": ((1, 4, 1, 2, 3001, 32), {}),
    "a block plan": ((1, 4, 2, 2, 200, 32), {"plan": True}),
}


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_few_rows_across_subgroups_agree_with_float64(
    session: Any, dtype: str, case: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = session.recorder.adapter
    step = paths.row_step(adapter._replace(is_cpu=False))
    if step is None:
        pytest.skip(f"{adapter.name} does not shuffle in full subgroups")
    monkeypatch.setattr(tiling, "row_step", lambda adapter: step)
    monkeypatch.setattr(tiling, "matrix_step", lambda adapter, dtype: None)
    shape, options = FEW[case]
    query, key, value, options = draw(shape, options, seed)
    query, key, value = (t.to(getattr(torch, dtype)) for t in (query, key, value))
    mask, plan = options.pop("attn_mask", None), None
    if options.pop("plan", False):
        plan = PLAN._replace(indices=PLAN.indices[:, :, 3:], counts=PLAN.counts[:, :, 3:])
    out, lse = call(session, query, key, value, mask, options, plan)
    want, want_lse = reference(query, key, value, mask, plan=plan, **options)
    assert relative_error(out, want) <= {"float32": 1e-5, "float16": 2e-3, "bfloat16": 5e-3}[dtype]
    assert relative_error(lse, want_lse) <= 1e-5
    assert f"forward_rows.{dtype}" in ran(session)


@pytest.mark.parametrize("heads", [1, 7, 20])
def test_few_rows_take_no_more_work_groups_than_a_card_holds(
    session: Any, heads: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work groups are equal parts of the call: one that has to wait for the others doubles its time."""
    step = paths.row_step(session.recorder.adapter._replace(is_cpu=False))
    if step is None:
        pytest.skip(f"{session.recorder.adapter.name} does not shuffle in full subgroups")
    monkeypatch.setattr(tiling, "row_step", lambda adapter: step)
    monkeypatch.setattr(tiling, "matrix_step", lambda adapter, dtype: None)
    asked: list[Any] = []
    dispatch = VulkanCommandBuffer.dispatch
    monkeypatch.setattr(
        VulkanCommandBuffer, "dispatch", lambda *given, **how: asked.append(given[6]) or dispatch(*given, **how)
    )
    query, key, value, _ = draw((1, heads, heads, 1, 30000, 32), {}, seed)
    call(session, query, key, value, None, {})
    ((blocks, units, splits),) = asked
    assert (blocks, units) == (1, heads)
    most = min(264 // heads, 64)
    assert 0.9 * most <= splits <= most


def test_shaders_ask_for_the_whole_subgroups_that_they_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    class Gpu:
        def pipeline(self, spirv: bytes, *given: Any, full_subgroups: bool) -> None:
            asked[name] = full_subgroups

    shaders = VulkanShaderManager(Gpu())  # type: ignore[arg-type]
    for name in ("forward_nv2.float16", "forward_khr.float16", "forward_rows.float32", "forward_tiles.float32"):
        shaders.pipeline(name, "s", ())
    assert [name for name, full in asked.items() if not full] == ["forward_tiles.float32"]


def test_what_the_doctor_says_is_what_runs(session: Any, seed: int) -> None:
    said = paths.kernel_names(session.recorder.adapter)
    query, key, value, _ = draw((1, 2, 2, 40, 40, 32), {}, seed)
    for dtype in ("float16", "bfloat16", "float32"):
        before = ran(session)
        call(session, *(t.to(getattr(torch, dtype)) for t in (query, key, value)), None, {})
        (shader,) = {name for name in ran(session) - before if name.startswith("forward")}
        step = said.removeprefix(dtype).split(f" {dtype}: ")[-1].split(";")[0]
        assert shader.startswith(("forward_nv2", "forward_khr")) == ("matrices" in step)


def call(session: Any, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any], plan: Any = None) -> Any:
    """(out, log-sum-exp) of the session's own attention."""
    request = request_of(query, key, value, mask, plan=plan, return_lse=True, **options)
    return session.compute_attention(session.prepare_attention(query, key, value, request=request, plan=plan), mask)


def ran(session: Any) -> set[str]:
    """Shaders of which the session has made pipelines."""
    return {name for name, *_ in session.recorder.shaders.made}

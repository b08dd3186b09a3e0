"""The kernels beside attention where there is no GPU: what an import loads, what is refused, and what compiles."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from nvrtc import Nvrtc

from hal_core import ContractError, DeviceUnavailableError

NAMED = [
    "vector_add",
    "device_info",
    "reduce_sum",
    "reduce_max",
    "flash_attention_forward",
    "fused_gelu_linear",
    "rope_precompute_freqs",
    "rope_forward",
    "rope_forward_fused",
    "paged_kv_cache_append",
    "paged_kv_cache_read",
    "PagedKVCache",
    "BenchmarkRunner",
    "BenchmarkResult",
    "patch_gpt2_model",
    "unpatch_gpt2_model",
]
TWINS = [
    "reduce_sum",
    "reduce_max",
    "flash_attention_forward",
    "fused_gelu_linear",
    "rope_precompute_freqs",
    "rope_forward",
    "rope_forward_fused",
    "paged_kv_cache_append",
    "paged_kv_cache_read",
]
#: What there is in Triton alone, for plans of sparse attention.
ALONE = ["pool_rows", "pool_extremes", "square_sums", "choose_blocks"]
TARGETS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0))
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def test_importing_loads_no_kernel() -> None:
    """Neither CuPy, Triton nor torch, and no module that holds a kernel."""
    script = """
import sys, hal_cuda, hal_cuda.kernels
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("cupy", "triton", "torch")
             or name.startswith("hal_cuda.kernels.")))
print(sorted(dir(hal_cuda.kernels)))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found[0] == "[]"
    assert {*NAMED, *(f"triton_{name}" for name in (*TWINS, *ALONE))} <= set(re.findall(r"'(\w+)'", found[1]))


@TRITON
def test_every_public_name_is_there() -> None:
    from hal_cuda import kernels

    for name in (*NAMED, *(f"triton_{name}" for name in (*TWINS, *ALONE))):
        assert callable(getattr(kernels, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'triton_vector_add'"):
        kernels.triton_vector_add  # noqa: B018


@TRITON
def test_every_kernel_that_a_session_offers_is_specified() -> None:
    from hal_cuda.kernels.extra import provided

    from hal_core.registry import registry

    with mock.patch.object(provided, "find_spec", return_value=object()):
        offered = provided.names()
    assert {
        *(name for name in NAMED if name in TWINS),
        *(f"triton_{name}" for name in (*TWINS, *ALONE)),
        "vector_add",
    } == offered
    assert offered <= set(registry.kernel_specs())
    with mock.patch.object(provided, "find_spec", return_value=None):
        left = provided.names()
    assert all(name.startswith("triton_") or name == "flash_attention_forward" for name in left)


def test_tensors_on_the_host_are_refused() -> None:
    from hal_cuda import kernels

    x = torch.ones(4, 4)
    for call in (
        lambda: kernels.vector_add(x, x),
        lambda: kernels.reduce_sum(x),
        lambda: kernels.fused_gelu_linear(x, x),
        lambda: kernels.rope_forward_fused(x[None, None], x[None, None]),
        lambda: kernels.flash_attention_forward(*(x[None, None] for _ in range(3))),
    ):
        with pytest.raises(ContractError, match="a tensor on cpu: move it to a CUDA device"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_patch_and_device_info_say_why() -> None:
    from hal_cuda import kernels

    with pytest.raises(DeviceUnavailableError, match="device_info needs a GPU: "):
        kernels.device_info()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=20)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(DeviceUnavailableError, match=r"patch_gpt2_model needs a GPU: .*Nothing was patched"):
        kernels.patch_gpt2_model(model)
    with pytest.raises(ContractError, match="backend 'rocm': use 'cuda' or 'triton'"):
        kernels.patch_gpt2_model(model, "rocm")
    with pytest.raises(ContractError, match="a Linear without GPT-2 blocks"):
        kernels.patch_gpt2_model(torch.nn.Linear(2, 2))
    assert "forward" not in model.transformer.h[0].mlp.__dict__
    assert model.config._attn_implementation != "hal_cuda"


def _cupy(monkeypatch: pytest.MonkeyPatch, nvrtc: Callable[[], tuple[int, int]], driver: int = 13000) -> None:
    """A CuPy built for CUDA 13, with this NVRTC and this driver."""
    from hal_cuda.kernels.cupy import module

    runtime = types.SimpleNamespace(driverGetVersion=lambda: driver, runtimeGetVersion=lambda: 13000)
    made: Any = types.ModuleType("cupy")
    made.cuda = types.ModuleType("cupy.cuda")
    made.cuda.nvrtc, made.cuda.runtime, made.__version__ = types.SimpleNamespace(getVersion=nvrtc), runtime, "14.0.0"
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setitem(sys.modules, "cupy.cuda", made.cuda)
    monkeypatch.setattr(module, "_by_name", lambda: 0)
    module.cupy.cache_clear()


def _missing() -> tuple[int, int]:
    raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError\nand more")


@pytest.mark.parametrize(
    ("nvrtc", "driver", "said"),
    [
        (_missing, 13000, r"NVRTC 13 is wanted by CuPy 14.0.0 and was not found \(CuPy failed to load libnvrtc.so.13"),
        (lambda: (12, 9), 13000, r"NVRTC 13 is wanted, which CuPy 14.0.0 was built for, and NVRTC 12.9 was found"),
        (lambda: (13, 0), 12080, r"NVRTC 13.0 was found, and the driver runs CUDA 12 at most: upgrade the driver"),
    ],
)
def test_a_missing_or_wrong_nvrtc_is_named(nvrtc: Any, driver: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cuda.kernels.cupy import module

    _cupy(monkeypatch, nvrtc, driver)
    with pytest.raises(DeviceUnavailableError, match=said):
        module.cupy()
    _cupy(monkeypatch, lambda: (13, 5))
    assert module.cupy().__version__ == "14.0.0"
    module.cupy.cache_clear()


def test_a_missing_cupy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cuda.kernels.cupy import module

    monkeypatch.setitem(sys.modules, "cupy", None)
    module.cupy.cache_clear()
    with pytest.raises(DeviceUnavailableError, match=r"CuPy.* pip install 'hal-cuda\[cupy\]'.*triton_"):
        module.cupy()


SOURCES: list[tuple[str, dict[str, str], tuple[int, int]]] = [
    *(("vector_add", {"ELEMENT": kind}, (7, 5)) for kind in ("float", "fp16", "bf16")),
    ("reductions", {"ELEMENT": "fp16", "RESULT": "fp16", "OPERATION": "Sum"}, (7, 5)),
    ("reductions", {"ELEMENT": "bf16", "RESULT": "float", "OPERATION": "Max"}, (7, 5)),
    ("reductions", {"ELEMENT": "float", "RESULT": "bf16", "OPERATION": "Sum"}, (7, 5)),
    *(("rope", {"ELEMENT": kind}, (7, 5)) for kind in ("float", "fp16", "bf16")),
    ("paged", {"WIDE": "1"}, (7, 5)),
    *(("paged", {"UNIT": kind}, (7, 5)) for kind in ("u16", "u32")),
    *(("gelu_linear", {"ELEMENT": kind}, (7, 5)) for kind in ("float", "bf16")),
    ("gelu_linear", {"ELEMENT": "fp16", "STORED_BY_ROWS": "false"}, (7, 5)),
    ("gelu_linear", {"ELEMENT": "bf16", "STORED_BY_ROWS": "true"}, (8, 0)),
]


def _compiled(capability: tuple[int, int], sources: list[Any]) -> None:
    from hal_cuda.kernels.cupy import module

    try:
        nvrtc = Nvrtc()
    except OSError as absent:
        pytest.skip(str(absent))
    for name, definitions, least in sources:
        if capability >= least:
            arch = f"sm_{capability[0]}{capability[1]}"
            beside = "--device-as-default-execution-space"  # which CuPy adds
            code = nvrtc.compile(module.source(name), arch, *module.options(definitions), beside)
            assert len(code) > 1000
            assert "warning" not in nvrtc.log.lower(), nvrtc.log


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
def test_cuda_sources_compile(capability: tuple[int, int]) -> None:
    _compiled(capability, [each for each in SOURCES if each[0] != "gelu_linear"][:: 1 if capability == (9, 0) else 3])


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS, ids=str)
def test_all_cuda_sources_compile_everywhere(capability: tuple[int, int]) -> None:
    _compiled(capability, SOURCES)


@TRITON
@pytest.mark.parametrize(
    "capability",
    [pytest.param(each, marks=() if each in ((7, 5), (9, 0)) else pytest.mark.slow) for each in TARGETS],
    ids=str,
)
def test_triton_kernels_compile(capability: tuple[int, int]) -> None:
    """Without spills from 8.0 on, reading and writing 16 bytes at a time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from compile_table import extra_variants, figures

    for name, make in extra_variants(capability).items():
        made = make()
        if capability >= (8, 0):
            assert figures(made).spilled == 0, name
            assert figures(made).warnings == 0, name
        ptx = made.asm["ptx"]
        if "product" not in name and "table" not in name:
            assert re.search(r"ld\.global\S*\.v4\.", ptx), name
            assert re.search("sum|pool|squares|chosen", name) or re.search(r"st\.global\S*\.v4\.", ptx), name


@TRITON
def test_the_example_of_the_readme_runs_without_a_gpu() -> None:
    from pathlib import Path

    readme = Path(__file__).resolve().parents[2] / "plugins" / "cuda" / "README.md"
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    (example,) = (block.partition("```")[0] for block in blocks if "import kernels" in block)
    assert "kernels." in example
    exec(example, {})

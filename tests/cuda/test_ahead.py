"""Kernels compiled ahead: without a GPU, for every chip, found again by processes that need them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hal_core import AttentionRequest, Causal, MaskKind

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process"),
]
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
PLAIN = AttentionRequest(
    batch=2,
    heads_q=4,
    heads_kv=4,
    len_q=512,
    len_k=512,
    dim_qk=64,
    dim_v=64,
    dtype="float16",
    device="cuda:0",
    lse=True,
)
GRADS = frozenset({"q", "k", "v"})
FEATURES = (
    PLAIN,
    replace(PLAIN, causal=Causal.TOP_LEFT, dtype="bfloat16", grads=GRADS),
    replace(PLAIN, dim_qk=256, dim_v=256, dtype="float32", grads=GRADS),
    replace(PLAIN, dim_qk=192, dim_v=128, dtype="bfloat16", grads=GRADS),
    replace(PLAIN, mask=MaskKind.ADDITIVE, grads=GRADS | {"mask"}),
    replace(PLAIN, mask=MaskKind.BOOLEAN, window=(100, 0), softcap=20.0),
    replace(PLAIN, packed=True, causal=Causal.BOTTOM_RIGHT, grads=GRADS),
    replace(PLAIN, dropout=0.1, grads=GRADS),
    replace(PLAIN, len_q=1, heads_kv=1, len_k=8192),
    replace(PLAIN, len_q=1, heads_kv=2, page_size=16),
)


def chip(capability: tuple[int, int]) -> Any:
    from hal_cuda.discovery import Chip

    return Chip(index=0, capability=capability, multiprocessors=108, shared_memory=SHARED[capability])


def compile_all(requests: tuple[AttentionRequest, ...], capability: tuple[int, int]) -> int:
    from hal_cuda.cost import Rates
    from hal_cuda.kernels import ahead

    return ahead.compile_all(requests, chip(capability), Rates.assumed(capability, 108, None))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Triton's cache, empty."""
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    return tmp_path


def _no_compiler(*given: Any, **options: Any) -> Any:
    raise AssertionError("a kernel that was kept was compiled again")


def test_the_launchers_of_kernels_are_built_ahead(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs a C compiler for each, which links them to the driver's library: without that they are left out."""
    from triton.backends.nvidia import driver

    built: list[str] = []

    def build(source: Any, metadata: Any) -> None:
        built.append(source.fn.__name__)

    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    monkeypatch.setattr(driver, "CudaUtils", lambda: built.append("utils"))
    monkeypatch.setattr(driver, "CudaLauncher", build)
    assert compile_all((PLAIN,), (8, 0)) == 1
    assert built == ["utils", "attend"]
    built.clear()
    monkeypatch.setattr(driver, "library_dirs", _no_library)
    assert compile_all((PLAIN,), (8, 0)) == 1
    assert not built


def _no_library() -> Any:
    raise AssertionError("libcuda.so cannot found!")


def test_a_kernel_that_was_compiled_is_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under another request that needs the same one. What the key is made from decides, and what is left of it."""
    import triton
    from hal_cuda.runtime import kept

    assert compile_all((PLAIN,), (8, 0)) == 1
    monkeypatch.setattr(triton, "compile", _no_compiler)
    assert compile_all((PLAIN, replace(PLAIN, len_q=1024, len_k=1024, batch=1)), (8, 0)) == 1
    with pytest.raises(AssertionError, match="compiled again"):
        compile_all((PLAIN,), (8, 6))
    with monkeypatch.context() as other:
        other.setattr(kept, "sources", lambda: "a later version")
        with pytest.raises(AssertionError, match="compiled again"):
            compile_all((PLAIN,), (8, 0))
    for binary in cache.rglob("*.cubin"):
        binary.unlink()
    with pytest.raises(AssertionError, match="compiled again"):
        compile_all((PLAIN,), (8, 0))


def test_a_kernel_that_needs_more_shared_memory_than_there_is_is_refused() -> None:
    """As when it is loaded, so that tiles shrink."""
    from hal_cuda.runtime import binaries
    from triton.runtime.errors import OutOfResources

    source = SimpleNamespace(fn=SimpleNamespace(arg_names=[]))
    compiled = SimpleNamespace(metadata=SimpleNamespace(shared=100 << 10), src=source)
    assert binaries.Unloaded(compiled, 163 << 10).maps == []
    with pytest.raises(OutOfResources):
        binaries.Unloaded(compiled, 99 << 10)


@pytest.mark.slow
@pytest.mark.parametrize("feature", range(len(FEATURES)))
@pytest.mark.parametrize("capability", list(SHARED), ids=str)
def test_every_feature_compiles_for_every_chip(capability: tuple[int, int], feature: int) -> None:
    """Forward and backward, within the shared memory of the chip: tiles shrink until a program fits."""
    assert compile_all((FEATURES[feature],), capability) >= 1


def test_requests_that_share_kernels_are_one_piece_of_work() -> None:
    from hal_cuda.cost import Rates
    from hal_cuda.kernels import ahead

    lengths = [replace(PLAIN, len_q=n, len_k=n) for n in (512, 1024, 2048)]
    others = [replace(PLAIN, causal=Causal.TOP_LEFT), replace(PLAIN, len_q=1)]
    made = ahead.tasks([*lengths, *others], chip((8, 0)), Rates.assumed((8, 0), 108, None))
    assert len(made) == 3
    assert "2 more lengths" in made[0][0]


def test_work_may_be_sent_to_other_processes() -> None:
    import pickle

    from hal_cuda.cost import Rates
    from hal_cuda.kernels import ahead

    ((_, function),) = ahead.tasks([PLAIN], chip((8, 0)), Rates.assumed((8, 0), 108, None))
    assert pickle.loads(pickle.dumps(function)).args == function.args  # type: ignore[attr-defined]


def test_the_backend_leaves_out_what_its_kernels_do_not_have() -> None:
    from hal_cuda.backend import CudaBackend
    from hal_cuda.cost import Rates

    from hal_core import Device, Fidelity

    device = Device(
        id="cuda:0", family="cuda", vendor="NVIDIA", model="", fidelity=Fidelity.HARDWARE, reads=("cuda:0",)
    )
    backend = CudaBackend()
    backend._chips["cuda:0"], backend._rates["cuda:0"] = chip((8, 0)), Rates.assumed((8, 0), 108, None)
    asked = [PLAIN, replace(PLAIN, dtype="float64"), replace(PLAIN, dim_qk=512, dim_v=512)]
    assert len(backend.warm_up(device, asked)) == 1

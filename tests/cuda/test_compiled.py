"""Kernels compile for GPUs that are not here, and take no more registers and spills than the committed table says."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
QUICK = (
    "sm_90 hopper 64/64 8192 full",
    "sm_90 hopper 128/128 8192 causal",
    "sm_90 fp8 128/128 causal",
    "sm_90 attend causal",
    "sm_90 merge decode",
    "sm_90 grad_kv causal",
    "sm_90 grad_q causal",
)
TUNED = ("64/64", "128/128", "256/256")


def _held(names: tuple[str, ...] | None) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    import triton

    sys.path.insert(0, str(Path(__file__).parent))
    from compile_table import figures, table, variants

    committed = table()
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"the table is of Triton {committed['triton']}, {triton.__version__} is installed")
    made = variants()
    assert set(made) == set(committed["variants"]), "run tests/cuda/compile_table.py --write"
    for name in names or tuple(made):
        now, then = figures(made[name]()), committed["variants"][name]
        assert now.registers <= then["registers"], name
        assert now.spilled <= then["spilled"], name
        assert now.warnings <= then["warnings"], name


def test_kernels_compile_within_the_table() -> None:
    _held(QUICK)


def _loops_held(names: tuple[str, ...]) -> None:
    """Spilled registers of the Hopper backward lie outside its loops over query tiles."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    sys.path.insert(0, str(Path(__file__).parent))
    from compile_table import hopper_backward_variants, local_accesses

    made = hopper_backward_variants()
    for name in names:
        loops = local_accesses(made[name]())
        assert loops, name
        assert sum(loops) == 0, (name, loops)


def test_the_loop_of_a_tuned_backward_touches_no_local_memory() -> None:
    _loops_held(("sm_90 hopper backward 64/64 full",))


@pytest.mark.slow
def test_no_loop_of_a_backward_touches_local_memory() -> None:
    """But at head size 64 with more than a diagonal."""
    sys.path.insert(0, str(Path(__file__).parent))
    from compile_table import hopper_backward_variants

    held = (" full", "causal", "causal ragged", "ordered")
    every = tuple(hopper_backward_variants())
    _loops_held(tuple(name for name in every if "64/64" not in name or name.endswith(held)))


@pytest.mark.slow
def test_tiles_of_the_caller_that_are_not_refused_fit_the_chip() -> None:
    """Every size that `check` lets through compiles into what one program may have of an H200's shared memory."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    sys.path.insert(0, str(Path(__file__).parent))
    from compile_table import foreign_variants

    for name, (make, limit) in foreign_variants().items():
        assert make().metadata.shared <= limit, name


@pytest.mark.slow
def test_every_variant_compiles_within_the_table() -> None:
    _held(None)


def test_tuned_hopper_forwards_do_not_spill() -> None:
    import json

    path = Path(__file__).resolve().parents[2] / "plugins" / "cuda" / "compiled.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["variants"]
    assert len(rows) <= 320
    tuned = {
        name: row
        for name, row in rows.items()
        if "hopper" in name
        and "packed" not in name
        and "masked" not in name
        and "backward" not in name
        and any(dims in name for dims in TUNED)
        and name.endswith((" full", " causal"))
    }
    assert tuned
    assert all(row["spilled"] == 0 and row["warnings"] == 0 for row in tuned.values()), tuned


def test_every_kernel_that_is_launched_has_a_check_on_a_gpu() -> None:
    """`benchmarks/cuda_verify.py` knows all of them, and `--changed` tells those that no GPU has seen as they are
    now.
    """
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda_verify.py"
    launched = set()
    for source in script.parents[1].glob("plugins/cuda/hal_cuda/kernels/*/*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launcher":
                assert isinstance(node.args[1], ast.Name)
                launched.add(f"{source.parent.name}.{node.args[1].id}")
            elif isinstance(node, ast.ImportFrom) and node.module in ("forward", "kernel", "gelu_hopper"):
                launched |= {f"{source.parent.name}.{name.name}" for name in node.names}
    spec = importlib.util.spec_from_file_location("cuda_verify", script)
    assert spec is not None
    assert spec.loader is not None
    verify = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verify)
    assert set(verify.KERNELS) == launched
    found = subprocess.run([sys.executable, str(script), "--changed"], capture_output=True, text=True, check=False)
    assert all(
        (verify.ROOT / "hal_cuda" / "kernels" / f"{f}.py").exists() for files in verify.KERNELS.values() for f in files
    )
    told = [line.partition(" changed since")[0] for line in found.stdout.splitlines()]
    assert told == verify.changed(), found.stderr
    assert found.returncode == bool(told)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from triton import knobs

    from hal_core import DeviceUnavailableError

    sys.path.insert(0, str(Path(__file__).parent))
    from compile_table import portable_variants

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    with pytest.raises(DeviceUnavailableError, match="TRITON_CACHE_DIR"):
        portable_variants((8, 0))["sm_80 attend plain"]()

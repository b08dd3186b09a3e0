"""Without hal-cpu-native, or with one that cannot run here, the CPU device runs as before and says what is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("without_library")

ROOT = Path(__file__).resolve().parents[2]

ABSENT = """
import sys
sys.modules["hal_cpu_native"] = None  # import raises ImportError
import torch, hal_core as hal
from hal_cpu import hal_doctor, paths
q = torch.randn(1, 8, 512, 64)
assert torch.equal(hal.attention(q, q, q, backend="cpu"), torch.nn.functional.scaled_dot_product_attention(q, q, q))
assert "hal-cpu-native" not in hal.device("cpu:0").features
print(hal_doctor()[0].rows, hal.explain(q, q, q))
"""

BARE = """
import sys
sys.path.insert(0, sys.argv[1])
import hal_cpu_native as native
assert not native.available() and native.instruction_sets() == ()
print(native.why_absent())
import torch
try:
    native.attention(*torch.randn(3, 1, 1, 4, 32).unbind())
except native.NativeRefusal as refusal:
    assert str(refusal) == native.why_absent()
else:
    raise AssertionError
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_the_package_torchs_kernels_run_and_doctor_says_what_is_missing() -> None:
    shown = run(ABSENT)
    assert "not installed" in shown
    assert "pip install hal-cpu-native" in shown


def test_a_package_without_its_library_says_how_to_get_it(tmp_path: Path) -> None:
    """The sources alone, as where no compiler built them."""
    shutil.copytree(ROOT / "libs" / "cpu_native" / "hal_cpu_native", tmp_path / "hal_cpu_native")
    for library in (tmp_path / "hal_cpu_native").glob("*.so"):
        library.unlink()
    assert "without its compiled library: pip install hal-cpu-native" in run(BARE, str(tmp_path))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    """One that has every function, whose struct of a call is another: its calls would be read wrong."""
    package = tmp_path / "hal_cpu_native"
    shutil.copytree(ROOT / "libs" / "cpu_native" / "hal_cpu_native", package, ignore=shutil.ignore_patterns("*.so"))
    header = (ROOT / "libs/cpu_native/src/hal_cpu_native.h").read_text()
    names = set(re.findall(r"HAL_API .*?(hal_cpu_native_\w+)\(", header))
    source = "".join(f"long {name}(void) {{ return 8; }}\n" for name in sorted(names))
    (tmp_path / "other.c").write_text(source)
    library = package / "libhal_cpu_native.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "other.c")], check=True)
    assert "another version's sources (calls of 8 bytes, not " in run(BARE, str(tmp_path))


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    package = tmp_path / "hal_cpu_native"
    shutil.copytree(ROOT / "libs" / "cpu_native" / "hal_cpu_native", package)
    (package / "libhal_cpu_native.so").write_bytes(b"no library")
    shown = run(BARE, str(tmp_path))
    assert str(package / "libhal_cpu_native.so") in shown
    assert "cannot be loaded" in shown


def test_another_architecture_is_named(tmp_path: Path) -> None:
    program = "import platform; platform.machine = lambda: 'riscv64'\n" + BARE
    assert "x86-64 alone, and this is riscv64" in run(program, str(ROOT / "libs" / "cpu_native"))

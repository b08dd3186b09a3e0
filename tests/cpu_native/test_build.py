"""The library from its sources: under sanitizers, with a driver without Python and torch, and as a wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hal_core.version import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "libs" / "cpu_native"
COMPILER = shutil.which("c++")

pytestmark = [
    pytest.mark.usefixtures("without_library"),
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]


def flags_of(source: str) -> list[str]:
    """The instruction sets that CMakeLists.txt compiles a source for."""
    text = (FOLDER / "CMakeLists.txt").read_text(encoding="utf-8")
    sets = {name: words.split() for name, words in re.findall(r"^set\((AVX\w+) ([^)]+)\)$", text, re.MULTILINE)}
    sets["AVX512"] = [*sets["AVX2"], *sets["AVX512"][1:]]
    found = re.search(rf'src/{source} PROPERTIES COMPILE_OPTIONS "([^"]+)"', text)
    if not found:
        return []
    words = found[1].split(";")
    return [*sets[words[0].strip("${}")], *words[1:]]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer: str, tmp_path: Path) -> None:
    objects, running = [], []
    for source in [*(FOLDER / "src").glob("*.cpp"), *Path(__file__).parent.glob("driver*.cpp")]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = [str(COMPILER), "-std=c++17", "-O1", "-g", "-Wno-psabi", f"-fsanitize={sanitizer}"]
        command += ["-fno-sanitize-recover=all", f"-I{FOLDER / 'src'}", *flags_of(source.name)]
        running.append(subprocess.Popen([*command, "-c", str(source), "-o", objects[-1]]))
    assert [process.wait(900) for process in running] == [0] * len(running)
    driver = str(tmp_path / "driver")
    subprocess.run([str(COMPILER), f"-fsanitize={sanitizer}", *objects, "-o", driver, "-lpthread"], check=True)
    done = subprocess.run([driver, "40"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert ", 0 wrong" in done.stdout


def test_a_wheel_has_the_library_and_the_one_version(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    shutil.copytree(FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("build", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"hal_cpu_native-{__version__}-py3-none-")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"hal_cpu_native/{path.name}" for path in (FOLDER / "hal_cpu_native").glob("*.py")}
    assert sources | {"hal_cpu_native/py.typed", "hal_cpu_native/libhal_cpu_native.so"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)

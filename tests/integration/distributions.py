"""The distributions of this repository, read from their pyproject.toml, and wheels built from copies of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
#: Built by a compiler and not by setuptools, so a machine may be without it; tests/cpu_native builds its wheel.
COMPILED = ROOT / "libs" / "cpu_native"
FOLDERS = [
    ROOT,
    *sorted(
        p.parent
        for g in ("plugins", "libs", "extensions")
        for p in ROOT.glob(f"{g}/*/pyproject.toml")
        if p.parent != COMPILED
    ),
]


class Distribution(NamedTuple):
    folder: Path
    project: dict[str, Any]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.project["name"])

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def requirements(self) -> list[str]:
        optional = self.project.get("optional-dependencies", {})
        return [*self.project["dependencies"], *(line for lines in optional.values() for line in lines)]

    def files(self) -> set[str]:
        """Every file of the package, relative to the distribution's folder: what a wheel has to contain."""
        found = (path for path in (self.folder / self.package).rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in found if "__pycache__" not in path.parts}


def distributions() -> list[Distribution]:
    """Those that setuptools builds."""
    return [_read(folder) for folder in FOLDERS]


def compiled() -> Distribution:
    """The one that a compiler builds."""
    return _read(COMPILED)


def _read(folder: Path) -> Distribution:
    settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    return Distribution(folder, settings["project"], settings["tool"])


def copy(distribution: Distribution, target: Path) -> Path:
    """The folder alone, symbolic links replaced by what they name, without outputs of earlier builds."""
    wanted = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "version.py", distribution.package}
    folder = target / distribution.name
    folder.mkdir(parents=True)
    for path in distribution.folder.iterdir():
        if path.name in wanted:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder)
    return folder


#: Builds every folder in one interpreter: a process each, as pip starts, takes ten times as long.
BUILD = """
import os, sys, setuptools.build_meta as backend
target, *folders = sys.argv[1:]  # setuptools changes sys.argv
for folder in folders:
    os.chdir(folder)
    backend.build_wheel(target)
"""


def build_wheels(folders: list[Path], target: Path) -> list[Path]:
    """Wheels of `folders`, built by setuptools without an index and without build isolation."""
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", BUILD, str(target), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return sorted(target.glob("*.whl"))


def fresh_environment(folder: Path, *wanted: Path | str) -> tuple[Path, Path]:
    """(python, its folder of packages): a new environment with `wanted` installed by pip, and nothing else of ours.

    Third-party packages are borrowed from the folders of packages of this interpreter by a .pth file. Editable
    installations are .pth files themselves, which Python does not follow from a borrowed folder.
    """
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    borrowed = [
        path for path in map(Path, sys.path) if path.is_dir() and not path.resolve().is_relative_to(ROOT / "tests")
    ]
    borrowed = [path for path in borrowed if path.resolve() not in {owned.resolve() for owned in FOLDERS}]
    standard = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    borrowed = [path for path in borrowed if path.resolve() not in standard and path.name != "lib-dynload"]
    (packages / "borrowed.pth").write_text("\n".join(map(str, borrowed)) + "\n", encoding="utf-8")
    python = next(folder.glob("bin/python"), folder / "Scripts" / "python.exe")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(packages), *map(str, wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return python, packages


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}

"""Distributions: one version, compatible ranges between them, complete wheels, and mypy told of all packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import distributions as tree
import pytest

from hal_core.version import __version__

pytestmark = pytest.mark.xdist_group("packaging")  # one worker builds the wheels

EVERY = tree.distributions()
NAMES = [distribution.name for distribution in EVERY]
SERIES = ".".join(__version__.split(".")[:2])


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """{distribution name: wheel}, each built from a copy of its folder alone."""
    folder = tmp_path_factory.mktemp("wheels")
    built = tree.build_wheels([tree.copy(distribution, folder / "source") for distribution in EVERY], folder / "dist")
    return {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in built}


@pytest.mark.parametrize("distribution", EVERY, ids=NAMES)
def test_the_version_is_read_from_the_core(distribution):
    assert distribution.project["dynamic"] == ["version"]
    assert "version" not in distribution.project
    attribute = distribution.settings["setuptools"]["dynamic"]["version"]["attr"]
    source = distribution.folder / f"{attribute.removesuffix('.__version__').replace('.', '/')}.py"
    assert source.resolve() == tree.ROOT / "hal_core" / "version.py"


@pytest.mark.parametrize("distribution", EVERY, ids=NAMES)
def test_no_package_states_a_version_of_its_own(distribution):
    literal = re.compile(r"^__version__\s*=", re.MULTILINE)
    package = distribution.folder / distribution.package
    stated = [path.name for path in package.rglob("*.py") if literal.search(path.read_text(encoding="utf-8"))]
    assert stated == (["version.py"] if distribution.name == "hal-core" else [])


@pytest.mark.parametrize("distribution", EVERY, ids=NAMES)
def test_dependencies_between_distributions_are_of_one_series(distribution):
    """A plugin runs on the core of its own minor version. An extra of a dependency pinned already needs no range."""
    pattern = re.compile(r"^(hal-[a-z-]+)(\[[a-z,]+\])?(.*)$")
    ours = [match for match in map(pattern.match, distribution.requirements) if match]
    known = {*NAMES, tree.compiled().name}
    assert all(match[1] in known for match in ours), f"not in this repository: {[match[0] for match in ours]}"
    pinned = {match[1] for match in ours if match[3] == f"~={SERIES}.0"}
    loose = {match[0] for match in ours if match[1] not in pinned | {distribution.name}}
    assert not loose, f"{distribution.folder}/pyproject.toml: write ~={SERIES}.0 behind {loose}"
    assert all(match[3] in ("", f"~={SERIES}.0") for match in ours), [match[0] for match in ours]


@pytest.mark.parametrize("distribution", EVERY, ids=NAMES)
def test_a_wheel_contains_every_file_of_its_package(distribution, wheels):
    found = tree.contents(wheels[distribution.name])
    missing = distribution.files() - found
    assert not missing, f"{distribution.folder}/pyproject.toml: package-data leaves out {sorted(missing)}"
    assert f"{distribution.package}/py.typed" in found
    strangers = {name.split("/")[0] for name in found} - {distribution.package}
    assert {name.split("-")[0] for name in strangers} == {distribution.package}, "only the package and its dist-info"
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_wheels_carry_the_one_version(wheels):
    assert {wheel.name.split("-")[1] for wheel in wheels.values()} == {__version__}
    assert sorted(wheels) == sorted(NAMES)


@pytest.mark.parametrize("name", ["hal-core", "hal-cpu"])
def test_an_sdist_builds_a_wheel_on_its_own(name, tmp_path):
    """Symbolic links become files in the archive, so an unpacked sdist needs nothing of the repository."""
    distribution = EVERY[NAMES.index(name)]
    folder = tmp_path / "tree" / distribution.folder.relative_to(tree.ROOT)
    (tmp_path / "tree" / "hal_core").mkdir(parents=True)
    for shared in ("LICENSE", "README.md", "pyproject.toml", "hal_core/version.py", "hal_core/py.typed"):
        shutil.copy(tree.ROOT / shared, tmp_path / "tree" / shared)
    if folder != tmp_path / "tree":
        ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(distribution.folder, folder, symlinks=True, ignore=ignore)
        assert (folder / "version.py").is_symlink()
    build = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=folder, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    shutil.rmtree(tmp_path / "tree")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (wheel,) = tree.build_wheels([unpacked], tmp_path / "dist")
    assert wheel.name == f"{name.replace('-', '_')}-{__version__}-py3-none-any.whl"


def test_mypy_is_told_of_every_package():
    settings = tomllib.loads((tree.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    every = [*EVERY, tree.compiled()]
    assert sorted(settings["packages"]) == sorted(distribution.package for distribution in every)
    folders = {f"$MYPY_CONFIG_FILE_DIR/{d.folder.relative_to(tree.ROOT)}" for d in every if d.folder != tree.ROOT}
    assert set(settings["mypy_path"]) == folders

"""Fixtures of every test: a seed from the test's name, and a process that knows nothing of its user."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

_VARIABLES = ("HAL_BACKEND", "HAL_PLUGINS", "HAL_DISABLE", "HAL_STRICT", "HAL_DEBUG")
for _name in _VARIABLES:  # plugins are discovered once in a process, perhaps while test files are imported
    os.environ.pop(_name, None)

# Workers of pytest-xdist are started after this line and must collect equal names in equal order: the order of a set of
# strings, which may be part of either, depends on this variable.
os.environ.setdefault("PYTHONHASHSEED", "0")

# Several workers (pytest-xdist) share the cores: one thread of arithmetic each, for the processes that tests start too.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")


def pytest_configure() -> None:
    """Hypothesis: `make test-all` sets HYPOTHESIS_PROFILE=thorough; failures are printed, so no database is kept."""
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # a machine without a network may lack it: its tests are skipped there, visibly
        return
    common = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("normal", max_examples=800, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=10_000, **common)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "normal"))


def _number(request: pytest.FixtureRequest) -> int:
    """A number from the test's own name, without the "@group" that pytest-xdist appends."""
    group = request.node.get_closest_marker("xdist_group")
    name = request.node.nodeid.removesuffix(f"@{group.args[0]}") if group else request.node.nodeid
    return zlib.crc32(name.encode())


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number from the test's own name: fresh data for each test, the same in every run. Printed on failure."""
    number = _number(request)
    print(f"seed {number}")
    return number


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hal-cache")


@pytest.fixture(autouse=True)
def _own_process(request: pytest.FixtureRequest, _caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """HAL_CACHE in a temporary folder, none of the caller's variables, and the initial settings afterwards."""
    cache = _caches / f"{_number(request):08x}"  # made by whoever writes there
    monkeypatch.setenv("HAL_CACHE", str(cache))
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    if "hal_core" in sys.modules:
        import hal_core

        hal_core.configure()

"""The pytest base class: one test per check, absence a skip, and every other trouble a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

import hal_core as hal
from hal_core.testing import CHECKS, ConformanceSuite
from hal_core.testing.faulty_backends import FAULTS, DenseBackend


def suite(**attributes: Any) -> ConformanceSuite:
    return type("TestSome", (ConformanceSuite,), {"backend": "honest", "quick": True, "seed": 1} | attributes)()


@pytest.fixture
def faulty() -> Any:
    hal.register(FAULTS["wrong scale"].make())
    yield
    hal.unregister("faulty")


@pytest.mark.usefixtures("honest")
def test_passing_and_skipped_checks() -> None:
    suite().test_conformance("scale")
    with pytest.raises(pytest.skip.Exception, match="not claimed"):
        suite().test_conformance("paged")
    with pytest.raises(pytest.skip.Exception, match="made so"):
        suite(unsupported={"scale": "made so"}).test_conformance("scale")


@pytest.mark.usefixtures("faulty")
def test_a_failure_says_what_and_with_which_seed() -> None:
    with pytest.raises(AssertionError, match=r"result of scale .*\(seed 1\)"):
        suite(backend="faulty").test_conformance("scale")
    with pytest.raises(pytest.xfail.Exception, match="known"):
        suite(backend="faulty", expected_failure={"scale": "known"}).test_conformance("scale")


@pytest.mark.usefixtures("honest")
def test_an_unexpected_pass_fails() -> None:
    with pytest.raises(AssertionError, match="was expected to fail: known"):
        suite(expected_failure={"scale": "known"}).test_conformance("scale")


def test_an_absent_device_is_a_skip_with_its_reason_and_an_unknown_one_a_failure() -> None:
    class Absent(DenseBackend):
        def devices(self) -> list[hal.Device]:
            return []

        def why_absent(self) -> str:
            return "the card is not plugged in"

    hal.register(Absent(), name="absent")
    try:
        with pytest.raises(pytest.skip.Exception, match="the card is not plugged in"):
            suite(backend="absent").test_conformance("scale")
    finally:
        hal.unregister("absent")
    with pytest.raises(hal.UnknownBackendError):
        suite(backend="nowhere").test_conformance("scale")


def test_a_misspelled_expectation_fails() -> None:
    hal.register(DenseBackend())
    try:
        with pytest.raises(hal.ContractError, match="scale"):
            suite(unsupported={"scales": "made so"}).test_conformance("masks")
    finally:
        hal.unregister("honest")


def test_a_subclass_gives_one_test_for_each_check(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from hal_core.testing import ConformanceSuite\nclass TestIt(ConformanceSuite):\n    backend = 'nowhere'\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stdout
    assert all(f"TestIt::test_conformance[{name}]" in listed for name in CHECKS)
    assert "ConformanceSuite::" not in listed


class TestHonest(ConformanceSuite):
    """The base class at work."""

    backend: ClassVar[str] = "honest"
    quick = True
    seed = 7

    @pytest.fixture(autouse=True)
    def _registered(self, honest: DenseBackend) -> None:
        return None

"""The conformance kit as pytest tests: one test per check.

from hal_core.testing import ConformanceSuite

class TestMyDevice(ConformanceSuite):
    backend = "mydevice"
    unsupported = {"dlpack": "the device's memory is not addressable"}
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from ..errors import DeviceUnavailableError
from ..registry import registry
from .conformance import CHECKS, Status, check_backend


class ConformanceSuite:
    """Base class of a device's conformance tests.

    Attributes:
        backend: device id or backend name. unsupported, expected_failure, quick, seed: see `check_backend`.

    A device that is not present is a skip with its reason; an unknown backend, and any other error, a failure.
    """

    backend: ClassVar[str]
    unsupported: ClassVar[Mapping[str, str]] = {}
    expected_failure: ClassVar[Mapping[str, str]] = {}
    quick: ClassVar[bool] = False
    seed: ClassVar[int | None] = None

    @pytest.mark.parametrize("check", list(CHECKS))
    def test_conformance(self, check: str) -> None:
        try:
            registry.find(self.backend)
        except DeviceUnavailableError as absent:
            pytest.skip(str(absent))
        reasons: dict[str, Any] = {"unsupported": self.unsupported, "expected_failure": self.expected_failure}
        report = check_backend(self.backend, checks=[check], quick=self.quick, seed=self.seed, **reasons)
        result = report[check]
        if result.status in (Status.SKIPPED, Status.UNSUPPORTED):
            pytest.skip(result.detail)
        if result.status is Status.EXPECTED_FAILURE:
            pytest.xfail(result.detail)
        if result.warning:
            warnings.warn(f"{check} of {report.device.id}: {result.warning}", stacklevel=2)
        assert result.passed, f"{result.detail} (seed {report.seed})"

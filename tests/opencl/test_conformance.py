"""Every OpenCL device is held to what it claims; every case in `make test-all`, one of each claim in `make test`."""

from __future__ import annotations

import pytest

from hal_core.testing import ConformanceSuite


class TestOpenCl(ConformanceSuite):
    backend = "opencl:0"
    quick = True


@pytest.mark.slow
class TestOpenClInFull(ConformanceSuite):
    backend = "opencl:0"

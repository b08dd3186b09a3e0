"""kpu:0 is held to everything it claims; every case in `make test-all`, one of each claim in `make test`."""

from __future__ import annotations

import pytest

from hal_core.testing import ConformanceSuite


class TestKPU(ConformanceSuite):
    backend = "kpu:0"
    quick = True


@pytest.mark.slow
class TestKPUInFull(ConformanceSuite):
    backend = "kpu:0"

"""The CPU passes the conformance kit."""

from hal_core.testing import ConformanceSuite


class TestCpu(ConformanceSuite):
    backend = "cpu"
    quick = True

"""The conformance kit on a GPU."""

from hal_core.testing import ConformanceSuite


class TestCuda(ConformanceSuite):
    backend = "cuda"

"""The CPU's own paths: hal-cpu-native, which tests/cpu_native holds to the same, takes no call here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _torchs_kernels() -> Iterator[None]:
    pytest.importorskip("torch")
    from hal_cpu.paths import offering

    with offering("never"):
        yield

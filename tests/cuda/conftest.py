"""What the tests of the CUDA plugin share: the GPU where there is one, and a reason to skip where there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hal_core.registry import registry

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(scope="session")
def gpu() -> str:
    """The first CUDA device's id, "cuda:0"; without one the test is skipped with the plugin's own reason."""
    from hal_core import DeviceUnavailableError

    try:
        return registry.find("cuda")[0].id
    except DeviceUnavailableError as absent:
        pytest.skip(str(absent))

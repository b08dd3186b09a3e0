"""These tests need the compiled library: without it they are skipped, and say why."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip every test of this folder that is not marked for a machine without the library."""
    why = _why()
    for item in items:
        if why and "cpu_native" in item.path.parts and "without_library" not in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.skip(reason=f"hal-cpu-native: {why}"))


def _why() -> str:
    try:
        from hal_cpu_native import why_absent
    except ImportError:
        return "not built here: make native"
    return why_absent()


@pytest.fixture
def without_library() -> None:
    """Marks a test that needs no library."""

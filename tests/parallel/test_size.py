"""The extension stays small, by the count of the core's own size."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_extension_is_no_larger_than_its_bar():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from core_size import sizes
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert sum(sizes("extensions/parallel/hal_parallel").values()) <= 2000

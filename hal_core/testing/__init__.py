"""The conformance kit: what a device is held to, public and versioned with the core.

    from hal_core.testing import check_backend
    print(check_backend("cpu"))          # every claim, every refusal, and how the device behaves

Importing this package imports nothing else: each part is imported when it is first used, and torch with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import BenchmarkResult, BenchmarkRunner, Comparison, allocator_peak
    from .cases import Case, Inputs
    from .conformance import CHECKS, CheckResult, Report, check_backend
    from .corners import claimed_cases, unclaimed_cases
    from .reference import reference, reference_gradients, relative_error, request_of
    from .suite import ConformanceSuite

_PARTS = {
    "benchmark": ("BenchmarkResult", "BenchmarkRunner", "Comparison", "allocator_peak"),
    "cases": ("Case", "Inputs"),
    "conformance": ("CHECKS", "CheckResult", "Report", "check_backend"),
    "corners": ("claimed_cases", "unclaimed_cases"),
    "reference": ("reference", "reference_gradients", "relative_error", "request_of"),
    "suite": ("ConformanceSuite",),
}

__all__ = [
    "CHECKS",
    "BenchmarkResult",
    "BenchmarkRunner",
    "Case",
    "CheckResult",
    "Comparison",
    "ConformanceSuite",
    "Inputs",
    "Report",
    "allocator_peak",
    "check_backend",
    "claimed_cases",
    "reference",
    "reference_gradients",
    "relative_error",
    "request_of",
    "unclaimed_cases",
]


def __getattr__(name: str) -> Any:
    """Import the part that has the name. All of a part's names are set: `reference` is a module and a function in it,
    and importing the module alone would leave the attribute naming the module.
    """
    for part, names in _PARTS.items():
        if name in names:
            module = importlib.import_module(f".{part}", __name__)
            globals().update({each: getattr(module, each) for each in names})
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A pytest plugin for PyTorch's tests: takes one share of them, puts own kernels behind PyTorch's operators if asked,
and writes each outcome down as it is known. Configured by the environment, see `torch_tests.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

_share, _shares, _every = (int(os.environ[f"HAL_OUTSIDE_{name}"]) for name in ("SHARE", "SHARES", "EVERY"))
_log = Path(os.environ["HAL_OUTSIDE_LOG"])
_LARGE = 300
_own = os.environ["HAL_OUTSIDE_OWN"] == "1"


def _write(record: dict[str, Any]) -> None:
    with _log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if _own:
        import hal_cuda

        hal_cuda.activate_sdpa(always=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One share of all tests, of families of more than `_LARGE` of every `_every`-th, in an order that is the same in
    every process.
    """
    mixed = sorted(items, key=lambda item: item.nodeid)
    random.Random(0).shuffle(mixed)
    families: dict[str, list[pytest.Item]] = {}
    for item in mixed:
        families.setdefault(re.split(r"_(batch|float|bfloat|cuda|cpu|type)", item.name)[0], []).append(item)
    chosen = [test for tests in families.values() for test in tests[:: _every if len(tests) > _LARGE else 1]]
    random.Random(1).shuffle(chosen)  # families mixed, for runs that the time ends
    items[:] = chosen[_share::_shares]
    _write({"collected": len(mixed), "chosen": len(chosen), "taken": len(items)})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    if report.when == "call" or report.outcome != "passed":
        why = "" if report.outcome == "passed" else str(report.longrepr)[-1500:]
        record = {"test": item.nodeid, "outcome": report.outcome, "why": why, "seconds": round(report.duration, 3)}
        _write(record | _calls())


def _calls() -> dict[str, dict[str, int]]:
    """Calls of the operators since this was asked last."""
    if not _own:
        return {}
    import hal_cuda

    found = hal_cuda.sdpa_statistics(reset=True)
    return {"own": dict(found.own), "original": dict(found.original), "reasons": dict(found.reasons)}

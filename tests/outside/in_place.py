"""A pytest plugin: hal in the place of torch's attention function and module, and every test's outcome in a file.

HAL_OUTSIDE_OWN=1 puts hal there; HAL_OUTSIDE_LOG names the file; HAL_OUTSIDE_EVERY=n leaves every n-th test of a family
of more than `LARGE`: a prime number meets all values of parameters that are multiplied out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("HAL_OUTSIDE_OWN") != "1":
        return
    import torch
    from hal_nn import PhotonicMultiHeadAttention, override_sdpa

    # The fused path of torch's modules is what some tests are about; hal's module keeps itself off it.
    config.stash[_KEY] = override_sdpa(fused_inference=True)
    torch.nn.MultiheadAttention = PhotonicMultiHeadAttention  # type: ignore[misc]
    torch.nn.modules.activation.MultiheadAttention = PhotonicMultiHeadAttention  # type: ignore[misc]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = int(os.environ.get("HAL_OUTSIDE_EVERY", "1"))
    families: dict[str, list[pytest.Item]] = {}
    for item in items:  # named test_what_cpu_and_the_parameters
        families.setdefault(item.nodeid.partition("_cpu_")[0], []).append(item)
    chosen = {test for tests in families.values() for test in tests[:: every if len(tests) > LARGE else 1]}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
    _write({"collected": sum(map(len, families.values()))})


def pytest_unconfigure(config: pytest.Config) -> None:
    counted = config.stash.get(_KEY, None)
    if counted is not None:
        _write({"calls": counted.calls})
        counted.revert()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash: Any = getattr(report.longrepr, "reprcrash", None)
        why = "" if crash is None else str(crash.message)
        _write({"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "why": why})


def _write(record: dict[str, Any]) -> None:
    with Path(os.environ["HAL_OUTSIDE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


#: Tests of one function, from which on one in HAL_OUTSIDE_EVERY is run.
LARGE = 300
_KEY = pytest.StashKey[Any]()

"""A pytest plugin: hal in the place of torch's attention function and module, and every test's outcome in a file.

HAL_OUTSIDE_OWN=1 puts hal there; HAL_OUTSIDE_LOG names the file; HAL_OUTSIDE_EVERY=n leaves every n-th test of a family
of more than `LARGE`: a prime number meets all values of parameters that are multiplied out. HAL_OUTSIDE_MOST=n runs at
most n tests that the file does not have, spread over the families, so that a run can be left and gone on with.
HAL_OUTSIDE_AFTER=n passes over the first n tests of that order, which another run had.
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
    # Families take turns, and each goes through its parameters in steps: what a run has when it is left is a sample.
    turns = [(turn / len(tests), item) for tests in families.values() for turn, item in enumerate(_in_steps(tests))]
    ordered = [item for _, item in sorted(turns, key=lambda one: one[0]) if item in chosen]
    ordered = ordered[int(os.environ.get("HAL_OUTSIDE_AFTER", "0")) :]
    done = {record.get("began") for record in read_log(Path(os.environ["HAL_OUTSIDE_LOG"]))}
    left = [item for item in ordered if _named(item.nodeid) not in done]
    items[:] = left[: int(os.environ.get("HAL_OUTSIDE_MOST", len(left)))]
    _write({"collected": sum(map(len, families.values())), "left": len(left)})


def pytest_unconfigure(config: pytest.Config) -> None:
    counted = config.stash.get(_KEY, None)
    if counted is not None:
        _write({"calls": counted.calls})
        counted.revert()


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"began": _named(nodeid)})  # a test that ends the process is not met again


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash: Any = getattr(report.longrepr, "reprcrash", None)
        why = "" if crash is None else str(crash.message)
        _write({"test": _named(report.nodeid), "outcome": report.outcome, "why": why})


def read_log(log: Path) -> list[dict[str, Any]]:
    """The records of a log, but for a last line that was not finished."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _named(nodeid: str) -> str:
    return nodeid.partition("::")[2]


def _in_steps(tests: list[pytest.Item]) -> list[pytest.Item]:
    """Every STEP-th test, then those beside them."""
    return [test for first in range(STEP) for test in tests[first::STEP]]


def _write(record: dict[str, Any]) -> None:
    with Path(os.environ["HAL_OUTSIDE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


#: Tests of one function, from which on one in HAL_OUTSIDE_EVERY is run.
LARGE = 300
#: A prime number: a step meets all values of parameters that are multiplied out.
STEP = 37
_KEY = pytest.StashKey[Any]()

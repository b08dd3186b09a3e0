"""A KeyboardInterrupt at any line of a call: its memory comes back, and the session stays usable."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

opencl = pytest.importorskip("hal_opencl.session", exc_type=ImportError)
import hal_compute  # noqa: E402

FOLDERS = tuple(str(Path(module.__file__).parent) for module in (opencl, hal_compute))


class Interrupting:
    """Raises KeyboardInterrupt at the `number`-th line that runs in this project's files."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def interrupted(number: int, run: Any, *given: Any) -> bool:
    """Whether the call was interrupted at its `number`-th line."""
    before = sys.gettrace()
    sys.settrace(Interrupting(number))
    try:
        run(*given)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("length", [8, pytest.param(70, marks=pytest.mark.slow)])
def test_an_interrupt_anywhere_in_a_call_leaves_nothing_in_use(session: Any, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, length, 40, generator=generator) for _ in range(3))  # padded: staged
    mask = torch.rand(length, length, generator=generator) > -1
    request = hal.AttentionRequest(1, 2, 2, length, length, 40, 40, "float32", mask=hal.MaskKind.BOOLEAN)
    run = session.bind(request)
    run(query, key, value, mask)
    number = 1
    while interrupted(number, run, query, key, value, mask):
        assert relative_error(run(query, key, value, mask), reference(query, key, value).out) <= 1e-5
        assert session.memory.stats().in_use == 0, f"interrupted at line {number}"
        number += 1 if length == 70 else 29
    assert number > 50

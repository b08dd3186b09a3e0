"""Forks, closed sessions and interrupts: nothing hangs, and what was in use comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

FORK = """
import os, sys, torch, hal_core as hal
device = sys.argv[1]
query = torch.randn(1, 2, 40, 32)
hal.attention(query, query, query, backend=device)
child = os.fork()
if not child:
    try:
        if sys.argv[2] == "call":
            hal.attention(query, query, query, backend=device)
        else:
            hal.session(device)
    except hal.HalError as error:
        print("refused:", error, flush=True)
    sys.exit(7)  # runs the handlers at exit that were inherited
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    import time; time.sleep(0.1)
else:
    os.kill(child, 9)
print("child", os.waitstatus_to_exitcode(status) if ended else "hung")
out = hal.attention(query, query, query, backend=device)
print("parent", torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(query, query, query), atol=1e-5))
"""


@pytest.mark.parametrize("what", ["call", pytest.param("open", marks=pytest.mark.slow)])
def test_a_forked_process_is_refused_and_ends_and_its_parent_goes_on(device: str, what: str, programs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, device, what],
        env=os.environ | {"HAL_PLUGINS": f"{device[:-2]},compute", "HAL_CACHE": str(programs)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'multiprocessing.get_context("spawn")' in done.stdout
    assert "child 7" in done.stdout
    assert "parent True" in done.stdout


def test_calls_go_on_after_the_session_was_closed(device: str, seed: int) -> None:
    query = torch.randn(1, 2, 24, 32, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        out = hal.attention(query, query, query, backend=device)
        assert relative_error(out, reference(query, query, query).out) <= 1e-5
        hal.session(device).close()


def test_a_closed_session_stays_closed_and_says_so(device: str) -> None:
    query, session = torch.randn(1, 2, 24, 32), hal.session(device)
    request = hal.AttentionRequest(1, 2, 2, 24, 24, 32, 32, "float32")
    run = session.bind(request)  # type: ignore[attr-defined]
    session.close()
    session.close()
    assert session.closed  # type: ignore[attr-defined]
    with pytest.raises(hal.DeviceUnavailableError, match=r"was closed: take a new one with hal.session"):
        run(query, query, query)

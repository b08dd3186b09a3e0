"""Over NCCL on the CUDA devices of this machine, one rank each: links, and every strategy against float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.xdist_group("parallel"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_strategy_agrees_with_float64_over_nccl():
    count = str(max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("nccl_rank.py"))],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    print(found)
    for name, error in found.items():
        bound = 0 if "," not in name else 1e-2 if not name.endswith("out") else 5e-3  # bfloat16
        assert error <= bound, f"{name}: {error}"

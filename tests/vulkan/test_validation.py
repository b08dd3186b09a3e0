"""The validation layers, synchronisation included, have nothing to say about what this plugin asks of a driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hal_core as hal

LAYER = {
    "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
    "VK_LAYER_ENABLES": "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
}
MESSAGE = re.compile(r"VUID-[\w-]+|SYNC-HAZARD[\w-]*|UNASSIGNED-[\w-]+|Validation (?:Error|Warning|Performance)")
CALLS = """
import torch, hal_core as hal
for _ in range(2):  # recorded, and run again
    q = torch.randn(1, 4, 40, 64, requires_grad=True)
    k = torch.randn(1, 2, 600, 64, requires_grad=True)
    hal.attention(q, k, k, backend="vulkan:0", enable_gqa=True, is_causal=True).sum().backward()
    few, keys = q.half().detach()[:, :, :1], k.half().detach()
    hal.attention(few, keys, keys, backend="vulkan:0", enable_gqa=True)
    u = torch.randn(1, 8, 8)
    hal.kernel("reaction_diffusion_step", "vulkan")(u, u)
    hal.kernel("matmul", "vulkan")(u[0], u[0])
big = torch.randn(1, 2, 4096, 64)
hal.attention(big[:, :, :9], big, big, backend="vulkan:0")
print("finished")
"""
WRONG = """
import hal_core as hal
gpu = hal.session("vulkan:0").recorder.gpu
gpu.begin(gpu.begin())
print("finished")
"""


@pytest.fixture(autouse=True)
def layer(device: hal.Device) -> None:
    folders = ("/usr/share/vulkan/explicit_layer.d", "/etc/vulkan/explicit_layer.d")
    if not any(list(Path(folder).glob("*validation*")) for folder in folders):
        pytest.skip("the validation layer is not installed; Debian: apt-get install vulkan-validationlayers")


def messages(*arguments: str) -> tuple[set[str], str]:
    """(what the layers said while Python ran with these arguments, all that was printed). The program must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | LAYER, capture_output=True, text=True, timeout=580, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return set(MESSAGE.findall(said)), said


def test_calls_and_the_recordings_they_leave_are_valid() -> None:
    said, text = messages("-c", CALLS)
    assert "finished" in text
    assert not said


def test_the_layer_listens() -> None:
    said, text = messages("-c", WRONG)
    assert "finished" in text
    assert "VUID-vkBeginCommandBuffer-commandBuffer-00049" in said


@pytest.mark.slow
def test_the_whole_suite_is_valid() -> None:
    folder = Path(__file__).parent
    others = sorted(str(path) for path in folder.glob("test_*.py") if path != Path(__file__))
    said, _ = messages("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", "not slow", *others)
    assert not said

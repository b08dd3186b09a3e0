"""Detection, memory, caches and failures of Vulkan devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.calibration import calibrate, save
from hal_core.registry import registry
from hal_core.testing import relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_compute import waits  # noqa: E402
from hal_compute.pool import BLOCK  # noqa: E402
from hal_vulkan import discovery, tiling  # noqa: E402
from hal_vulkan.kernels import build_shaders  # noqa: E402
from hal_vulkan.runtime.pipelines import cache_path  # noqa: E402

WHY = """
import hal_core as hal
from hal_core.registry import registry
print([d.id for d in hal.devices() if d.family == "vulkan"], registry.why_absent(registry.entry("vulkan")))
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def request(tensor: torch.Tensor, **changes: Any) -> hal.AttentionRequest:
    batch, heads, length, dim = tensor.shape
    values = {"len_q": length, "len_k": length, "dim_qk": dim, "dim_v": dim, "dtype": "float32"} | changes
    return hal.AttentionRequest(batch=batch, heads_q=heads, heads_kv=heads, **values)


def test_without_a_driver_the_device_is_absent_and_says_why(device: hal.Device) -> None:
    done = run(WHY, VK_DRIVER_FILES="/nowhere.json", VK_ICD_FILENAMES="/nowhere.json")
    assert done.returncode == 0, done.stderr
    assert (
        "[] vulkan is installed but has no device: loader found, no driver; install mesa-vulkan-drivers" in done.stdout
    )


def test_without_a_loader_the_sentence_names_the_package() -> None:
    hide = "import sys; sys.modules['vulkan._vulkan'] = None\nimport hal_vulkan.runtime._vk as vk\n"
    raising = "import types\nclass Absent(types.ModuleType):\n  def __getattr__(self, name): raise OSError(name)\n"
    program = (
        raising + "import sys\nsys.modules['vulkan._vulkan'] = Absent('vulkan._vulkan')\nsys.modules['vulkan'] = "
        "types.ModuleType('vulkan')\nfrom hal_vulkan.discovery import find\nprint(find().devices, find().reason)"
    )
    assert "() no Vulkan loader (libvulkan.so.1); Debian: apt-get install libvulkan1" in run(program).stdout
    program = hide + "from hal_vulkan.discovery import find\nprint(find().devices, find().reason)"
    assert "() the Python package vulkan is not installed; pip install vulkan" in run(program).stdout


@pytest.mark.parametrize("source", build_shaders.sources(), ids=lambda source: source.stem)
def test_the_committed_spirv_is_what_its_source_builds(source: Path, tmp_path: Path) -> None:
    if reason := build_shaders.why_not(source):
        pytest.skip(reason)
    for path in build_shaders.build(source, tmp_path):
        # The second word but one of the header is the compiler's own version.
        ours, built = (p.read_bytes() for p in (build_shaders.FOLDER / path.name, path))
        assert ours[:8] + ours[12:] == built[:8] + built[12:], (
            f"{path.name}: run python -m hal_vulkan.kernels.build_shaders"
        )


def test_every_binary_has_a_source() -> None:
    wanted = {name for source in build_shaders.sources() for name in build_shaders.targets(source)}
    assert {path.name for path in build_shaders.FOLDER.glob("*.spv")} == wanted


def test_a_thousand_calls_of_mixed_shapes_leave_memory_as_it_was(session: Any, seed: int) -> None:
    generator, recorder = torch.Generator().manual_seed(seed), session.recorder

    def whole(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    # The same shapes in four rounds: the most that drawn shapes need at once is chance, and a later round's is no
    # growth.
    shapes = [(1 + n % 2, 32 * whole(4), whole(40), whole(200) * (10 if n % 5 == 0 else 1)) for n in range(250)]
    pools = [recorder.pool] if recorder.mapped else [recorder.pool, recorder.staging]
    reserved, fragmented, kept = [], [], []
    for batch, dim, len_q, len_k in shapes * 4:
        query, key = torch.zeros(batch, 2, len_q, dim), torch.zeros(batch, 2, len_k, dim)
        session.bind(request(query, len_k=len_k))(query, key, key)
        reserved.append(sum(pool.reserved for pool in pools))
        fragmented.append(session.memory.fragmentation)
        kept.append(recorder.kept_bytes)
    assert session.memory.stats().in_use == 0
    assert max(fragmented) <= 0.25
    assert max(reserved[750:]) <= max(reserved[:750]), "memory grows"
    assert max(reserved) <= max(kept) / 0.75 + len(pools) * BLOCK, (
        "more than what is kept, scattered, and a block begun"
    )
    assert session.memory.trim() > 0
    assert sum(pool.reserved for pool in pools) == 0


def test_a_damaged_pipeline_cache_is_ignored(device: hal.Device) -> None:
    path = cache_path(discovery.find().adapters[device.id])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"from another driver")
    query = torch.randn(1, 1, 8, 32)
    with registry.backend_of(device).open(device) as session:
        out = session.bind(request(query))(query, query, query)
    assert relative_error(out, torch.nn.functional.scaled_dot_product_attention(query, query, query)) <= 1e-5
    assert path.read_bytes() != b"from another driver", "closing the session writes a cache of this driver"


def test_a_wait_that_takes_too_long_names_what_it_waited_for(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "TIMEOUT", 1e-9)
    query = torch.randn(1, 4, 512, 64)
    with pytest.raises(hal.DeviceUnavailableError, match=r"did not compute attention .*512 x 512.* within"):
        session.bind(request(query))(query, query, query)
    monkeypatch.setattr(waits, "TIMEOUT", 300.0)
    assert bool(session.bind(request(query))(query, query, query).isfinite().all())


def test_memory_beyond_the_limit_is_refused_and_the_session_stays_usable(device: hal.Device) -> None:
    from hal_vulkan.session import VulkanSession

    with VulkanSession(device, discovery.find().adapters[device.id], 1 << 20) as session:
        large, small = torch.randn(1, 4, 2048, 64), torch.randn(1, 1, 16, 32)
        with pytest.raises(hal.MemoryLimitError, match="1,048,576"):
            session.bind(request(large))(large, large, large)
        assert session.memory.stats().in_use == 0
        assert bool(session.bind(request(small))(small, small, small).isfinite().all())


def test_a_buffer_over_the_range_limit_is_refused_before_anything_runs(device: hal.Device) -> None:
    most = discovery.find().adapters[device.id].limits["maxStorageBufferRange"]
    if most > 1 << 28:
        pytest.skip("this device's ranges are larger than a test can allocate")
    query = torch.empty(1, 1, most // (64 * 4) + 64, 64)
    decision = hal.explain(query[:, :, :4], query, query, backend="vulkan:0")
    assert [r.code for c in decision.candidates for r in c.refusals] == [hal.Code.MEMORY]


def test_a_closed_session_says_so(device: hal.Device) -> None:
    session = registry.backend_of(device).open(device)
    session.close()
    query = torch.randn(1, 1, 8, 32)
    with pytest.raises(hal.DeviceUnavailableError, match="was closed"):
        session.bind(request(query))(query, query, query)


def test_few_queries_are_split_over_the_keys(session: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, 1, 64, generator=generator)
    key, value = (torch.randn(1, 4, 3000, 64, generator=generator) for _ in range(2))
    want = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert relative_error(session.bind(request(query, len_k=3000))(query, key, value), want) <= 1e-5


@pytest.mark.parametrize(("dim", "shared"), [(64, 49152), (128, 49152), (256, 49152), (64, 32768), (256, 32768)])
def test_a_gpus_tiles_fit_shared_memory_and_agree_with_float64(
    session: Any, monkeypatch: pytest.MonkeyPatch, dim: int, shared: int, seed: int
) -> None:
    shape = tiling.tile_cut(False, dim, shared)
    assert shape.shared_bytes(dim) <= shared
    if shape.shared_bytes(dim) > session.recorder.adapter.limits["maxComputeSharedMemorySize"]:
        pytest.skip("this device has less shared memory than the shape needs")
    monkeypatch.setattr(tiling, "tile_cut", lambda is_cpu, dim, shared: shape)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 75, dim, generator=generator) for _ in range(3))
    out = session.bind(request(query, causal=hal.Causal.TOP_LEFT))(query, key, value)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    assert relative_error(out, want) <= 1e-5


def test_a_calibration_times_recorded_calls_and_feeds_the_estimates(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = registry.backend_of(device)
    asked = hal.AttentionRequest(
        batch=1, heads_q=8, heads_kv=8, len_q=16, len_k=16, dim_qk=64, dim_v=64, dtype="float32"
    )
    assert backend.estimate(asked, device).time.basis == "declared"
    monkeypatch.setattr(type(backend), "calibration_length", 64)
    opened, begun = [], []
    usual = type(backend).open

    def watched(self: Any, device: hal.Device) -> Any:
        opened.append(usual(self, device))
        gpu = opened[-1].recorder.gpu
        begin = gpu.begin
        monkeypatch.setattr(gpu, "begin", lambda *given: begun.append(given) or begin(*given))
        return opened[-1]

    monkeypatch.setattr(type(backend), "open", watched)
    calibrate(device.id)
    recorded = begun.count(())  # others begin a slot's commands anew
    assert recorded < opened[-1].recorder.gpu.submitted / 5, "calls of one shape run its recording"
    assert backend.estimate(asked, device).time.basis == "measured"


def test_calls_from_cuda_are_estimated_by_their_own_calibration(device: hal.Device) -> None:
    backend, values = registry.backend_of(device), {"call": 1e-4, "call from cuda": 5e-4, "mac": 1e-15}
    save(device, values)
    middles = {}
    for place in ("cpu", "cuda:0"):
        asked = hal.AttentionRequest(1, 1, 1, 8, 8, 32, 32, "float32", place)
        middles[place] = backend.estimate(asked, device).time.middle
    assert middles["cuda:0"] == pytest.approx(5 * middles["cpu"], rel=1e-3)
    save(device, {"call": 1e-4, "mac": 1e-15})
    registry.refresh(device.id)
    assert backend.estimate(asked, device).time.basis == "declared", "calls from CUDA were not measured"


def test_doctor_names_vendor_driver_features_and_the_kernel(device: hal.Device) -> None:
    adapter = discovery.find().adapters[device.id]
    done = subprocess.run(
        [sys.executable, "-m", "hal_core", "doctor", "--json"], capture_output=True, text=True, timeout=120, check=True
    )
    shown = next(d for b in json.loads(done.stdout)["backends"] for d in b.get("devices", []) if d["id"] == device.id)
    assert {f"vendor {adapter.vendor}", *adapter.features} <= set(shown["features"])
    assert any(feature.startswith("kernel: ") for feature in shown["features"])
    assert shown["driver"] == adapter.driver

"""Devices, the hardware layer, batch sizes, and one memory manager over all devices."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hal_nn import HardwareAbstractionLayer, UnifiedMemoryManager, detect_available_devices  # noqa: E402
from hal_nn.hardware import batch_size, estimate_memory, optimal_batch_size  # noqa: E402
from hal_nn.hardware.simulated_memory import loss_of  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core import ContractError, DeviceUnavailableError, MemoryLimitError  # noqa: E402


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))


def test_devices_are_those_of_torch() -> None:
    devices = detect_available_devices()
    assert devices["cpu"] == [torch.device("cpu")]
    assert len(devices["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_list_of_devices_with_none_present_is_refused() -> None:
    with pytest.raises(DeviceUnavailableError, match=r"none of cuda:7 is present: use one of .*cpu"):
        HardwareAbstractionLayer([torch.device("cuda", 7)])
    with pytest.raises(ContractError, match="target_devices is empty"):
        HardwareAbstractionLayer([])
    assert HardwareAbstractionLayer(["cuda:7", "cpu"]).device == torch.device("cpu")


def test_a_models_attention_runs_on_hal_afterwards() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    language = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12).view(1, -1)
    want = language(ids).logits
    layer = HardwareAbstractionLayer(["cpu"])
    got = layer.optimize_for_hardware(language)
    assert got.hal_report["attention"] == "hal"
    assert got.hal_report["device"] == "cpu"
    assert "cpu:0" in got.hal_report["hal_devices"]
    with hal.use("cpu:0"), hal.meter() as meter:
        assert float((got(ids).logits - want).detach().abs().max()) < 1e-5
    assert meter.records["cpu:0"].calls == 1
    plain = layer.optimize_for_hardware(model(), dtype=torch.bfloat16)
    assert plain.hal_report["attention"].startswith("torch: not a Hugging Face model")
    assert plain[0].weight.dtype == torch.bfloat16


def test_the_batch_size_is_the_largest_that_fits_and_was_run() -> None:
    layer, net = HardwareAbstractionLayer(["cpu"]), model()
    sample = torch.randn(1, 16, 64)
    space = int(float(layer.estimate_memory_usage(net, 24, sample=sample)) / 0.9) + 1024
    size = layer.get_optimal_batch_size(net, sample=sample, available=space)
    assert size == 24
    assert [(number, why) for number, _, why in size.probes] == [(24, "")]
    assert float(size.estimate) <= 0.9 * space < float(estimate_memory(net, 25, sample=sample))
    assert all(p.grad is None for p in net.parameters())


def test_a_size_that_fails_is_given_up_with_its_reason_and_freed() -> None:
    kept: list[Any] = []

    def probe(size: int) -> int:
        batch = torch.zeros(size, 1024)
        kept.append(weakref.ref(batch))
        if size > 10:
            raise RuntimeError(f"DefaultCPUAllocator: not enough memory: {batch.nbytes} bytes")
        return 1

    size = optimal_batch_size(model(), sample=torch.randn(1, 16, 64), available=1 << 24, most=32, probe=probe)
    gc.collect()
    assert [number for number, _, _ in size.probes] == [32, 16, 8]
    assert size == 8
    assert "not enough memory" in size.probes[0][2]
    assert all(each() is None for each in kept)


def test_a_measured_peak_above_the_limit_is_predicted_anew() -> None:
    net, sample = model(), torch.randn(1, 16, 64)
    limit = 0.9 * (1 << 24) - estimate_memory(net, 1, sample=sample).weights * 3
    size = optimal_batch_size(net, sample=sample, available=1 << 24, most=40, probe=lambda n: int(n * limit / 30))
    assert [number for number, _, _ in size.probes] in ([40, 30], [40, 29])
    assert "left" in size.probes[0][2]


def test_the_global_batch_is_kept_by_accumulation() -> None:
    size = optimal_batch_size(
        model(), sample=torch.randn(1, 16, 64), available=1 << 23, global_batch=48, most=20, probe=False
    )
    assert size == 16
    assert size.accumulation == 3
    assert size * size.accumulation == 48


def test_a_model_that_does_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(ContractError, match=r"one entry takes .* GB and .* GB may be used: use shorter sequences"):
        optimal_batch_size(model(), sample=torch.randn(1, 16, 64), available=1 << 16)
    with pytest.raises(ValueError, match="other"):
        optimal_batch_size(model(), sample=torch.randn(1, 16, 64), available=1 << 24, probe=_fails)


def _fails(size: int) -> int:
    raise ValueError("another error is not taken for memory")


class Slow(torch.nn.Module):
    """A layer whose step takes a millisecond for each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.ran: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, FakeTensor):
            self.ran.append(len(x))
            time.sleep(1e-3 * len(x))
        return self.linear(x)


def test_running_a_size_ends_in_the_time_that_is_given() -> None:
    net = Slow()
    size = optimal_batch_size(net, sample=torch.randn(1, 4), seconds=0.5)
    assert size.limited_by == f"time: running more than {int(size)} entries would exceed 0.5 s (pass seconds=)"
    assert net.ran[-1] == size  # the size itself was run
    assert sum(net.ran) <= 500
    free = optimal_batch_size(Slow(), sample=torch.randn(1, 4), seconds=None, most=600)
    assert (free, free.limited_by) == (600, "most: 600 entries")


def test_half_of_what_the_cpu_has_left_is_planned_with_and_the_answer_says_what_bounds_it(monkeypatch) -> None:
    monkeypatch.setattr(batch_size, "available_memory", lambda device: 1 << 15)
    net, sample = torch.nn.Linear(16, 16), torch.randn(1, 16)
    half = optimal_batch_size(net, sample=sample, probe=False)
    whole = optimal_batch_size(net, sample=sample, probe=False, memory_share=1.0)
    assert (half.available, whole.available) == ((1 << 14) + 17 * 64, (1 << 15) + 17 * 64)
    assert 4 < half < whole
    assert half.limited_by == "memory: a step may take 0.00 GB"
    divided = optimal_batch_size(net, sample=sample, probe=False, global_batch=4)
    assert (divided, divided.limited_by) == (4, "global_batch: 4 entries")


@pytest.mark.parametrize(
    ("given", "said"),
    [({"seconds": 0}, "seconds 0 was given"), ({"memory_share": 1.5}, r"memory_share 1\.5 was given")],
)
def test_bounds_of_a_batch_size_that_cannot_be_are_refused(given, said) -> None:
    with pytest.raises(ContractError, match=said):
        optimal_batch_size(model(), sample=torch.randn(1, 16, 64), **given)


def test_a_step_differentiates_a_hugging_face_output_without_a_loss() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.CausalLMOutputWithPast(logits=torch.full((2, 3), 2.0))
    assert float(loss_of(output)) == 2.0
    with pytest.raises(ContractError, match="gave Tensor without a floating tensor"):
        loss_of(torch.arange(3))


def test_one_limit_over_all_devices() -> None:
    manager = UnifiedMemoryManager(max_memory_gb=1 / 1024, pool_size_mb=0)
    first = manager.allocate((128, 1024), torch.float32, torch.device("cpu"))
    assert first.shape == (128, 1024)
    second = manager.allocate((64, 1024), "float32", "cpu:0")
    with pytest.raises(MemoryLimitError, match="UnifiedMemoryManager over all devices"):
        manager.allocate((128, 1024), torch.float32)
    manager.deallocate(second)
    del second
    third = manager.allocate((120, 1024))
    stats = manager.get_memory_stats()
    assert stats["in_use"] == stats["devices"]["cpu:0"]["in_use"] <= stats["limit"] == 1 << 20
    assert stats["peak"] >= stats["in_use"]
    manager.set_memory_limit(1)
    fourth = manager.allocate((1024, 1024))
    for tensor in (first, third, fourth):
        manager.deallocate(tensor)
    assert manager.get_memory_stats()["in_use"] == 0


def test_the_limit_is_over_devices_together() -> None:
    devices = [device.id for device in hal.devices() if device.id.split(":")[0] in ("cpu", "kpu", "photonic")]
    manager = UnifiedMemoryManager(max_memory_gb=len(devices) / 1024, pool_size_mb=0)
    kept = [manager.allocate((256, 1024), device=device).fill_(place) for place, device in enumerate(devices)]
    for device in devices:
        with pytest.raises(MemoryLimitError, match=f"{device}.*UnifiedMemoryManager over all devices"):
            manager.allocate((1,), device=device)
    stats = manager.get_memory_stats()
    assert stats["in_use"] == stats["limit"] == len(devices) << 20
    assert {name: entry["in_use"] for name, entry in stats["devices"].items()} == dict.fromkeys(devices, 1 << 20)
    assert all(bool((tensor == place).all()) for place, tensor in enumerate(kept))
    manager.deallocate(kept.pop())  # room on one device is room on another
    assert manager.allocate((256, 1024), device=devices[0]).shape == (256, 1024)


def test_a_dropped_tensor_is_given_back_but_not_its_memory_under_another() -> None:
    manager = UnifiedMemoryManager(max_memory_gb=1 / 1024, pool_size_mb=1)
    sharing = manager.allocate((256, 1024)).fill_(7).detach()  # a view would hold the tensor itself
    again = manager.allocate((256, 1024)).zero_()
    assert manager.get_memory_stats()["in_use"] == 1 << 20
    assert bool((sharing == 7).all())
    del again
    assert manager.get_memory_stats()["in_use"] == 0


def test_a_temporary_tensor_is_given_back_also_after_an_error() -> None:
    manager = UnifiedMemoryManager()
    kept = []
    with pytest.raises(KeyError), manager.temporary_allocation((4, 4), torch.bfloat16) as tensor:  # noqa: PT012
        kept.append(tensor.dtype)
        raise KeyError
    assert kept == [torch.bfloat16]
    assert manager.get_memory_stats()["in_use"] == 0
    with pytest.raises(ContractError, match="not from this manager"):
        manager.deallocate(tensor)


def test_freed_memory_is_reused_and_pools_can_be_emptied() -> None:
    manager = UnifiedMemoryManager(pool_size_mb=64)
    hal.memory("cpu:0").trim()
    before = hal.memory("cpu:0").stats().reuses
    for _ in range(3):
        with manager.temporary_allocation((512, 512)) as tensor:
            tensor.zero_()
        del tensor
    assert hal.memory("cpu:0").stats().reuses > before
    assert manager.clear_pools() > 0
    assert hal.memory("cpu:0").stats().pooled == 0


@pytest.mark.parametrize("arguments", [{"max_memory_gb": 0}, {"gc_threshold": 0}, {"pool_size_mb": -1}])
def test_bad_limits_are_refused(arguments: Any) -> None:
    with pytest.raises(ContractError, match="was given: use"):
        UnifiedMemoryManager(**arguments)


def test_a_tensor_as_an_argument_is_named_by_its_shape() -> None:
    manager, many = UnifiedMemoryManager(), torch.zeros(1000000)
    for call in (manager.allocate, lambda given: manager.allocate((1,), given), manager.set_memory_limit):
        with pytest.raises(ContractError, match=r"a tensor \[1000000\] "):
            call(many)

"""The router of programs that choose a device by themselves: records of workloads and of what they took."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any, NamedTuple

import hal_core as hal
from hal_core import AttentionRequest, ContractError, Device, Fidelity

from .choice import Arm, Chooser
from .estimator import Estimator
from .keys import Keys


class WorkloadCharacteristics(NamedTuple):
    """What is to be computed.

    Attributes:
        batch_size, seq_length, embed_dim, num_heads: of self-attention on [batch, length, embed_dim].
        dtype: of its tensors. causal: top-left. key_length: where it is not `seq_length`.
    """

    batch_size: int
    seq_length: int
    embed_dim: int
    num_heads: int
    dtype: str = "float32"
    causal: bool = False
    key_length: int | None = None

    def request(self) -> AttentionRequest:
        """As the core describes it. Raises ContractError for sizes that describe no attention."""
        sizes = (self.batch_size, self.seq_length, self.embed_dim, self.num_heads, self.key_length or 1)
        if any(type(size) is not int or size <= 0 for size in sizes) or self.embed_dim % self.num_heads:
            raise ContractError(f"{self} was given: pass sizes of 1 or more, embed_dim a multiple of num_heads")
        dim, heads = self.embed_dim // self.num_heads, self.num_heads
        return AttentionRequest(
            self.batch_size,
            heads,
            heads,
            self.seq_length,
            self.key_length or self.seq_length,
            dim,
            dim,
            self.dtype,
            causal=hal.Causal.TOP_LEFT if self.causal else hal.Causal.NONE,
        )


class PerformanceMetrics(NamedTuple):
    """What a workload took.

    Attributes:
        latency_ms: of the call. energy_mj: where the device states it. error: that a caller found; None for none.
        failed: the device raised instead of answering.
    """

    latency_ms: float
    energy_mj: float | None = None
    error: float | None = None
    failed: bool = False


class AdaptiveRouter:
    """Chooses a device for a workload, and learns from what calls took. Independent of `enable`.

    Candidates are the devices of hal that can run the workload, by their own estimates at first. Exploration is bounded
    as the policy's is: small workloads only, and a share of the time served.

    Args:
        history_size: metrics kept for `get_stats`.
        learning_rate: accepted and kept for programs that pass it. It changes nothing: a belief weighs calls by their
            number, and remembers the newest 40.
        exploration_rate: share of the time served that exploring may cost; 0 for none.
        min_samples_for_prediction: calls of a device of which `get_stats` says that its times are predicted.
        devices: ids to choose among; None: every device that is hardware.

    Raises:
        ContractError: a rate outside 0 to 1, or a size below 1.
    """

    def __init__(
        self,
        history_size: int = 1000,
        learning_rate: float = 0.01,
        exploration_rate: float = 0.1,
        min_samples_for_prediction: int = 50,
        *,
        devices: list[str] | None = None,
    ) -> None:
        if type(history_size) is not int or history_size < 1 or not 0 <= exploration_rate <= 1:
            raise ContractError(
                f"history_size {history_size!r} and exploration_rate {exploration_rate!r} were given: pass 1 or more, "
                "and a rate of 0 to 1"
            )
        if not 0 <= learning_rate <= 1 or min_samples_for_prediction < 1:
            raise ContractError(
                f"learning_rate {learning_rate!r} and min_samples_for_prediction {min_samples_for_prediction!r} were "
                "given: pass a rate of 0 to 1, and 1 or more"
            )
        self.learning_rate, self.exploration_rate = learning_rate, exploration_rate
        self.min_samples_for_prediction = min_samples_for_prediction
        self._chooser, self._lock = Chooser(Estimator(), share=exploration_rate), threading.Lock()
        self._devices = devices
        self._history: deque[tuple[str, WorkloadCharacteristics, PerformanceMetrics]] = deque(maxlen=history_size)
        self._failures: dict[str, int] = {}
        self._chosen: dict[str, int] = {}

    def select_device(self, workload: WorkloadCharacteristics) -> str:
        """The id of the device to use.

        Raises:
            UnsupportedError: no candidate can run it. ContractError: see `WorkloadCharacteristics.request`.
        """
        request = workload.request()
        arms = self._arms(request)
        if not arms:
            raise hal.UnsupportedError(
                f"no device can run {request.describe()}: `hal explain` shows why. Nothing was run."
            )
        with self._lock:
            well = [arm for arm in arms if not self._failures.get(arm.device)] or arms
            found = self._chooser.choose(Keys.of(request), well, may_explore=self.exploration_rate > 0)
            device = found.chosen.arm.device
            self._chosen[device] = self._chosen.get(device, 0) + 1
            return device

    def update_performance(self, device: str, workload: WorkloadCharacteristics, metrics: PerformanceMetrics) -> None:
        """Learn what a workload took on a device. A failure passes the device over until it succeeds again.

        Raises:
            ContractError: a latency that is no number above 0. UnknownBackendError: no such device.
        """
        if not metrics.failed and not 0 < metrics.latency_ms < math.inf:
            raise ContractError(f"latency_ms {metrics.latency_ms!r} was given: pass milliseconds above 0")
        request = workload.request()
        arms = self._arms(request)
        arm = next((each for each in arms if each.device == device), None) or self._arm(hal.device(device), request)
        with self._lock:
            self._history.append((device, workload, metrics))
            if metrics.failed:
                self._failures[device] = self._failures.get(device, 0) + 1
                return
            self._failures.pop(device, None)
            keys = Keys.of(request)
            best = self._chooser.rank(keys, arms or [arm])[0].log_seconds
            own = self._chooser.rank(keys, [arm])[0].log_seconds
            self._chooser.observe(keys, arm, best, math.log(metrics.latency_ms / 1e3), own > best + 0.03)

    def get_stats(self) -> dict[str, Any]:
        """Calls, mean latency, learned factor on the estimate, load and failures by device; choices; exploration."""
        with self._lock:
            devices: dict[str, Any] = {}
            for device, _, metrics in self._history:
                row = devices.setdefault(device, {"samples": 0, "failures": 0, "total_ms": 0.0})
                row["failures" if metrics.failed else "samples"] += 1
                row["total_ms"] += 0.0 if metrics.failed else metrics.latency_ms
            for device, row in devices.items():
                line = self._chooser.estimator.arms.get(device)
                total = row.pop("total_ms")
                row["mean_latency_ms"] = total / row["samples"] if row["samples"] else None
                row["factor"] = 1.0 if line is None else math.exp(line.ratio)
                row["load"] = math.exp(self._chooser.estimator.load(device).value)
                row["predicted"] = row["samples"] >= self.min_samples_for_prediction
            return {
                "devices": devices,
                "chosen": dict(self._chosen),
                "total": len(self._history),
                "explored": self._chooser.explored,
                "exploration_seconds": self._chooser.spent,
            }

    def _arms(self, request: AttentionRequest) -> list[Arm]:
        every = hal.devices() if self._devices is None else [hal.device(name) for name in self._devices]
        taken = [d for d in every if self._devices is not None or d.fidelity is Fidelity.HARDWARE]
        return [self._arm(device, request) for device in taken if not hal.check_all(request, device)]

    @staticmethod
    def _arm(device: Device, request: AttentionRequest) -> Arm:
        from hal_core.plugin_api import registry

        time = registry.backend_of(device).estimate(request, device).time
        return Arm(device.id, device.id, math.sqrt(time.low * time.high) or time.middle)

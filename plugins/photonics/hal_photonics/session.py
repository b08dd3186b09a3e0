"""An open photonic device: its state, its calibration, and attention and kernels on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    DenseTiling,
    Device,
    DeviceUnavailableError,
    Grads,
    PooledMemory,
    SequenceTables,
    UnsupportedError,
)

from .calibrate import CalibrationReport, calibrate, probe_snr
from .kernels.attention import attend, exact_product
from .kernels.extra import KERNELS, Product
from .profiles.profile import Profile
from .runtime.driver import Driver
from .simulator.chip import SimulatedDriver
from .simulator.core import PhotonicCore, check_finite, drawn, generator
from .simulator.thermal import Health, Signal, State, Supervisor, triggers
from .tiling import narrowed

_PILOT_SEED, _PILOT_ROWS = 0x9107, 256
_UPKEEP_STEP = 1.0  # s of simulated time between two looks at the sensors


class Prepared(NamedTuple):
    """Operands bound to a request. The simulation has nothing to program ahead: weights are loaded when they are
    used.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    tile_size: int | None


class PhotonicSession:
    """An open chip. `compute_attention` may be called from any thread; its noise comes from `rng` alone.

    Time passes only through the driver (a simulated one: `driver.advance`). Call `maintain` between calls to let the
    session look at the sensors, and calibrate where a trigger asks for it.

    Attributes:
        core: the products. driver: the chip. report: of the last calibration. state, reason: of the supervisor.
        recalibrations: reasons of each calibration since opening, the first one included.
    """

    def __init__(
        self,
        device: Device,
        driver: Driver,
        *,
        straight_through: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self.driver, self.profile = device, driver, driver.profile
        self.memory, self.tiling = PooledMemory("cpu", name=device.id), DenseTiling()
        self.supervisor = Supervisor(self.profile)
        self.core = PhotonicCore(driver)
        self.report: CalibrationReport | None = None
        self.recalibrations: list[str] = []
        self._straight_through, self._changed = straight_through, changed
        self._pilot = 0.0
        self._lock = threading.RLock()
        self.power_on()

    # State

    @property
    def state(self) -> State:
        return self.supervisor.state

    @property
    def reason(self) -> str:
        return self.supervisor.reason

    def power_on(self) -> State:
        """Switch on, warm up, calibrate."""
        with self._lock:
            self.driver.laser(True)
            self.supervisor.signal(Signal.POWER_ON, "switched on")
            return self._settle("switched on")

    def reset(self) -> State:
        """Acknowledge a trip: cool down, then calibrate."""
        with self._lock:
            self.supervisor.signal(Signal.RESET, "the trip was acknowledged")
            return self._settle("after a trip")

    def maintain(self) -> State:
        """Look at the sensors, follow the state, calibrate where a trigger asks for it. Returns the state."""
        with self._lock:
            before = self.state
            state = self._observe()
            if state.serves and (reasons := self.needs()):
                self.supervisor.signal(Signal.RECALIBRATE, "; ".join(reasons))
                state = self._calibrate("; ".join(reasons))
            elif not state.serves:
                state = self._settle(str(before))
            if state is not before:
                self._changed()
            return state

    def needs(self) -> list[str]:
        """Reasons to calibrate again now."""
        return triggers(self.profile, self.health())

    def health(self) -> Health:
        """What the triggers look at; the pilot is measured anew, with noise of its own."""
        sensed, report = self.driver.telemetry(), self.report
        assert report is not None
        pilot = probe_snr(self.core, _PILOT_SEED, torch.Generator().manual_seed(_PILOT_SEED), _PILOT_ROWS)
        return Health(
            age=sensed.clock - report.clock,
            temperature_change=sensed.temperature - report.temperature,
            pilot_drop=self._pilot - pilot,
            clip_rate=self.core.clip_rate,
            laser=sensed.laser / max(report.laser, 1e-9),
        )

    def _observe(self) -> State:
        before, state = self.state, self.supervisor.observe(self.driver.telemetry())
        if state is State.TRIP and before is not State.TRIP:
            self.driver.laser(False)
        return state

    def _settle(self, why: str) -> State:
        """Follow the states until one that stays. A simulated chip warms up and cools down meanwhile."""
        for _ in range(10_000):
            state = self._observe()
            if state is State.CALIBRATING:
                self.driver.laser(True)
                return self._calibrate(why)
            if state not in (State.WARMUP, State.COOLDOWN) or not isinstance(self.driver, SimulatedDriver):
                break
            self.driver.advance(_UPKEEP_STEP, load=1.0 if state is State.WARMUP else 0.0)
        self._changed()
        return self.state

    def _calibrate(self, why: str) -> State:
        corrections, report = calibrate(self.driver, seed=self.profile.chip)
        self.report = report
        self.recalibrations = [*self.recalibrations[-63:], why]
        if refusal := report.refusal(self.profile):
            self.supervisor.signal(Signal.CALIBRATION_FAILED, refusal)
            self._changed()
            return self.state
        self.core = PhotonicCore(self.driver, corrections if self.profile.calibrated else None)
        pilot_noise = torch.Generator().manual_seed(_PILOT_SEED)
        self._pilot = probe_snr(self.core, _PILOT_SEED, pilot_noise, _PILOT_ROWS)
        self.core.reset_counts()
        self.supervisor.signal(Signal.CALIBRATED, f"calibrated ({why})")
        self._observe()
        self._changed()
        return self.state

    def unavailable(self) -> str:
        """Why it does not serve now, and what leads out of it; "" where it serves."""
        if self.state.serves:
            return ""
        return f"it is in state {self.state} ({self.reason}): {self.supervisor.way_out}"

    def require_service(self) -> None:
        """Raise DeviceUnavailableError unless the chip serves."""
        if why := self.unavailable():
            raise DeviceUnavailableError(f"{self.device.id} does not serve, {why}")

    # Attention

    def autograd(self, request: AttentionRequest) -> Literal["native", "explicit", "none"]:
        """native with the straight-through estimator, none without."""
        return "native" if self._straight_through else "none"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """The array's own tile: keys or outputs by inputs."""
        return {"block_k": self.profile.count("array.outputs"), "inputs": self.profile.count("array.inputs")}

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: BlockPlan | None = None,
        tables: SequenceTables | None = None,
    ) -> Prepared:
        return Prepared(query, key, value, request, tile_size)

    def compute_attention(
        self,
        prepared: Prepared,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention on the chip.

        Args:
            rng: (seed, offset) of the readout noise; None draws a pair from torch's default generator.

        Raises:
            DeviceUnavailableError: the chip does not serve: its state, and what leads out of it.
            ContractError: a NaN or an infinity in query, key or value, with its position.
        """
        self.require_service()
        given, key, value, request, tile_size = prepared
        query = given if query is None else query
        check_finite(query=query, key=key, value=value)
        noise, core = generator(drawn(rng)), self.core
        inputs = core.converters.inputs

        def product(x: Tensor, w: Tensor, window: Any) -> Tensor:
            tiles = list(core.converters.tiles(x.shape[-1], narrowed(window, inputs)))
            return core.product(x, w, noise, tiles=tiles)

        with torch.no_grad():
            result = attend(product, query, key, value, mask, request, tile_size)
        if self._straight_through and request.grads:
            result = _straight_through(result, query, key, value, mask, request)
        return result if out is None else AttentionOutput(out.copy_(result.out), result.lse)

    def compute_attention_backward(
        self,
        prepared: Prepared,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        raise UnsupportedError(
            f"{self.device.id} has no backward of its own: register it with straight_through=True for gradients of exact "
            "attention at the chip's output"
        )

    # Kernels

    def kernel(self, name: str) -> Product:
        """A callable of `hal_photonics.kernels.extra`."""
        if name not in KERNELS:
            raise UnsupportedError(f"{self.device.id} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        return KERNELS[name](self)

    def close(self) -> None:
        self.memory.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _straight_through(
    result: AttentionOutput, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, request: AttentionRequest
) -> AttentionOutput:
    """The chip's values with the gradients of exact attention (Bengio et al. 2013)."""
    exact: Any = attend(exact_product, query, key, value, mask, request)
    out = _valued(result.out, exact.out)
    return AttentionOutput(out, None if result.lse is None else _valued(result.lse, exact.lse))


class _Valued(torch.autograd.Function):
    """The first operand's value with the second one's gradient; a difference would give NaN for -inf."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, differentiable: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]


def _valued(values: Tensor, differentiable: Tensor) -> Tensor:
    result: Tensor = _Valued.apply(values, differentiable)  # type: ignore[no-untyped-call]
    return result


def open_simulated(
    device: Device, profile: Profile, *, straight_through: bool, changed: Callable[[], None]
) -> PhotonicSession:
    """A session on a fresh simulated chip."""
    return PhotonicSession(device, SimulatedDriver(profile), straight_through=straight_through, changed=changed)

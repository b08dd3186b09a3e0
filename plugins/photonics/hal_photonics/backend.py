"""Photonic devices from profiles: one backend class for every vendor, and the generic `photonic` one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

import hal_core as hal
from hal_core.plugin_api import (
    AttentionRequest,
    Basis,
    Calibration,
    Capabilities,
    Causal,
    Code,
    Device,
    Estimate,
    Fidelity,
    MaskKind,
    Numerics,
    Quantity,
    Range,
    Refusal,
    cache_dir,
    load_calibration,
    registry,
)

from .cost import attention_cost
from .discovery import BUNDLED as BUNDLED
from .discovery import cards, profiles
from .profiles.profile import Profile, load, word

_FEATURES = frozenset({"grouped_heads", "value_dim", "strides", "diagonal", "window", "softcap", "lse"})
_GRADIENTS = frozenset({"backward", "mask_grad", "lse_grad"})


class ProfileBackend:
    """Devices `<name>:0`, `<name>:1` ... simulated from profiles.

    Args:
        name: the first part of the device ids. profiles: in the order of the ids.
        straight_through: claim gradients, those of exact attention at the chip's output. Without it they are refused.
    """

    def __init__(self, name: str, profiles: Sequence[Profile], *, straight_through: bool = False) -> None:
        self.name, self.profiles, self.straight_through = name, tuple(profiles), straight_through
        self._stored: dict[tuple[str, str], Calibration | None] = {}

    def devices(self) -> Sequence[Device]:
        return [self._device(index, profile) for index, profile in enumerate(self.profiles)]

    def _device(self, index: int, profile: Profile) -> Device:
        return Device(
            id=f"{self.name}:{index}",
            family="photonic",
            vendor=profile.vendor,
            model=profile.name,
            fidelity=Fidelity.SIMULATED,
            driver=f"simulated from profile {profile.digest}",
            features=(f"{profile.mechanism}", *self._remarks(profile)),
        )

    def _remarks(self, profile: Profile) -> tuple[str, ...]:
        worst = word(profile.provenance("array", "converters", "noise", "time", "power"))
        return (f"figures at worst {worst}", *(() if profile.calibrated else ("not calibrated by us",)))

    def profile_of(self, device: Device) -> Profile:
        return self.profiles[int(device.id.partition(":")[2])]

    def capabilities(self, device: Device) -> Capabilities:
        p = self.profile_of(device)
        numerics = Numerics(
            relative=p["declared.attention_error"],
            lse=p["declared.lse_error"],
            noisy=True,
            gradient=0.02 if self.straight_through else None,
        )
        dtypes = ("float32", "bfloat16", "float16")
        return Capabilities(
            dtypes=frozenset(dtypes),
            numerics=dict.fromkeys(dtypes, numerics),
            head_dim=Range(1, 1024),
            masks=frozenset(MaskKind),
            causal=frozenset(Causal),
            features=_FEATURES | (_GRADIENTS if self.straight_through else frozenset()),
        )

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """A refusal while the open chip does not serve: its state, and what leads out of it."""
        session: Any = registry.opened(device.id)
        if session is not None and not session.state.serves:
            yield Refusal(
                Code.DEVICE, "state", "ready", f"{session.state} ({session.reason})", session.supervisor.way_out
            )

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        session: Any = registry.opened(device.id)
        duty, state = (1.0, "") if session is None else (session.supervisor.duty, str(session.state))
        cost = attention_cost(self.profile_of(device), request, duty=duty, state="" if state == "ready" else state)
        return attrs.evolve(cost.estimate(memory=_memory(request)), error=self._error(device))

    def _error(self, device: Device) -> Quantity | None:
        """Between one product's error by the stored calibration and the declared noise; None without a calibration."""
        place = (device.id, str(cache_dir()))
        if place not in self._stored:
            self._stored[place] = load_calibration(device)
        stored, declared = self._stored[place], self.profile_of(device)["declared.attention_error"]
        if stored is None:
            return None
        measured = 10 ** (
            -stored.values["SNR after, dB" if self.profile_of(device).calibrated else "SNR before, dB"] / 20
        )
        origin = self.profile_of(device).provenance("noise")
        return Quantity(
            min(measured, declared), declared, Basis.MODELLED, origin, f"hal calibrate {device.id}, simulated"
        )

    def open(self, device: Device) -> Any:
        from .session import open_simulated

        return open_simulated(
            device, self.profile_of(device), straight_through=self.straight_through, changed=_refresher(device.id)
        )

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Signal-to-noise and bits before and after, on weights that the fit has not seen."""
        from .calibrate import calibrate
        from .simulator.chip import SimulatedDriver

        self._stored.clear()
        session: Any = registry.opened(device.id)
        driver = SimulatedDriver(self.profile_of(device)) if session is None else session.driver
        return {"profile": self.profile_of(device).name, **calibrate(driver, progress=progress)[1].to_dict()}

    def kernel_names(self, device: Device) -> frozenset[str]:
        return frozenset({"matmul", "linear"})


def _memory(request: AttentionRequest) -> int:
    """Bytes of the output, and of the scores, weights and noise worked on at once, in float32."""
    r = request
    output = r.batch * r.heads_q * r.len_q * (r.dim_v + 1) * 4
    scores = min(r.batch * r.heads_q * r.len_q * r.len_k, 1 << 21)
    return output + 5 * 4 * scores + 4 * r.batch * r.heads_kv * r.len_k * (r.dim_qk + r.dim_v)


def _refresher(device_id: str) -> Callable[[], None]:
    """Forget decisions when a chip changes its state; a session outside the registry has none."""

    def changed() -> None:
        if registry.opened(device_id) is not None:
            registry.refresh(device_id)

    return changed


class PhotonicBackend(ProfileBackend):
    """The generic device: simulated from profile files, and told of cards whose PCI ids the user configured."""

    def __init__(self) -> None:
        super().__init__("photonic", profiles())

    def _remarks(self, profile: Profile) -> tuple[str, ...]:
        return (*super()._remarks(profile), *(card.remark for card in cards()))


def register_profile(path: str | Path, name: str, *, straight_through: bool = False) -> Device:
    """Make a profile file a device, `<name>:0`, in this process.

    Raises:
        ProfileError: what is wrong with the file. PluginError: the name is taken.
    """
    backend = ProfileBackend(name, [load(path)], straight_through=straight_through)
    hal.register(backend)
    return backend.devices()[0]

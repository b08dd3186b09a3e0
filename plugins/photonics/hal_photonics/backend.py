"""Photonic devices from profiles: one backend class for every vendor, and the generic `photonic` one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import attrs
from hal_simulation import Variation, variations

from hal_core.plugin_api import (
    AttentionRequest,
    Basis,
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
    Session,
    load_calibration,
    refresh,
    register,
)

from .cost import attention_cost, call_memory, passes_of
from .discovery import BUNDLED as BUNDLED, bundled, bundled_names, cards, profiles
from .profiles.figures import MOST_PASSES
from .profiles.profile import Profile, load, word

if TYPE_CHECKING:
    from .session import PhotonicSession

#: Passes of the optics that may be averaged.
PASSES = Range(1, MOST_PASSES)
_MOST_DECIBELS = 200
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
        self._sessions: WeakValueDictionary[str, PhotonicSession] = WeakValueDictionary()

    def devices(self) -> Sequence[Device]:
        """One simulated device for each profile."""
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
        """The profile that a device is simulated from."""
        return self.profiles[int(device.id.partition(":")[2])]

    def capabilities(self, device: Device) -> Capabilities:
        """What the profile declares. The device option "passes" averages passes of the optics."""
        p = self.profile_of(device)
        numerics = Numerics(
            relative=p["declared.attention_error"],
            lse=p["declared.lse_error"],
            noisy=True,
            gradient=0.02 if self.straight_through else None,
        )
        dtypes = frozenset({"float32", "bfloat16", "float16"})
        return Capabilities(
            dtypes=dtypes,
            numerics=dict.fromkeys(dtypes, numerics),
            head_dim=Range(1, 1024),
            masks=frozenset(MaskKind),
            causal=frozenset(Causal),
            features=_FEATURES | (_GRADIENTS if self.straight_through else frozenset()),
            tile_sizes=Range(0, p.tile_inputs),
            options={"passes": PASSES},
        )

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """A refusal while the open chip does not serve: its state, and what leads out of it."""
        session = self._opened(device)
        if session is not None and not session.state.serves:
            state = f"{session.state} ({session.reason})"
            yield Refusal(Code.DEVICE, "state", "ready", state, session.supervisor.way_out)

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """Modelled time and energy in the chip's present state, and the memory of the host's simulation."""
        session, profile = self._opened(device), self.profile_of(device)
        duty, state = (1.0, "") if session is None else session.condition
        cost = attention_cost(profile, request, duty=duty, state=state)
        memory = call_memory(profile, request)
        return attrs.evolve(cost.estimate(memory=memory), error=self._error(device, passes_of(request)))

    def _error(self, device: Device, passes: int) -> Quantity | None:
        """Between one product's error by the stored calibration and the declared noise; None without a calibration.

        Averaging passes reduces the noise and leaves static errors, so it moves the lower end alone.
        """
        stored, profile = load_calibration(device), self.profile_of(device)
        declared = profile["declared.attention_error"]
        ratio = None if stored is None else stored.values.get(f"SNR {'after' if profile.calibrated else 'before'}, dB")
        if (
            not isinstance(ratio, int | float)
            or isinstance(ratio, bool)
            or not -_MOST_DECIBELS <= ratio <= _MOST_DECIBELS
        ):
            return None  # no calibration, or one that somebody has edited
        measured = 10 ** (-ratio / 20) / math.sqrt(passes)
        source = f"hal calibrate {device.id}, simulated"
        return Quantity(min(measured, declared), declared, Basis.MODELLED, profile.provenance("noise"), source)

    def open(self, device: Device) -> Session:
        """A session on a fresh simulated chip, switched on and calibrated."""
        from .session import open_simulated

        def changed() -> None:
            if self._opened(device) is not None:  # not while it opens: nothing has been decided about it
                refresh(device.id)

        session = open_simulated(
            device, self.profile_of(device), straight_through=self.straight_through, changed=changed
        )
        self._sessions[device.id] = session
        return session

    def _opened(self, device: Device) -> PhotonicSession | None:
        session = self._sessions.get(device.id)
        return None if session is None or session.closed else session

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Signal-to-noise and bits before and after, on weights that the fit has not seen."""
        from .calibrate import calibrate
        from .simulator.chip import SimulatedDriver

        session, profile = self._opened(device), self.profile_of(device)
        driver = SimulatedDriver(profile) if session is None else session.driver
        return {"profile": profile.name, **calibrate(driver, progress=progress)[1].to_dict()}

    def kernel_names(self, device: Device) -> frozenset[str]:
        """`matmul` and `linear`."""
        return frozenset({"matmul", "linear"})

    def nonconformance(self, device: Device) -> dict[str, str]:
        """What a chip without calibration does not do: follow a scale exactly, and show each change of a large value.

        Its columns read the profile's share of each product, twice in attention, so its scores are those of a smaller
        scale; and the offsets of a readout are in proportion to the largest value of a tile.
        """
        profile = self.profile_of(device)
        if profile.calibrated:
            return {}
        reason = (
            f"profile {profile.name} is a chip without calibration: its columns read {profile['noise.column_gain']:g} "
            "of each product and add offsets, so its attention is that of a smaller scale"
        )
        return dict.fromkeys(("structure", "stale_keys"), reason)

    def variations(self, device: Device, default: float | None = None) -> list[Variation]:
        """The figures of the device's profile with their uncertainties; see `hal_simulation.variations`."""
        return variations(self.profile_of(device), default)

    def varied(self, device: Device, name: str, **figures: float) -> ProfileBackend:
        """A backend of one device, `<name>:0`: the device with some figures changed.

        Args:
            figures: by "section__key", in the figure's unit.

        Raises:
            ProfileError: no such figure, or a value that is not possible.
        """
        changed = self.profile_of(device).replace(**figures)
        return ProfileBackend(name, [changed], straight_through=self.straight_through)

    def profile_names(self) -> Sequence[str]:
        """The profiles of its devices."""
        return [profile.name for profile in self.profiles]

    def at_profile(self, profile: str, name: str) -> ProfileBackend:
        """A backend of one device, `<name>:0`.

        Args:
            profile: one of `profile_names`, or the path of a profile file.

        Raises:
            ProfileError: what is wrong with the file.
        """
        own = next((one for one in self.profiles if one.name == profile), None)
        return ProfileBackend(name, [own or load(profile)], straight_through=self.straight_through)


class PhotonicBackend(ProfileBackend):
    """The generic devices: simulated from profile files; they report cards whose PCI ids the user configured."""

    def __init__(self) -> None:
        super().__init__("photonic", profiles())

    def _remarks(self, profile: Profile) -> tuple[str, ...]:
        return (*super()._remarks(profile), *(card.remark for card in cards()))

    def profile_names(self) -> Sequence[str]:
        """The profiles of its devices, and all that are bundled."""
        return list(dict.fromkeys([*super().profile_names(), *bundled_names()]))

    def at_profile(self, profile: str, name: str) -> ProfileBackend:
        """As of any photonic device; bundled profiles go by their name."""
        if profile in super().profile_names() or profile not in bundled_names():
            return super().at_profile(profile, name)
        return super().at_profile(str(BUNDLED / f"{profile}.toml"), name)


def register_profile(path: str | Path, name: str, *, straight_through: bool = False) -> Device:
    """Make a profile a device, `<name>:0`, in this process.

    Args:
        path: a profile file, or the name of a bundled profile ("lightening-8").
        straight_through: claim gradients, those of exact attention at the chip's output.

    Raises:
        ProfileError: what is wrong with the file. PluginError: the name is taken.
    """
    profile = bundled(str(path)) if path in bundled_names() else load(path)
    backend = ProfileBackend(name, [profile], straight_through=straight_through)
    register(backend)
    return backend.devices()[0]

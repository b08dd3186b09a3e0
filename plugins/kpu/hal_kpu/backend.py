"""The KPU as a device of hal_core: simulated from a profile, its time and energy modelled by the tile-level
simulator.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs
from hal_simulation import Variation, variations

from hal_core.plugin_api import (
    AttentionRequest,
    Capabilities,
    Causal,
    Code,
    Device,
    Estimate,
    Fidelity,
    MaskKind,
    Numerics,
    Range,
    Refusal,
)

from .cost import attention_cost, attention_memory
from .profiles.profile import Profile, ProfileError, load, names
from .runtime.settings import get_profile
from .tiling import Blocks, longest_head, room

if TYPE_CHECKING:
    from .session import KPUSession

_NUMERICS = {
    "float32": Numerics(relative=1e-5, lse=1e-5, gradient=1e-5),
    "bfloat16": Numerics(relative=6e-3, lse=1e-4, gradient=2e-2),
    "float16": Numerics(relative=1e-3, lse=1e-4, gradient=5e-3),
}
_FEATURES = frozenset(
    {
        "grouped_heads",
        "value_dim",
        "strides",
        "diagonal",
        "window",
        "softcap",
        "lse",
        "backward",
        "mask_grad",
        "lse_grad",
        "deterministic",
        "block_plan",
    }
)


#: What `hal.use("kpu:0", options={...})` may set: the simulator that gives time and energy ("cycle_accurate" also takes
#: values from the stepped PEs), and the clock of every engine in MHz, where it is not the profile's.
OPTIONS: dict[str, Range | tuple[str, ...]] = {
    "fidelity": ("transactional", "cycle_accurate"),
    "clock_mhz": Range(1, 100_000),
}


def host_memory() -> int | None:
    """Bytes of the host's memory, in which a simulated device's tensors lie; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


class KPUDevices:
    """kpu:0, simulated.

    Args:
        profile: of the machine; None for the process's (`hal_kpu.set_profile`, HAL_KPU_PROFILE), or T64.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self._profile = profile
        self._wrong = ""

    @property
    def profile(self) -> Profile:
        """The machine of kpu:0: of the process when it was first asked for.

        Raises:
            ProfileError: HAL_KPU_PROFILE names no profile, or one that cannot be used.
        """
        self._profile = self._profile or get_profile()
        return self._profile

    def devices(self) -> Sequence[Device]:
        """kpu:0; none where HAL_KPU_PROFILE names no machine, which `why_absent` then says."""
        try:
            p = self.profile
        except ProfileError as error:
            self._wrong = str(error)
            return []
        return [
            Device(
                id="kpu:0",
                family="kpu",
                vendor=p.vendor,
                model=p.name.upper(),
                fidelity=Fidelity.SIMULATED,
                driver=" ".join(["simulated from profile", p.name, *([] if p.name in names() else [p.digest])]),
                memory=host_memory(),
                features=(f"figures at worst {p.provenance()}", "energy not calibrated", "torch.compile kpu"),
            )
        ]

    def why_absent(self) -> str:
        """What is wrong with the profile: nothing else keeps a simulated device away."""
        return self._wrong

    def capabilities(self, device: Device) -> Capabilities:
        blocks = Range(min(min(self.profile.arrays(dtype)[:2]) for dtype in _NUMERICS))
        return Capabilities(
            dtypes=frozenset(_NUMERICS),
            numerics=_NUMERICS,
            masks=frozenset(MaskKind),
            causal=frozenset(Causal),
            features=_FEATURES,
            batch=Range(0),
            length=Range(0),
            head_dim=Range(1, max(longest_head(self.profile, dtype) for dtype in _NUMERICS)),
            tile_sizes=blocks,
            block_sizes=blocks,
            options=OPTIONS,
        )

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """A refusal where one array's operands do not fit the L3 beside it, which depends on dtype and both head
        sizes.
        """
        blocks = Blocks.of(self.profile, request.dtype)
        needed, held = room(blocks, request.dim_qk, request.dim_v), self.profile.count("buffers.l3")
        if needed > held:
            yield Refusal(
                Code.DEVICE,
                "L3",
                f"{needed:,} bytes beside one array",
                f"{held:,} bytes",
                f"use a head_dim of {longest_head(self.profile, request.dtype)} or less, or a narrower dtype",
            )

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """Modelled from the profile: the fused program's time in the simulator, energy from uncalibrated tables."""
        return attention_cost(self.profile, request).estimate(memory=attention_memory(self.profile, request))

    def open(self, device: Device) -> KPUSession:
        from .session import KPUSession

        return KPUSession(device, self.profile)

    def kernel_names(self, device: Device) -> frozenset[str]:
        """The kernels beside attention."""
        return frozenset({"matmul", "linear"})

    def variations(self, device: Device, default: float | None = None) -> list[Variation]:
        """The figures of the machine with their uncertainties; see `hal_simulation.variations`."""
        return variations(self.profile, default)

    def varied(self, device: Device, name: str, **figures: float) -> KPUDevices:
        """A backend of one device, `<name>:0`: the machine with some figures changed.

        Args:
            figures: by "section__key", in the figure's unit.

        Raises:
            ProfileError: no such figure, or a value that is not possible.
        """
        return _KPUBeside(self.profile.replace(**figures), name)

    def profile_names(self) -> Sequence[str]:
        """The bundled machines, whichever of them kpu:0 is."""
        return names()

    def at_profile(self, profile: str, name: str) -> KPUDevices:
        """A backend of another machine, `<name>:0`.

        Args:
            profile: a bundled name, or the path of a TOML file.

        Raises:
            ProfileError: no such profile, or the first thing that is wrong in it.
        """
        return _KPUBeside(load(profile), name)


class _KPUBeside(KPUDevices):
    """A machine beside that of kpu:0. torch.compile's backends and their meter are kpu:0's, so it has none."""

    def __init__(self, profile: Profile, name: str) -> None:
        super().__init__(profile)
        self._name = name

    def devices(self) -> Sequence[Device]:
        """`<name>:0`, simulated."""
        return [
            attrs.evolve(
                device,
                id=f"{self._name}:0",
                features=tuple(feature for feature in device.features if not feature.startswith("torch.compile")),
            )
            for device in super().devices()
        ]

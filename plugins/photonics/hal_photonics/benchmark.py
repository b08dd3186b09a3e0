"""Latency and energy of attention over lengths, against a GPU that is measured here or known from published figures."""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attrs

from hal_core.plugin_api import (
    AttentionRequest,
    Basis,
    ContractError,
    Fidelity,
    HalError,
    Provenance,
    Quantity,
    UnknownBackendError,
    attention,
    find_devices,
    listing,
    open_session,
    registry,
)

from .backend import ProfileBackend
from .cost import attention_cost
from .discovery import bundled, bundled_names
from .profiles.profile import Profile, load

_ORIGIN = "published"
_PICTURES = (".pdf", ".png", ".svg")


class PublishedGpu(NamedTuple):
    """A GPU by its published figures.

    Attributes:
        peak: FLOP/s of dense bfloat16 products. share: of the peak that attention reaches. power: W. start: s per call.
    """

    name: str
    peak: float
    share: float
    power: float
    start: float
    source: str


#: "published:<name>".
GPUS = {
    "h200": PublishedGpu(
        "NVIDIA H200",
        790e12,
        0.65,
        700,
        8e-6,
        "790 TFLOP/s sustained bf16 product, 65% of it in attention, 700 W board power, 8 us to start a call",
    ),
}


@attrs.frozen(kw_only=True)
class Point:
    """One length: seconds and joules of both sides. An energy is None where the device states none."""

    length: int
    photonic_time: Quantity
    photonic_energy: Quantity
    optics_time: float
    optics_energy: float
    other_time: Quantity
    other_energy: Quantity | None
    parts: dict[str, float]
    energy_parts: dict[str, float]


@attrs.frozen(kw_only=True)
class Sweep:
    """Points over lengths, with the names of both sides."""

    profile: Profile
    against: str
    shape: str
    points: tuple[Point, ...]

    def crossover(self, what: str) -> str:
        """One sentence: from which length the photonic side is better in "time" or "energy", or that there is none."""
        better = []
        for point in self.points:
            ours, other = getattr(point, f"photonic_{what}"), getattr(point, f"other_{what}")
            if other is None:
                return f"{what}: {self.against} states no energy, so there is nothing to compare."
            better.append(ours.middle < other.middle)
        lengths = [point.length for point in self.points]
        if all(better):
            return f"{what}: {self.profile.name} is better at every length from {lengths[0]:,} on."
        if not better[-1]:
            where = "at no length" if not any(better) else "not at the longest length"
            return f"{what}: no crossover up to {lengths[-1]:,}: {self.profile.name} is better {where}."
        first = next(i for i in range(len(better)) if all(better[i:]))
        return f"{what}: {self.profile.name} is better from a length of {lengths[first]:,} (of those looked at) on."


def sweep(
    profile: Profile,
    lengths: Sequence[int],
    against: str,
    *,
    batch: int = 1,
    heads: int = 32,
    head_dim: int = 128,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Sweep:
    """Model a profile, and measure or look up the other side.

    Args:
        against: "published:h200", or a device id, which is run and timed here.

    Raises:
        HalError: an unknown GPU, device, or one that is simulated itself.
    """
    points = []
    other_side = _published(against) if against.startswith(_ORIGIN) else _measured(against)
    for place, length in enumerate(sorted(lengths)):
        progress(f"length {length}", place / len(lengths))
        request = AttentionRequest(batch, heads, heads, length, length, head_dim, head_dim, "bfloat16")
        whole, alone = attention_cost(profile, request), attention_cost(profile, request, host=False)
        estimate = whole.estimate()
        assert estimate.energy is not None  # a profile always gives one
        time_, energy = other_side(request)
        points.append(
            Point(
                length=length,
                photonic_time=estimate.time,
                photonic_energy=estimate.energy,
                optics_time=alone.time,
                optics_energy=alone.energy,
                other_time=time_,
                other_energy=energy,
                parts=dict(whole.seconds),
                energy_parts=dict(whole.joules),
            )
        )
    progress("done", 1.0)
    shape = f"batch {batch}, {heads} heads, head size {head_dim}"
    return Sweep(profile=profile, against=against, shape=shape, points=tuple(points))


Other = Callable[[AttentionRequest], tuple[Quantity, Quantity | None]]


def _published(against: str) -> Other:
    name = against.partition(":")[2]
    if name not in GPUS:
        raise ContractError(
            f"--against {against!r} was given: use published:{' or published:'.join(GPUS)}, or a device id"
        )
    gpu = GPUS[name]

    def look_up(request: AttentionRequest) -> tuple[Quantity, Quantity]:
        seconds = 2 * request.macs / (gpu.share * gpu.peak) + gpu.start
        origin = (Basis.MODELLED, Provenance.VENDOR_PUBLISHED, gpu.source)
        return Quantity(seconds, seconds, *origin), Quantity(seconds * gpu.power, seconds * gpu.power, *origin)

    return look_up


def _measured(against: str) -> Other:
    device = find_devices(against)[0]
    if device.fidelity is Fidelity.SIMULATED:
        raise ContractError(f"--against {against!r} was given: it is simulated; name hardware, or published:h200")
    backend, session = registry.backend_of(device), open_session(device.id)

    def measure(request: AttentionRequest) -> tuple[Quantity, Quantity | None]:
        import torch

        place = device.reads[0]
        wait: Callable[[], Any] = getattr(session, "synchronize", None) or (
            torch.cuda.synchronize if place.startswith("cuda") else lambda: None
        )
        shape = (request.batch, request.heads_q, request.len_q, request.dim_qk)
        q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=place) for _ in range(3))
        times = []
        for run in range(6):
            wait()
            start = time.perf_counter()
            attention(q, k, v, backend=device.id)
            wait()
            if run:
                times.append(time.perf_counter() - start)
        origin = (Basis.MEASURED, Provenance.MEASURED_SILICON, f"{device.id}, median of {len(times)}")
        return Quantity(min(times), 2 * statistics.median(times) - min(times), *origin), _stated_energy(request)

    def _stated_energy(request: AttentionRequest) -> Quantity | None:
        return backend.estimate(request, device).energy

    return measure


def profile_named(name: str) -> Profile:
    """The profile of a device id or backend name, of a file, or a bundled one by its name ("lightening-8").

    Raises:
        ContractError: there is none of that name. HalError: a device without a profile, or one that is not present.
    """
    if name in bundled_names():
        return bundled(name)
    if Path(name).suffix == ".toml" or Path(name).is_file():
        return load(name)
    try:
        device = find_devices(name)[0]
    except UnknownBackendError:
        families = [entry.id for entry in registry.devices() if entry.family == "photonic"]
        close = difflib.get_close_matches(name, [*bundled_names(), *families], 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ContractError(
            f"profile {name!r} was given: there is none of that name: {hint}name a photonic device "
            f"({', '.join(families)}), a profile file (chip.toml) or one of {', '.join(bundled_names())}"
        ) from None
    backend = registry.backend_of(device)
    if not isinstance(backend, ProfileBackend):
        raise HalError(f"{device.id} is not made of a photonic profile: name a photonic device or a profile file")
    return backend.profile_of(device)


def check_plot(path: Path) -> None:
    """Raise HalError where a picture could not be written, before there is anything to draw."""
    if path.suffix.lower() not in _PICTURES:
        raise HalError(f"--plot {path} was given: use a file name that ends with {listing(_PICTURES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise HalError(f"--plot {path} was given: use a file in a folder that exists")
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HalError("a plot needs matplotlib: pip install 'hal-photonics[plot]'") from None
    return Figure


def draw(found: Sweep, path: Path) -> None:
    """Draw latency and energy of both sides over length, with the parts of the photonic side.

    Args:
        path: a PNG, SVG or PDF file.

    Raises:
        HalError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    lengths = [point.length for point in found.points]
    figure = _figure_class()(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    sides = (
        ("latency, s", "photonic_time", "other_time", "optics_time", "parts"),
        ("energy, J", "photonic_energy", "other_energy", "optics_energy", "energy_parts"),
    )
    for panel, (label, ours, other, alone, parts) in zip(panels, sides, strict=True):
        mine = [getattr(point, ours) for point in found.points]
        panel.fill_between(lengths, [q.low for q in mine], [q.high for q in mine], alpha=0.2, color="C0")
        panel.plot(lengths, [q.middle for q in mine], "o-", color="C0", label=f"{found.profile.name} (modelled)")
        panel.plot(
            lengths, [getattr(point, alone) for point in found.points], "--", color="C0", label="its optics alone"
        )
        for number, part in enumerate(getattr(found.points[0], parts)):
            values = [getattr(point, parts)[part] for point in found.points]
            if any(values):
                panel.plot(lengths, values, ":", linewidth=1, color=f"C{number + 2}", label=part)
        theirs = [getattr(point, other) for point in found.points]
        if all(quantity is not None for quantity in theirs):
            basis = theirs[0].basis
            panel.plot(lengths, [q.middle for q in theirs], "s-", color="C3", label=f"{found.against} ({basis})")
        panel.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panel.set_xticks([], minor=True)
        panel.grid(True, which="both", alpha=0.2)
        panel.legend(fontsize=7)
    figure.suptitle(
        f"Attention on {found.profile.title} (simulated), {found.shape}\n"
        f"{found.crossover('time')} {found.crossover('energy')}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)

"""Which figure of a device's profile moves a result most: one at a time at both ends of its interval.

A figure's interval is what its profile states, or else the default for its provenance, an assumption. Every run has the
same seeds, so that a result moves with the figure and not with a draw of noise. Figures that share a section are first
changed together: a section that moves nothing then is not taken apart, and one that moves time and energy alone has
no noise to average: its figures run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import attrs
from hal_nn.sensitivity import match_layers

import hal_core as hal
from hal_core import Device, DeviceUnavailableError, HalError
from hal_core.plugin_api import find_devices, registry

from ..lanes import Lane, Scope
from .outcomes import Outcomes
from .trial import Outcome, Trial

#: The name of the backend that stands for the device with changed figures.
CHANGED = "hal_sensitivity"


@attrs.frozen(kw_only=True)
class Bar:
    """One figure and what it does.

    Attributes:
        figure: a `hal_simulation.Variation`. low, high: the outcome at the figure's low and high end.
    """

    figure: Any
    low: Outcome
    high: Outcome

    def swing(self, result: str) -> float:
        """How far the result moves between both ends."""
        low, high = getattr(self.low, result), getattr(self.high, result)
        return 0.0 if low is None or high is None else abs(high - low)


@attrs.frozen(kw_only=True)
class Tornado:
    """The sensitivity of a model's result to a device's figures.

    Attributes:
        device, profile: what was varied. nominal: the outcome with no figure changed. bars: figures that were varied.
        without_effect: keys of figures that moved nothing together with all others of their section.
        fixed: reasons by the key of a figure that was not varied. default: the relative uncertainty of figures without
            a stated one; None for that of their provenance. linear: whether linear layers ran on the device.
    """

    device: str
    profile: str
    nominal: Outcome
    bars: tuple[Bar, ...]
    without_effect: tuple[str, ...]
    fixed: dict[str, str]
    default: float | None
    linear: bool

    def ranked(self, result: str) -> list[Bar]:
        """Bars that move a result, the longest first."""
        moving = [bar for bar in self.bars if bar.swing(result) > 0]
        return sorted(moving, key=lambda bar: -bar.swing(result))

    def results(self) -> list[str]:
        """The results that there are and that some figure moves."""
        return [name for name in Outcome._fields if getattr(self.nominal, name) is not None and self.ranked(name)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device,
            "profile": self.profile,
            "linear": self.linear,
            "default_uncertainty": self.default,
            "nominal": self.nominal._asdict(),
            "figures": [
                {
                    "figure": bar.figure.key,
                    "value": bar.figure.value,
                    "unit": bar.figure.unit,
                    "low": bar.figure.low,
                    "high": bar.figure.high,
                    "uncertainty": bar.figure.uncertainty,
                    "uncertainty_from": "stated" if bar.figure.stated else "assumed",
                    "provenance": str(bar.figure.provenance),
                    "source": bar.figure.source,
                    "at_low": bar.low._asdict(),
                    "at_high": bar.high._asdict(),
                }
                for bar in self.bars
            ],
            "without_effect": list(self.without_effect),
            "not_varied": self.fixed,
        }


def simulated_device(name: str) -> Device:
    """The device of an id, or the first of a backend, whose figures can be varied.

    Raises:
        HalError: it is simulated from no profile.
    """
    device = device_of(name)
    if not hasattr(registry.backend_of(device), "varied"):
        able = [each.id for each in registry.devices() if hasattr(registry.backend_of(each), "varied")]
        wanted = f"use a device that is, {', '.join(able)}" if able else "install a plugin that is, hal-kpu for example"
        raise HalError(f"{device.id} is not simulated from a profile, so it has no figures to change: {wanted}")
    return device


def device_of(name: str) -> Device:
    """The device of an id, or the first of a backend."""
    return find_devices(name)[0]


def chosen(device: Device, patterns: Sequence[str], default: float | None) -> list[Any]:
    """The figures of a device's profile that patterns name, all without a pattern, in the profile's order.

    Raises:
        ContractError: a pattern of no figure, with the closest.
    """
    backend: Any = registry.backend_of(device)
    every: list[Any] = backend.variations(device, default)
    wanted = match_layers([each.key for each in every], patterns, "figure") if patterns else None
    return [each for each in every if wanted is None or each.key in wanted]


def measure(
    trial: Trial,
    device: Device,
    *,
    patterns: Sequence[str] = (),
    default: float | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
    outcomes: Outcomes | None = None,
) -> Tornado:
    """Vary the figures of a device's profile.

    Args:
        device: of `simulated_device`. patterns: figures, by name or pattern ("noise.*"); none for all.
        default: see `Tornado`. progress: called with a text and the share done.
        outcomes: those of an earlier measurement, which are not measured again; new ones are added.

    Raises:
        ContractError: a pattern of no figure, with the closest. HalError: the device does not run the model.
    """
    kept = Outcomes() if outcomes is None else outcomes
    backend: Any = registry.backend_of(device)
    listed = chosen(device, patterns, default)
    varied = [each for each in listed if not each.reason]
    progress(f"{device.id} as it is", 0.0)
    lane = trial.lane(device)
    nominal = kept.get({}, lambda: trial.run(lane))

    def outcome(ends: Iterable[tuple[Any, float]], *, costs_alone: bool = False) -> Outcome:
        figures = {each.key: end for each, end in ends}

        def run() -> Outcome:
            named = {key.replace(".", "__"): end for key, end in figures.items()}
            with _registered(backend.varied(device, CHANGED, **named)) as changed:
                found = trial.run(_moved(trial, lane, changed), 1 if costs_alone else None)
                return found._replace(error=nominal.error) if costs_alone else found

        return kept.get(figures, run)

    sections = {name: list(each) for name, each in groupby(varied, key=lambda each: each.key.partition(".")[0])}
    reasons = {each.key: each.reason for each in listed if each.reason}
    steps, done = len(sections) + len(varied), 0
    moving: list[tuple[Any, bool]] = []  # figures, and whether they move time and energy alone
    still: list[Any] = []
    for section, figures in sections.items():
        progress(f"{section}: {len(figures)} figures together", done / steps)
        together = _together(figures, outcome) if len(figures) > 1 and not patterns else None
        if together == nominal:
            still.extend(figures)
            done += len(figures)
        else:
            costs_alone = together is not None and together.error == nominal.error
            moving.extend((each, costs_alone) for each in figures)
        done += 1
    bars = []
    for each, costs_alone in moving:
        progress(each.key, done / steps)
        try:
            low, high = (outcome([(each, end)], costs_alone=costs_alone) for end in (each.low, each.high))
            bars.append(Bar(figure=each, low=low, high=high))
        except DeviceUnavailableError as error:  # a chip that never warms up, say
            reasons[each.key] = f"at one end of {each.low:g} to {each.high:g} {_without_name(error)}"
        done += 1
    return Tornado(
        device=device.id,
        profile=device.model,
        nominal=nominal,
        bars=tuple(bars),
        without_effect=tuple(each.key for each in still),
        fixed=reasons,
        default=default,
        linear=lane.scope is Scope.LINEAR,
    )


def _together(listed: Sequence[Any], outcome: Callable[[Iterable[tuple[Any, float]]], Outcome]) -> Outcome | None:
    """The outcome with all figures of a section at their high ends; None where they do not go together."""
    try:
        return outcome((each, each.high) for each in listed)
    except HalError:
        return None


def _without_name(error: DeviceUnavailableError) -> str:
    """The sentence, of a device that the user does not know."""
    return str(error).replace(f"{CHANGED}:0", "the device")


def _moved(trial: Trial, lane: Lane, device: Device) -> Lane:
    """The same row on another device."""
    moved = trial.lane(device)
    moved.options.update(lane.options)
    return moved


@contextmanager
def _registered(backend: Any) -> Iterator[Device]:
    hal.register(backend)
    try:
        yield backend.devices()[0]
    finally:
        hal.unregister(CHANGED)

"""How far the figures of a profile may be off: what a one-at-a-time sensitivity study changes them to."""

from __future__ import annotations

import math
from typing import NamedTuple

from hal_core.plugin_api import Provenance

from .profile import Profile
from .quantity import RELATIVE_UNCERTAINTY
from .toml_file import ProfileError


class Variation(NamedTuple):
    """One figure and the ends of its interval.

    Attributes:
        key: "section.key". value, low, high: in `unit`; the ends lie within what is possible for the figure.
        uncertainty: relative, of the value; of a figure in decibels, of the ratio that it stands for.
        stated: whether the profile states it; else it is the default for the figure's provenance, an assumption.
        provenance, source: of the figure. meaning: one line for people.
        reason: why the figure is not varied; "" where it is.
    """

    key: str
    value: float
    unit: str
    low: float
    high: float
    uncertainty: float
    stated: bool
    provenance: Provenance
    source: str
    meaning: str
    reason: str = ""


def variations(profile: Profile, default: float | None = None) -> list[Variation]:
    """Every figure of a profile with its interval, in the profile's order.

    Counts and other whole numbers are choices of a design, and are varied only where an uncertainty is stated. Figures
    that contradict others when they change alone are not varied either.

    Args:
        default: the relative uncertainty of figures without a stated one; None for that of their provenance
            (`RELATIVE_UNCERTAINTY`).
    """
    return [_variation(profile, key, default) for key in profile.figures]


def _variation(profile: Profile, key: str, default: float | None) -> Variation:
    figure, (section, _, short) = profile.figures[key], key.partition(".")
    kind, stated = profile.SCHEMA[section][short], figure.uncertainty is not None
    assumed = RELATIVE_UNCERTAINTY[figure.provenance] if default is None else default
    spread = assumed if figure.uncertainty is None else figure.uncertainty
    reason = ""
    if kind.whole and not stated:
        reason = "a whole number, which a design chooses"
    elif figure.unit == "degC" and not stated:
        reason = "a temperature in degC has no relative uncertainty"
    elif figure.value == 0:
        reason = "0, which has no relative uncertainty"
    elif spread == 0:
        reason = "stated as exact"
    low, high = (_moved(figure.value, figure.unit, sign * spread) for sign in (-1, 1))
    if kind.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = (min(max(end, kind.low), kind.high) for end in (low, high))
    for end in () if reason else (low, high):
        try:
            profile.replace(**{key.replace(".", "__"): end}).check("it")
        except ProfileError as error:
            reason = f"at {end:g} {figure.unit} alone, {error}"
            break
    return Variation(
        key,
        figure.value,
        figure.unit,
        low,
        high,
        spread,
        stated,
        figure.provenance,
        figure.source,
        kind.meaning,
        reason,
    )


def _moved(value: float, unit: str, share: float) -> float:
    """The value changed by a share of itself, or of the ratio that decibels stand for."""
    if unit.startswith("dB"):
        return value + 10 * math.log10(max(1 + share, 1e-3))
    return value + share * abs(value)

"""Sensitivities as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from hal_core.plugin_api import Table

from ..figures import joules, macs, percent, ratio, seconds
from .model_layers import LayerEffects
from .tornado import Bar, Tornado

#: How each result is written, and what it is.
SHOW: dict[str, Callable[[float], str]] = {"error": ratio, "time": seconds, "energy": joules}
MEANT = {
    "error": "error of the last hidden states against float64, mean over texts",
    "time": "time of the device's part",
    "energy": "energy of the device's part",
}


def of_figures(found: Tornado, most: int) -> list[Table]:
    """A table for every result that some figure moves, with the figures that move it most."""
    listed = [_ranked(found, result, most) for result in found.results()]
    if not listed:
        nothing = f"No figure of {found.device} that was varied moves error, time or energy."
        return [Table(f"{found.device}, profile {found.profile}", ["figure"], [], [nothing])]
    listed[-1] = listed[-1]._replace(notes=[*listed[-1].notes, *notes(found)])
    return listed


def _ranked(found: Tornado, result: str, most: int) -> Table:
    show, nominal = SHOW[result], getattr(found.nominal, result)
    ranked = found.ranked(result)
    rows = []
    for bar in ranked[:most]:
        low, high = getattr(bar.low, result), getattr(bar.high, result)
        swing = percent(bar.swing(result) / nominal) if nominal else ""
        rows.append([bar.figure.key, value_of(bar), varied_by(bar), f"{show(low)} to {show(high)}", swing])
    title = f"{result} of {found.device}, {show(nominal)}: {MEANT[result]}"
    more = [f"{len(ranked) - most} more figures move it less (--json has all)."] if len(ranked) > most else []
    return Table(title, ["figure", "value", "varied by", result, "swing"], rows, more)


def value_of(bar: Bar) -> str:
    """The value with its unit."""
    return f"{bar.figure.value:g} {bar.figure.unit}"


def varied_by(bar: Bar) -> str:
    """How far it was varied, and whose word that is."""
    figure = bar.figure
    return f"±{figure.uncertainty:.0%} {'stated' if figure.stated else 'assumed'}"


def notes(found: Tornado) -> list[str]:
    """What was varied, by how much, and what was not."""
    part = "attention and linear layers" if found.linear else "attention"
    if found.default is None:
        assumed = "the default for its provenance (10% measured silicon, 25% published or projected, 50% assumed)"
    else:
        assumed = f"±{found.default:.0%}, as asked for"
    said = [
        f"Each figure alone at both ends of its interval, {part} on the device, equal seeds. Swing: between both ends, "
        "relative to the result as it is.",
        f"Stated: the profile gives the uncertainty. Assumed: it gives none, and the interval is {assumed}.",
    ]
    if found.without_effect:
        said.append(f"Without effect, changed together by section: {', '.join(found.without_effect)}.")
    if found.fixed:
        reasons: dict[str, list[str]] = {}
        for key, reason in found.fixed.items():
            reasons.setdefault(_short(reason), []).append(key)
        said += [f"Not varied, {reason}: {', '.join(keys)}." for reason, keys in reasons.items()]
    return said


def _short(reason: str) -> str:
    """The reason without the value that was tried, so that figures with one reason come together."""
    _, alone, contradiction = reason.partition(" alone, it: ")
    return f"{contradiction.partition(': their')[0]} contradict each other" if alone else reason


def of_layers(found: LayerEffects, most: int) -> list[Table]:
    """The layers, the worst first."""
    ranked = found.ranked()
    counted = any(layer.macs for layer in ranked)
    rows = [
        [layer.name, layer.kind, ratio(layer.error), *([macs(layer.macs)] if counted else [])]
        for layer in ranked[:most]
    ]
    note = [f"One layer at a time has {found.cause}; all others are exact. Error: of the last hidden states."]
    if len(ranked) > most:
        note.insert(0, f"{len(ranked) - most} more layers do less (--json has all).")
    title = f"Error of the model with {found.cause} in one layer"
    return [Table(title, ["layer", "kind", "error", *(["work"] if counted else [])], rows, note)]

"""Which layers of a model a device's errors hurt most, and the cheapest set of layers to keep off it.

The search knows neither the device nor the model: it is given the layers with their work, and functions that judge the
model while a set of them is digital. `disturbance` has the effect of noise and of fewer bits, without a device.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from hal_core import ContractError

#: Judges the model while the named layers are digital and the others are on the device.
Judge = Callable[[frozenset[str]], float]


@attrs.frozen(kw_only=True)
class DigitalSet:
    """A set of layers that stay digital.

    Attributes:
        layers: their names, in the model's order. score: of the model with them.
        digital_share: of the multiply-accumulates of all layers. tried: sets that were judged.
        damage: by layer, what it does alone on the device.
    """

    layers: tuple[str, ...]
    score: float
    digital_share: float
    tried: int
    damage: Mapping[str, float]

    @property
    def device_share(self) -> float:
        """The share of the multiply-accumulates that stays on the device."""
        return 1 - self.digital_share


def match_layers(names: Sequence[str], wanted: Iterable[str], what: str = "layer") -> frozenset[str]:
    """The layers that names, or patterns such as "encoder.*", mean.

    Args:
        what: the names are of, for messages.

    Raises:
        ContractError: one that means none, with the closest names.
    """
    found: set[str] = set()
    for pattern in wanted:
        hits = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            close = difflib.get_close_matches(pattern, names, 3, 0.4) or list(names[:3])
            raise ContractError(
                f"{what} {pattern!r} was given: there is none of that name; the closest are {', '.join(close)}"
            )
        found.update(hits)
    return frozenset(found)


def layer_damage(layers: Iterable[str], judge: Judge) -> dict[str, float]:
    """What each layer does alone on the device, all others digital: `judge` of everything but that layer.

    Args:
        judge: the larger, the worse, for example the error of the model's output.
    """
    every = frozenset(layers)
    return {name: judge(every - {name}) for name in layers}


def cheapest_digital_set(
    layers: Mapping[str, int], score: Judge, wanted: float, *, damage: Judge | None = None
) -> DigitalSet:
    """The smallest share of work to keep digital so that the score is at least `wanted`.

    Layers are ranked by their damage a multiply-accumulate. Bisection finds how many of the first are needed; then the
    ones among them that are not, largest first, go back to the device. That is a heuristic: the best of all sets is
    not looked for.

    Args:
        layers: multiply-accumulates by layer. score: the larger, the better. wanted: the least score.
        damage: the larger, the worse; finer than the score, which may be a count. None for the negative score.

    Raises:
        ContractError: no layers, or a score that is not reached with all layers digital.
    """
    if not layers:
        raise ContractError("no layers were given: pass multiply-accumulates by layer name")
    scores: dict[frozenset[str], float] = {}

    def judged(chosen: frozenset[str]) -> float:
        if chosen not in scores:
            scores[chosen] = score(chosen)
        return scores[chosen]

    best = judged(frozenset(layers))
    if best < wanted:
        raise ContractError(
            f"a score of {wanted:g} was asked for: with every layer digital it is {best:g}; ask for less"
        )
    hurt = layer_damage(layers, damage or (lambda chosen: -judged(chosen)))
    order = sorted(layers, key=lambda name: hurt[name] / max(layers[name], 1), reverse=True)
    low, high = 0, len(order)  # the first `high` are enough
    while low < high:
        middle = (low + high) // 2
        if judged(frozenset(order[:middle])) >= wanted:
            high = middle
        else:
            low = middle + 1
    chosen = frozenset(order[:high])
    for name in sorted(chosen, key=lambda name: layers[name], reverse=True):
        if judged(chosen - {name}) >= wanted:
            chosen -= {name}
    return DigitalSet(
        layers=tuple(name for name in layers if name in chosen),
        score=judged(chosen),
        digital_share=sum(layers[name] for name in chosen) / max(sum(layers.values()), 1),
        tried=len(scores),
        damage=hurt,
    )

"""What a comparison's tables and its report say in sentences: headings, notes, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hal_core import Basis, Fidelity

from .decisions import DECISIONS, ITEM, ITEMS
from .figures import percent
from .result import Comparison, Row


def headline(comparison: Comparison) -> str:
    """One sentence: model, text, repeats."""
    model = comparison.model
    texts = sum(group.texts for group in comparison.groups)
    return (
        f"{Path(model['name']).name}: {model['architecture']}, {model['parameters'] / 1e6:.3g} M parameters, "
        f"{model['dtype']}; {_amount(comparison, texts)}; {_times(comparison.repeats)} per device"
    )


def _amount(comparison: Comparison, number: int) -> str:
    named = f"{number} {items(comparison)}"
    return named if comparison.model.get("modality", "text") != "text" else f"{named}, {comparison.tokens:,} tokens"


def _times(repeats: int) -> str:
    return "1 timed run" if repeats == 1 else f"{repeats} timed runs"


def statistic(comparison: Comparison) -> str:
    """The one statistic of every figure: what its number is, and what is behind the ±."""
    repeated = "one run" if comparison.repeats == 1 else f"the median of {comparison.repeats} runs ± half their range"
    return f"{repeated}; a modelled figure is the middle of its interval ± half of it"


def task(comparison: Comparison) -> str:
    """The name of the task figure."""
    return DECISIONS[comparison.model["kind"]][1]


def decided(comparison: Comparison) -> str:
    """What the task figure counts: "texts whose nearest neighbour is the float64 run's"."""
    return f"{DECISIONS[comparison.model['kind']][0].format(items=items(comparison))} is the float64 run's"


def items(comparison: Comparison) -> str:
    """What the model was run on: "texts", "images" or "clips"."""
    return ITEMS[comparison.model.get("modality", "text")]


def item(comparison: Comparison) -> str:
    """One of them: "text", "image" or "clip"."""
    return ITEM[comparison.model.get("modality", "text")]


def notes(comparison: Comparison) -> list[str]:
    """What one has to know to read the first table."""
    ran = [row for row in comparison.rows if row.ran]
    if not ran:
        return []
    share = sum(group.attention_macs for group in comparison.groups) / comparison.macs
    said = [
        f"Error: of the worst {item(comparison)}'s hidden states, relative to a float64 run. "
        f"Kept: {decided(comparison)}.",
        f"Time and energy: of {parts(ran)} in one pass. Attention is {percent(share)} of the model's work.",
        f"Figures: {statistic(comparison)}.",
    ]
    kinds = {row.fidelity for row in ran}
    if Fidelity.EMULATED in kinds:
        said.append("Emulated: this host runs the device's programs; the time is this host's.")
    if Fidelity.SIMULATED in kinds:
        said.append("Simulated: values, time and energy come from a model of the device.")
    return [
        *said,
        *energy_notes(ran),
        *once(comparison, ran),
        *([comparison.model["note"]] if comparison.model["note"] else []),
    ]


def energy_notes(ran: Sequence[Row]) -> list[str]:
    """Where energy is lacking, and where it is assumed."""
    said = []
    energies = [row.costs.energy for row in ran if row.costs is not None]
    if any(energy is None for energy in energies):
        said.append("Energy is not available where there is neither a meter nor a published power.")
    assumed = {energy.source for energy in energies if energy is not None and energy.basis == Basis.DECLARED}
    said += [f'Energy marked "declared, assumed": {source}; it is no measurement.' for source in sorted(assumed)]
    return said


def once(comparison: Comparison, ran: Sequence[Row]) -> list[str]:
    """The rows that were timed once, because they are slow. A simulated device without noise runs once whatever it
    takes: its time is modelled.
    """
    single = [row.name for row in ran if row.repeats < comparison.repeats and row.fidelity != "simulated"]
    if not single:
        return []
    return [f"Timed once, without a spread, because a run is long: {', '.join(single)} (--budget allows more)."]


def parts(ran: Sequence[Row]) -> str:
    """What each row's part of the model is, in one clause."""
    wide = {row.scope: row.name for row in ran if row.scope != "attention"}
    others = "".join(f", of {name.partition(' ')[2]!r} rows {scope}" for scope, name in wide.items())
    return f"attention{others}{',' if others else ''}"


def origins(row: Row) -> str:
    """Where a row's error, time and energy are from: one origin where they share it."""
    assert row.accuracy is not None
    assert row.costs is not None
    figures = {"error": row.accuracy.worst, "time": row.costs.on_device, "energy": row.costs.energy}
    by_origin: dict[str, list[str]] = {}
    for name, figure in figures.items():
        if figure is not None:
            by_origin.setdefault(figure.origin, []).append(name)
    if len(by_origin) == 1:
        return next(iter(by_origin))
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in by_origin.items())


def refused(comparison: Comparison) -> list[str]:
    """Why the rows that did not run did not, as sentences."""
    lines = []
    for row in comparison.rows:
        if not row.ran:
            lines.append(refusal(row, comparison.batches))
            lines += [f"  {reason}" for reason in row.refusals]
            if hint := mask_hint(row, comparison.batch_size):
                lines.append(f"  {hint}")
    return lines


def mask_hint(row: Row, batch_size: int) -> str:
    """How a device without masks can be compared all the same; "" where that is not the point."""
    if batch_size == 1 or not any(reason.startswith("mask ") for reason in row.refusals):
        return ""
    return "Texts of different lengths in a batch need a mask: --batch 1 needs none."


def refusal(row: Row, batches: int) -> str:
    """What to put above the reasons of a row that did not run."""
    if row.fidelity == "absent":
        return f"{row.name} is not here:"
    if not row.refused_batches:
        return f"{row.name} did not finish:"
    return f"{row.name} refused {row.refused_batches} of {batches} batches:"


def file_names(comparison: Comparison) -> dict[str, str]:
    """What to call each text file: its name without folders, where no two files share one."""
    names = {group.name: Path(group.name).name for group in comparison.groups}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}

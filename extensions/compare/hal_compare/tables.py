"""A comparison as tables: one that answers the question, and the details."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hal_core import Fidelity
from hal_core.plugin_api import Table

from .decisions import DECISIONS, ITEMS
from .figures import NOT_AVAILABLE, cosine, joules, macs, percent, plain, ratio, seconds, varied
from .result import Comparison, Costs, Row


def summary(comparison: Comparison) -> Table:
    """One row per device: error, what is kept of the task, time and energy of its part, and where they are from."""
    rows = []
    for row in comparison.rows:
        found, costs = row.accuracy, row.costs
        if found is None or costs is None:
            rows.append([row.name, row.fidelity, "did not run", "", "", "", "see below"])
            continue
        energy = NOT_AVAILABLE if costs.energy is None else varied(costs.energy, joules)
        kept = percent(found.agreement.middle)
        cells = [varied(found.worst, ratio), kept, varied(costs.on_device, seconds), energy, origins(row)]
        rows.append([row.name, row.fidelity, *cells])
    columns = ["device", "kind", "error", "task kept", "time", "energy", "origin"]
    return Table(headline(comparison), columns, rows, _summary_notes(comparison))


def _summary_notes(comparison: Comparison) -> list[str]:
    ran = [row for row in comparison.rows if row.ran]
    if not ran:
        return []
    noun = DECISIONS[comparison.model["kind"]][0].format(items=items(comparison))
    share = sum(group.attention_macs for group in comparison.groups) / comparison.macs
    notes = [
        f"Error: of the worst text's hidden states, relative to a float64 run. Task kept: {noun} is the float64 run's.",
        f"Time and energy: of {_parts(ran)} in one pass over the text, median of {comparison.repeats} ± half the "
        f"range. Attention is {percent(share)} of the model's work.",
    ]
    kinds = {row.fidelity for row in ran}
    if Fidelity.EMULATED in kinds:
        notes.append("Emulated: this host runs the device's programs; the time is this host's.")
    if Fidelity.SIMULATED in kinds:
        notes.append("Simulated: values, time and energy come from a model of the device.")
    if any(row.costs is not None and row.costs.energy is None for row in ran):
        notes.append("Energy is not available where there is neither a meter nor a published power.")
    return [*notes, *_once(comparison, ran), *([comparison.model["note"]] if comparison.model["note"] else [])]


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


def task(comparison: Comparison) -> str:
    """The name of the task figure."""
    return DECISIONS[comparison.model["kind"]][1]


def items(comparison: Comparison) -> str:
    """What the model was run on: "texts", "images" or "clips"."""
    return ITEMS[comparison.model.get("modality", "text")]


def details(comparison: Comparison) -> list[Table]:
    """The texts, and every figure of every row that ran."""
    ran = [row for row in comparison.rows if row.ran]
    tables = [_text(comparison)]
    return [*tables, _accuracy(comparison, ran), _time(comparison, ran), _energy(comparison, ran)] if ran else tables


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


def _text(comparison: Comparison) -> Table:
    names = file_names(comparison)
    rows = [
        [
            names[group.name],
            str(group.texts),
            f"{group.tokens:,}",
            str(group.longest),
            macs(group.macs),
            percent(group.attention_macs / group.macs),
        ]
        for group in comparison.groups
    ]
    cut = [
        f"{names[group.name]}: {group.cut} texts were cut to {group.longest} tokens."
        for group in comparison.groups
        if group.cut
    ]
    return Table("Text", ["file", "texts", "tokens", "longest", "model's work", "of it attention"], rows, cut)


def _accuracy(comparison: Comparison, ran: Sequence[Row]) -> Table:
    causal = any(row.accuracy is not None and row.accuracy.perplexity is not None for row in ran)
    rows = []
    for row in ran:
        found = row.accuracy
        assert found is not None
        cells = [
            row.name,
            row.fidelity,
            varied(found.worst, ratio),
            varied(found.mean, ratio),
            cosine(found.cosine.middle),
        ]
        cells.append(f"{percent(found.agreement.middle)} of {found.decisions:,}")
        if causal:
            cells.append("" if found.perplexity is None else varied(found.perplexity, plain))
        rows.append([*cells, found.worst.origin])
    if causal and (reference := ran[0].accuracy) and reference.reference_perplexity is not None:
        rows.insert(0, ["float64", "", "", "", "", "", plain(reference.reference_perplexity), "the reference"])
    columns = ["device", "kind", "worst", "mean", "lowest cosine", task(comparison)]
    columns += ["perplexity", "origin"] if causal else ["origin"]
    return Table("Error of the hidden states against float64, by text", columns, rows)


def _time(comparison: Comparison, ran: Sequence[Row]) -> Table:
    rows, notes = [], [scopes(ran)]
    for row in ran:
        costs = _costs(row)
        parts = (costs.wall, costs.inside, costs.remainder, costs.on_device, costs.total)
        rows.append([row.name, *(varied(part, seconds) for part in parts), costs.on_device.origin])
    if any(row.device is not None and row.device.fidelity == Fidelity.SIMULATED for row in ran):
        notes.append(
            "A simulated device's wall time is the simulation's; its total is the rest, on this host, plus the "
            "modelled time."
        )
    if any(row.device is not None and row.device.fidelity == Fidelity.EMULATED for row in ran):
        notes.append("An emulated device's time is this host's, running the device's programs.")
    columns = ["device", "wall", "its part", "host rest", "on device", "total", "origin"]
    title = f"Time of one pass, median of {comparison.repeats} ± half the range"
    return Table(title, columns, rows, [*notes, *_once(comparison, ran)])


def _once(comparison: Comparison, ran: Sequence[Row]) -> list[str]:
    once = [row.name for row in ran if row.repeats < comparison.repeats]
    if not once:
        return []
    return [f"Timed once, without a spread, because a run is long: {', '.join(once)} (--budget allows more)."]


def scopes(ran: Sequence[Row]) -> str:
    """What each row's part of the model is, in one sentence."""
    return f"The device's part is {_parts(ran).removesuffix(',')}."


def _parts(ran: Sequence[Row]) -> str:
    wide = {row.scope: row.name for row in ran if row.scope != "attention"}
    others = "".join(f", of {name.partition(' ')[2]!r} rows {scope}" for scope, name in wide.items())
    return f"attention{others}{',' if others else ''}"


def _energy(comparison: Comparison, ran: Sequence[Row]) -> Table:
    rows = []
    for row in ran:
        costs, found = _costs(row), row.accuracy
        assert found is not None
        energy = varied(costs.energy, joules) if costs.energy is not None else NOT_AVAILABLE
        share, origin = percent(comparison.share(row)), costs.energy.origin if costs.energy is not None else ""
        kept = percent(found.agreement.middle)
        rows.append([row.name, macs(costs.macs), share, energy, origin, NOT_AVAILABLE, kept])
    columns = ["device", "work on it", "share", "energy on it", "origin", "rest and total", task(comparison)]
    notes = ["Energy is not available where there is neither a meter nor a published power: nothing is guessed."]
    return Table("Work and energy of one pass, and what is kept of the task", columns, rows, notes)


def _costs(row: Row) -> Costs:
    assert row.costs is not None
    return row.costs

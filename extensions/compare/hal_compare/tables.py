"""A comparison as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hal_core import Fidelity
from hal_core.console import show_table

from .figures import NOT_AVAILABLE, cosine, joules, macs, percent, plain, ratio, seconds, varied
from .result import Comparison, Row


def show(comparison: Comparison) -> None:
    """Print all tables to standard output."""
    ran = [row for row in comparison.rows if row.ran]
    print(headline(comparison))
    if note := comparison.model["note"]:
        print(note)
    _show_text(comparison)
    _show_accuracy(comparison, ran)
    _show_time(comparison, ran)
    _show_energy(comparison, ran)
    for row in comparison.rows:
        if not row.ran:
            print(refusal(row, comparison.batches))
            for reason in row.refusals:
                print(f"  {reason}")
            if hint := mask_hint(row, comparison.batch_size):
                print(f"  {hint}")


def headline(comparison: Comparison) -> str:
    """One sentence: model, text, repeats."""
    model = comparison.model
    texts = sum(group.texts for group in comparison.groups)
    return (
        f"{Path(model['name']).name}: {model['architecture']}, {model['parameters'] / 1e6:.3g} M parameters, {model['dtype']}; "
        f"{texts} texts, {comparison.tokens:,} tokens; {_times(comparison.repeats)} per device, in turn"
    )


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


def _show_text(comparison: Comparison) -> None:
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
    show_table("Text", ["file", "texts", "tokens", "longest", "model's work", "of it attention"], rows, cut)


def _show_accuracy(comparison: Comparison, ran: list[Row]) -> None:
    causal = comparison.model["kind"] == "causal"
    task = ["same next token", "perplexity"] if causal else ["same neighbour"]
    rows = []
    for row in ran:
        found = row.accuracy
        assert found is not None
        cells = [
            row.name,
            row.fidelity,
            varied(found.worst, ratio),
            varied(found.mean, ratio),
            cosine(found.cosine.low),
        ]
        cells.append(f"{percent(found.agreement.low)} of {found.decisions:,}")
        if causal and found.perplexity is not None:
            cells.append(varied(found.perplexity, plain))
        rows.append([*cells, found.worst.origin])
    if causal and ran and (reference := ran[0].accuracy) and reference.reference_perplexity is not None:
        rows.insert(0, ["float64", "", "", "", "", "", plain(reference.reference_perplexity), "the reference"])
    columns = ["device", "fidelity", "worst", "mean", "lowest cosine", *task, "origin"]
    show_table("Error of the hidden states against float64, by text", columns, rows)


def _show_time(comparison: Comparison, ran: list[Row]) -> None:
    rows, notes = [], [scopes(ran)]
    for row in ran:
        costs = row.costs
        assert costs is not None
        rows.append(
            [
                row.name,
                varied(costs.wall, seconds),
                varied(costs.inside, seconds),
                varied(costs.remainder, seconds),
                varied(costs.on_device, seconds),
                varied(costs.total, seconds),
                costs.on_device.origin,
            ]
        )
    if any(row.device is not None and row.device.fidelity == Fidelity.SIMULATED for row in ran):
        notes.append(
            "A simulated device's wall time is the simulation's; its total is the rest, on this host, plus the modelled time."
        )
    if any(row.device is not None and row.device.fidelity == Fidelity.EMULATED for row in ran):
        notes.append("An emulated device's time is this host's, running the device's programs.")
    if once := [row.name for row in ran if row.repeats < comparison.repeats]:
        notes.append(f"Timed once, without a spread, because a run is long: {', '.join(once)} (--budget allows more).")
    columns = ["device", "wall", "its part", "host rest", "on device", "total", "origin"]
    show_table(f"Time of one pass, median of {comparison.repeats} ± half the range", columns, rows, notes)


def scopes(ran: Sequence[Row]) -> str:
    """What each row's part of the model is, in one sentence."""
    wide = {row.scope: row.name for row in ran if row.scope != "attention"}
    others = "".join(f"; of {name.partition(' ')[2]!r} {scope}" for scope, name in wide.items())
    return f"A row's part is attention{others}."


def _show_energy(comparison: Comparison, ran: list[Row]) -> None:
    rows = []
    for row in ran:
        costs, found = row.costs, row.accuracy
        assert costs is not None
        assert found is not None
        energy = varied(costs.energy, joules) if costs.energy is not None else NOT_AVAILABLE
        share, origin = percent(comparison.share(row)), costs.energy.origin if costs.energy is not None else ""
        kept = percent(found.agreement.low)
        rows.append([row.name, macs(costs.macs), share, energy, origin, NOT_AVAILABLE, kept])
    task = "same next token" if comparison.model["kind"] == "causal" else "same neighbour"
    columns = ["device", "work on it", "share", "energy on it", "origin", "rest and total", task]
    notes = ["Energy is not available where there is neither a meter nor a published power: nothing is guessed."]
    show_table("Work and energy of one pass, and what is kept of the task", columns, rows, notes)

"""`hal photonics`: check a profile, list cards, compare attention with a GPU over lengths.

Commands return data; `hal` prints it. What a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import CommandResult, ContractError, Table

if TYPE_CHECKING:
    from .benchmark import Sweep

#: Lengths and sizes have at most this many digits.
_MOST_DIGITS = 9


def add_commands(subparsers: Any) -> None:
    """Add `photonics` to the subparsers of `hal`."""
    text = "photonic devices: check a profile, list cards, draw latency and energy against a GPU"
    parent = subparsers.add_parser("photonics", help=text, description=text)
    commands = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)
    profile = commands.add_parser("profile", help="check a profile file and show where each figure is from")
    profile.add_argument("file", help="a profile file, a photonic device, or the name of a bundled profile")
    profile.set_defaults(run=_profile)
    cards = commands.add_parser("cards", help="look for cards with the PCI ids in HAL_PHOTONIC_PCI_IDS")
    cards.set_defaults(run=_cards)
    sweep = commands.add_parser("sweep", help="time and energy of attention over lengths, against a GPU")
    sweep.add_argument(
        "--device", default="photonic:0", help="photonic device, bundled profile or profile file (default %(default)s)"
    )
    sweep.add_argument("--lengths", default="512,2048,8192,32768", help="comma-separated (default %(default)s)")
    sweep.add_argument("--against", default="published:h200", help="device id to run here, or %(default)s (default)")
    sweep.add_argument("--shape", default="1,32,128", help="batch,heads,head_dim (default %(default)s)")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="draw it to a PNG, SVG or PDF file")
    sweep.set_defaults(run=_sweep)


def _profile(options: argparse.Namespace) -> CommandResult:
    from . import cost
    from .benchmark import profile_named
    from .profiles.profile import word
    from .simulator import imperfections

    p = profile_named(options.file)
    derived = {
        "peak throughput, TOPS": f"{cost.throughput(p) / 1e12:.4g}",
        "efficiency, TOPS/W": f"{cost.efficiency(p) / 1e12:.3g}",
        "effective bits of one readout": f"{imperfections.effective_bits(p):.2f}",
        **{f"noise: {name}, LSB": f"{value:.3g}" for name, value in imperfections.noise_parts(p)._asdict().items()},
    }
    figures = {
        key: {"value": f.value, "unit": f.unit, "provenance": word(f.provenance), "source": f.source}
        for key, f in p.figures.items()
    }
    rows = [[key, f"{f.value:g}", f.unit, word(f.provenance), f.source] for key, f in p.figures.items()]
    title = f"{p.vendor} {p.name}: {p.title} ({p.mechanism})"
    counts = Counter(word(f.provenance) for f in p.figures.values())
    listed = ", ".join(f"{count} figures {origin}" for origin, count in counts.items())
    return CommandResult(
        {"name": p.name, "vendor": p.vendor, "mechanism": p.mechanism, "figures": figures, "derived": derived},
        tables=[
            Table(title, ["figure", "value", "unit", "provenance", "source"], rows),
            Table("Derived from them", ["figure", "value"], [[name, value] for name, value in derived.items()]),
        ],
        text=[f"{p.path}: good. {listed}."],
    )


def _cards(options: argparse.Namespace) -> CommandResult:
    from .discovery import IDS_VARIABLE, cards, configured_ids

    wanted, found = configured_ids(), cards()
    data = {"configured": sorted(wanted), "cards": [card._asdict() for card in found]}
    if not wanted:
        return CommandResult(
            data, text=[f"No ids are configured: set {IDS_VARIABLE}=vendor:device, as `lspci -nn` prints them."]
        )
    said = f"None of {', '.join(sorted(wanted))} is on the bus."
    if found:
        said = "No vendor publishes a driver, so none of them is used; a profile simulates one."
    table = Table("Photonic cards", ["address", "ids"], [[card.address, card.ids] for card in found])
    return CommandResult(data, tables=[table], text=[said])


def _sweep(options: argparse.Namespace) -> CommandResult:
    import attrs

    from .benchmark import check_plot, draw, profile_named, sweep

    lengths = _numbers(options.lengths, "--lengths", 0, "lengths")
    batch, heads, dim = _numbers(options.shape, "--shape", 3, "batch,heads,head_dim")
    if options.plot is not None:
        check_plot(options.plot)
    found = sweep(
        profile_named(options.device),
        lengths,
        options.against,
        batch=batch,
        heads=heads,
        head_dim=dim,
        progress=options.progress,
    )
    sentences = [found.crossover("time"), found.crossover("energy")]
    data = {
        "profile": found.profile.name,
        "against": found.against,
        "shape": found.shape,
        "points": [attrs.asdict(point) for point in found.points],
        "crossover": sentences,
    }
    if options.plot is not None:
        draw(found, options.plot)
        data["plot"] = str(options.plot)
    text = [] if options.plot is None else [f"plot: {options.plot}"]
    return CommandResult(data, tables=[_table(found, sentences)], text=text)


def _numbers(text: str, option: str, count: int, wanted: str) -> list[int]:
    """Whole numbers of 1 or more, `count` of them; 0 for any count."""
    words = [word.strip() for word in text.split(",")]
    good = all(word.isdecimal() and len(word) <= _MOST_DIGITS and int(word) > 0 for word in words)
    if not good or (count and len(words) != count):
        raise ContractError(f"{option} {text[:80]!r} was given: pass {wanted} as whole numbers of 1 or more")
    return [int(word) for word in words]


def _table(found: Sweep, notes: list[str]) -> Table:
    rows = []
    for p in found.points:
        speed, optics = p.other_time.middle / p.photonic_time.middle, p.other_time.middle / p.optics_time
        energy = "not available" if p.other_energy is None else f"{p.other_energy.middle:.3g}"
        change = "" if p.other_energy is None else f"{p.photonic_energy.middle / p.other_energy.middle - 1:+.0%}"
        rows.append(
            [
                f"{p.length:,}",
                f"{p.photonic_time.middle * 1e3:.3g}",
                f"{p.optics_time * 1e3:.3g}",
                f"{p.other_time.middle * 1e3:.3g}",
                f"{speed:.2f}x ({optics:.2f}x)",
                f"{p.photonic_energy.middle:.3g}",
                f"{p.optics_energy:.3g}",
                energy,
                change,
                f"{p.photonic_time.basis}, {p.photonic_time.provenance}",
                f"{p.other_time.basis}, {p.other_time.provenance}",
            ]
        )
    columns = [
        "length",
        "time, ms",
        "optics alone",
        found.against,
        "speed (optics)",
        "energy, J",
        "optics alone",
        found.against,
        "energy change",
        "origin",
        "origin of the other",
    ]
    return Table(f"{found.profile.title} (simulated) against {found.against}, {found.shape}", columns, rows, notes)

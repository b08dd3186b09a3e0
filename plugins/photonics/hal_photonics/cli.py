"""`hal photonics`: check a profile, list cards, sweep lengths against a GPU. Everything heavy is imported when it
runs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any


def add_commands(subparsers: Any) -> None:
    """Add `photonics` to the subparsers of `hal`."""
    text = "photonic devices: check a profile, list cards, draw latency and energy against a GPU"
    parent = subparsers.add_parser("photonics", help=text, description=text)
    commands = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)
    profile = commands.add_parser("profile", help="check a profile file and show where each figure is from")
    profile.add_argument("file", type=Path)
    profile.set_defaults(run=_profile)
    cards = commands.add_parser("cards", help="look for cards with the PCI ids in HAL_PHOTONIC_PCI_IDS")
    cards.set_defaults(run=_cards)
    sweep = commands.add_parser("sweep", help="time and energy of attention over lengths, against a GPU")
    sweep.add_argument("--device", default="photonic:0", help="photonic device or profile file (default %(default)s)")
    sweep.add_argument("--lengths", default="512,2048,8192,32768", help="comma-separated (default %(default)s)")
    sweep.add_argument("--against", default="published:h200", help="device id to run here, or %(default)s (default)")
    sweep.add_argument("--shape", default="1,32,128", help="batch,heads,head_dim (default %(default)s)")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="draw it to a PNG, SVG or PDF file")
    sweep.set_defaults(run=_sweep)
    for command in (profile, cards, sweep):
        command.add_argument("--json", action="store_true", help="print JSON")


def _profile(options: argparse.Namespace) -> int:
    from hal_core.plugin_api import show_table

    from . import cost
    from .profiles.profile import load, word
    from .simulator import imperfections

    p = load(options.file)
    derived = {
        "peak throughput, TOPS": f"{cost.throughput(p) / 1e12:.4g}",
        "efficiency, TOPS/W": f"{cost.efficiency(p) / 1e12:.3g}",
        "effective bits of one readout": f"{imperfections.effective_bits(p):.2f}",
        **{f"noise: {name}, LSB": f"{value:.3g}" for name, value in imperfections.noise_parts(p)._asdict().items()},
    }
    if options.json:
        figures = {
            key: {"value": f.value, "unit": f.unit, "provenance": word(f.provenance), "source": f.source}
            for key, f in p.figures.items()
        }
        head = {"name": p.name, "vendor": p.vendor, "mechanism": p.mechanism}
        print(json.dumps({**head, "figures": figures, "derived": derived}, indent=2))
        return 0
    rows = [[key, f"{f.value:g}", f.unit, word(f.provenance), f.source] for key, f in p.figures.items()]
    show_table(
        f"{p.vendor} {p.name}: {p.title} ({p.mechanism})", ["figure", "value", "unit", "provenance", "source"], rows
    )
    show_table("What follows", ["figure", "value"], [[name, value] for name, value in derived.items()])
    counts = Counter(word(f.provenance) for f in p.figures.values())
    print(f"{p.path}: good. {', '.join(f'{count} figures {origin}' for origin, count in counts.items())}.")
    return 0


def _cards(options: argparse.Namespace) -> int:
    from hal_core.plugin_api import show_table

    from .discovery import IDS_VARIABLE, cards, configured_ids

    wanted, found = configured_ids(), cards()
    if options.json:
        print(json.dumps({"configured": sorted(wanted), "cards": [card._asdict() for card in found]}, indent=2))
        return 0
    if not wanted:
        print(f"No ids are configured: set {IDS_VARIABLE}=vendor:device, as `lspci -nn` prints them.")
        return 0
    show_table("Photonic cards", ["address", "ids"], [[card.address, card.ids] for card in found])
    if found:
        print("No vendor publishes a driver, so none of them is used; a profile simulates one.")
    else:
        print(f"None of {', '.join(sorted(wanted))} is on the bus.")
    return 0


def _numbers(text: str, option: str, count: int, wanted: str) -> list[int]:
    from hal_core.plugin_api import ContractError

    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words) or (count and len(words) != count):
        raise ContractError(f"{option} {text!r} was given: pass {wanted} as whole numbers of 1 or more")
    return [int(word) for word in words]


def _sweep(options: argparse.Namespace) -> int:
    from hal_core.plugin_api import progress, show_table

    from .benchmark import draw, profile_named, sweep

    lengths = _numbers(options.lengths, "--lengths", 0, "lengths")
    batch, heads, dim = _numbers(options.shape, "--shape", 3, "batch,heads,head_dim")
    with progress("sweep") as report:
        found = sweep(
            profile_named(options.device),
            lengths,
            options.against,
            batch=batch,
            heads=heads,
            head_dim=dim,
            progress=report,
        )
    sentences = [found.crossover("time"), found.crossover("energy")]
    if options.json:
        import attrs

        points = [attrs.asdict(point) for point in found.points]
        print(
            json.dumps(
                {
                    "profile": found.profile.name,
                    "against": found.against,
                    "shape": found.shape,
                    "points": points,
                    "crossover": sentences,
                },
                indent=2,
            )
        )
    else:
        show_table(
            f"{found.profile.title} (simulated) against {found.against}, {found.shape}", *_table(found), sentences
        )
    if options.plot is not None:
        draw(found, options.plot)
        if not options.json:
            print(f"plot: {options.plot}")
    return 0


def _table(found: Any) -> tuple[list[str], list[list[str]]]:
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
    return columns, rows

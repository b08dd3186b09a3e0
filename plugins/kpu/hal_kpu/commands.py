"""`hal kpu`: profiles, products, attention, timelines and a model's coverage. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any


def add_commands(subparsers: Any) -> None:
    """Add `kpu` to the subparsers of `hal`."""
    text = "the simulated KPU: products, attention, timelines, a model's coverage"
    parent = subparsers.add_parser("kpu", help=text, description=text)
    commands = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)
    profile = commands.add_parser("profile", help="check a profile and show where each figure is from")
    profile.add_argument("profile", metavar="NAME|FILE", help="a bundled profile, or a TOML file")
    profile.set_defaults(run=_profile)
    for command in (profile,):
        command.add_argument("--json", action="store_true", help="print JSON")


def _profile(options: argparse.Namespace) -> int:
    import attrs

    from hal_core.console import show_table

    from .profile import load

    p = load(options.profile)
    if options.json:
        figures = {key: attrs.asdict(figure) for key, figure in p.figures}
        print(
            json.dumps(
                {"name": p.name, "title": p.title, "vendor": p.vendor, "notes": p.notes, "figures": figures}, indent=2
            )
        )
        return 0
    rows = [[key, f"{f.value:g}", f.unit, str(f.provenance), f.source] for key, f in p.figures]
    show_table(f"{p.vendor} {p.name}: {p.title}", ["figure", "value", "unit", "provenance", "source"], rows)
    counts = Counter(str(f.provenance) for _, f in p.figures)
    if p.notes:
        print(p.notes)
    print(f"{p.path}: good. {', '.join(f'{count} figures {origin}' for origin, count in counts.items())}.")
    return 0

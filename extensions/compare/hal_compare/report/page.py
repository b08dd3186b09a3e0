"""A comparison as one self-contained HTML page. It fetches nothing: style and script are inside, and its policy forbids
the rest.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from .. import layers_report
from ..conclusion import conclusion
from ..result import Comparison, Row
from ..sentences import headline
from ..tables import grids
from . import pictures, sections
from .html_tables import families_table, grid_table

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("report.css", "report.js"))


class Beside(NamedTuple):
    """A file beside the page: its name, "" for none, and what it is."""

    name: str
    what: str


def render(comparison: Comparison, beside: Sequence[Beside] = ()) -> str:
    """The whole page.

    Args:
        beside: files beside the page, to link to.
    """
    ran = [row for row in comparison.rows if row.ran]
    parts = [_head(comparison, ran), sections.facts(comparison)]
    if ran:
        parts += [families_table(comparison), _layers(comparison, ran), _side_by_side(comparison, ran)]
        parts.append(_all_numbers(comparison))
    parts += [sections.refused(comparison), sections.terms(comparison), sections.provenance(comparison)]
    parts.append(files_beside(beside))
    return document(f"hal compare: {comparison.model['name']}", "".join(parts))


def document(title: str, body: str) -> str:
    """A whole page with the style, the script and the policy of a report.

    Args:
        title: as text. body: as HTML.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><style>{STYLE.read_text(encoding="utf-8")}</style></head>'
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def _policy(script: str) -> str:
    """A policy under which the page can load nothing, and run its own script alone."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _head(comparison: Comparison, ran: Sequence[Row]) -> str:
    said = conclusion(comparison) if ran else "No device ran the model; the reasons are below."
    when = comparison.created.replace("T", " ").replace("+00:00", " UTC")
    note = f'<p class="note">{escape(comparison.model["note"])}</p>' if comparison.model["note"] else ""
    return (
        f'<header><p class="kicker">hal compare · {escape(when)}</p>'
        f'<h1>{escape(Path(comparison.model["name"]).name)}</h1><p class="conclusion">{escape(said)}</p>{note}</header>'
        f"{pictures.comparison(comparison, ran)}"
    )


def _layers(comparison: Comparison, ran: Sequence[Row]) -> str:
    """What is known layer by layer."""
    return pictures.layers(comparison, ran) + layers_report.section(comparison)


def _side_by_side(comparison: Comparison, ran: Sequence[Row]) -> str:
    return (
        '<section><h2>Side by side</h2><div class="charts">'
        f"{pictures.errors(comparison, ran)}{pictures.times(comparison, ran)}"
        f"{pictures.energies(comparison, ran)}{pictures.host(ran)}"
        f"{pictures.attention_shares(comparison, ran)}</div></section>"
    )


def _all_numbers(comparison: Comparison) -> str:
    drawn = "".join(grid_table(grid) for grid in grids(comparison))
    return f'<section><h2>All numbers</h2><p class="lead">{escape(headline(comparison))}.</p>{drawn}</section>'


def files_beside(beside: Sequence[Beside]) -> str:
    """Links to the files beside the page."""
    if not beside:
        return ""
    listed = "".join(
        f'<li><a href="{escape(file.name)}">{escape(file.name)}</a>: {escape(file.what)}</li>'
        if file.name
        else f"<li>{escape(file.what)}</li>"
        for file in beside
    )
    return f'<section><h2>Beside this page</h2><ul class="box files">{listed}</ul></section>'

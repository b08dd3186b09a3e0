"""How a benchmark leaves its record: a table on the terminal, and with --record a Markdown file under
docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hal_cli.output import show_table

from hal_core import Table

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print JSON")
    options.add_argument("--record", action="store_true", help="write the record under docs/benchmarks")
    return options


def conditions() -> dict[str, str]:
    """What the numbers depend on."""
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def publish(
    options: argparse.Namespace,
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    section: str = "",
) -> None:
    """Print a table, or JSON; with --record also write docs/benchmarks/<name>.md, whole or not at all.

    With a `section`, only that part of the file is replaced.
    """
    facts = conditions()
    if options.json:
        print(
            json.dumps(
                {"title": title, "conditions": facts, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
            )
        )
    else:
        show_table(Table(title, columns, rows, notes))
    if not options.record:
        return
    heading = f"## {section or title}"
    table = [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
    text = [heading, "", *(f"- {key}: {value}" for key, value in facts.items()), "", *table, "", *notes, ""]
    path = FOLDER / f"{name}.md"
    old = path.read_text(encoding="utf-8") if path.exists() else f"# {name}\n\n"
    before, _, rest = old.partition(heading + "\n")
    after = "\n## " + rest.partition("\n## ")[2] if "\n## " in rest else ""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(before.rstrip() + "\n\n" + "\n".join(text).rstrip() + "\n" + after, encoding="utf-8")
    os.replace(unfinished, path)

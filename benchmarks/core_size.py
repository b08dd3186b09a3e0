"""How large the core and its testing kit are, in statements: `ast.stmt` nodes, which formatting does not change."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
BARS = {"hal_core": 2400, "hal_core/testing": None}
#: Statements that the core has at most today: above its bar, and not to grow.
REACHED = 2868


def statements(path: Path) -> int:
    """Statements of a Python file, docstrings included."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def sizes(folder: str) -> dict[str, int]:
    """Statements by file of a folder, sub-folders included; of hal_core without its testing kit."""
    files = sorted((ROOT / folder).rglob("*.py"))
    kit = ROOT / "hal_core" / "testing"
    return {
        str(path.relative_to(ROOT)): statements(path)
        for path in files
        if folder.endswith("testing") or kit not in path.parents
    }


def main() -> int:
    options = record.parser(__doc__).parse_args()
    rows, missed = [], False
    for folder, bar in BARS.items():
        by_file = sizes(folder)
        total = sum(by_file.values())
        verdict = "" if bar is None else "held" if total <= bar else f"missed by {total - bar}"
        missed |= bar is not None and total > bar
        rows += [[path, str(size), "", ""] for path, size in by_file.items()]
        rows.append([f"{folder}, all of it", str(total), "" if bar is None else str(bar), verdict])
    notes = ["Statements are `ast.stmt` nodes. The kit's files are counted apart."]
    record.publish(options, "core", "The core's size", ["file", "statements", "bar", ""], rows, notes, section="Size")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

"""How large the core and its testing kit are: lines that are neither blank nor docstring, comments counted."""

from __future__ import annotations

import ast
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
BARS = {"hal_core": 1900, "hal_core/testing": 1500}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def lines_of_code(path: Path) -> int:
    """Lines of a Python file that are neither blank nor part of a docstring."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(bool(line.strip()) and number not in docstrings for number, line in enumerate(text.splitlines(), 1))


def main() -> None:
    options = record.parser(__doc__).parse_args()
    rows = []
    for folder, bar in BARS.items():
        sizes = {path: lines_of_code(path) for path in sorted((ROOT / folder).glob("*.py"))}
        rows += [[str(path.relative_to(ROOT)), str(size), "", ""] for path, size in sizes.items()]
        total = sum(sizes.values())
        verdict = "held" if total <= bar else f"missed by {total - bar}"
        rows.append([f"{folder}, all of it", str(total), f"{bar}", verdict])
    notes = ["Lines that are neither blank nor docstring; comments count."]
    record.publish(options, "core", "The core's size", ["file", "lines", "bar", ""], rows, notes, section="Size")


if __name__ == "__main__":
    main()

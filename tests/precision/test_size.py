"""The extension stays small: lines that are code, without blank lines, comments and docstrings."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "extensions" / "precision" / "hal_precision"
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold a token of code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body:
            first = body[0]
            if ast.get_docstring(node, clean=False) is not None:
                found.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(found)


def test_lines_of_code_are_counted_without_docstrings_and_comments() -> None:
    source = (
        '"""Of a module."""\n\n# a comment\ndef f(x):\n    """Of a function."""\n    return g(\n        x,\n    )\n'
    )
    assert code_lines(source) == 4


def test_the_extension_is_no_larger_than_its_bar() -> None:
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in FOLDER.rglob("*.py")) <= 2500

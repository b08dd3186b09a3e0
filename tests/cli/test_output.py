"""What is printed: tables that fit the terminal, JSON that every parser reads, progress on standard error."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
from hal_cli import output
from hal_cli.parser import CommandParser
from hal_cli.progress import Progress

from hal_core.plugin_api import CommandResult, Table

LONG = "one or two words, and a_rather_long_name_that_cannot_be_broken behind them"
ROWS = [["lightmatter:0", "simulated", LONG, "2.0 GiB"], ["cpu:0", "hardware", "short", "-"]]


def printed(capsys: pytest.CaptureFixture[str], table: Table) -> list[str]:
    capsys.readouterr()
    output.show_table(table)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_table_fits_and_breaks_no_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    note = "A sentence below the table that is longer than a narrow terminal is wide, so that it has to be continued."
    table = Table("A title", ["device", "kind", "what it is", "memory"], ROWS, [note])
    lines = printed(capsys, table)
    longest = max(len(word) for row in ROWS for cell in row for word in cell.split())
    assert max(map(len, lines)) <= max(width, longest + len("  what it is  "))
    words = " ".join(lines).split()
    for text in ("A title", *table.columns[1:], *(cell for row in ROWS for cell in row), note):
        assert set(text.split()) <= {*words, "-"}, f"a word of {text!r} is broken or missing"


def test_wide_rows_become_paragraphs_when_columns_cannot_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    lines = printed(capsys, Table("", ["device", "kind", "what", "memory"], ROWS))
    assert lines[0] == "lightmatter:0"
    assert "  kind    simulated" in lines
    assert "  memory  2.0 GiB" in lines


@pytest.mark.parametrize(
    ("lines", "room", "widths"),
    [
        ([["a", "b"], ["aaaa", "bb"]], 8, [4, 2]),
        ([["a", "b"], ["aa aa aa", "bb"]], 10, [6, 2]),
        ([["a", "b"], ["aaaaaaaa", "b b b"]], 12, [8, 2]),
        ([["a", "b"], ["aaaaaaaa", "bbbb"]], 12, None),
        ([["a"]], 0, None),
        ([[]], 10, []),
    ],
)
def test_columns_are_narrowed_to_their_longest_word(lines: list[list[str]], room: int, widths: Any) -> None:
    assert output.column_widths(lines, room) == widths


def test_sentences_are_broken_between_words_and_keep_their_indent() -> None:
    text = "  head_dim  80 asked, 32 or 64 offered  -> pad to 96 and call again"
    lines = output.wrapped(text, 40).splitlines()
    assert lines[0].startswith("  head_dim  80 asked")
    assert all(line.startswith("    ") for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert output.wrapped("a\n\nb", 40) == "a\n\nb"


def test_json_has_no_nan() -> None:
    data = {"a": [1.5, math.nan, {"b": math.inf}], "c": frozenset({"y", "x"}), 3: (None, True)}
    assert json.loads(output.to_json(data), parse_constant=pytest.fail) == {
        "a": [1.5, None, {"b": None}],
        "c": ["x", "y"],
        "3": [None, True],
    }


def parser() -> CommandParser:
    made = CommandParser(prog="hal")
    commands = made.add_subparsers()
    commands.add_parser("flat").set_defaults(run=print)
    group = commands.add_parser("group").add_subparsers(required=True)
    group.add_parser("deep").set_defaults(run=print)
    own = group.add_parser("own")
    own.set_defaults(run=print)
    own.add_argument("--json", action="store_true", help="its own")
    made.complete()
    return made


@pytest.mark.parametrize("words", [["flat"], ["group", "deep"], ["group", "own"]])
def test_every_command_takes_json_without_asking_for_it(words: list[str]) -> None:
    assert parser().parse_args([*words, "--json"]).json is True
    options = parser().parse_args(words)
    assert options.json is False
    assert options.command == " ".join(["hal", *words])


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 5.5, 6.0, 11.0])
    monkeypatch.setattr("hal_cli.progress.time.monotonic", lambda: next(now))
    with Progress("hal work") as progress:
        for place, text in enumerate(("early", "first", "soon after", "second")):
            progress(text, place / 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hal work:  25%  first\nhal work:  75%  second\n"


def test_progress_on_a_terminal_is_a_bar_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("hal work") as progress:
        progress("half way", 0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hal work: half way" in err


def test_a_result_is_tables_then_sentences_or_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    result = CommandResult({"x": 1}, [Table("T", ["c"], [["cell"]])], ["a sentence"])
    output.show(result, as_json=False)
    out = capsys.readouterr().out
    assert out.index("T") < out.index("cell") < out.index("a sentence")
    output.show(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"x": 1}

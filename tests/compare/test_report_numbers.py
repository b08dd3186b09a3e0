"""One number, one value: the page's conclusion, tables and charts, the CSV and JSON files and the terminal agree."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hal_cli import main
from hal_compare import figures
from hal_compare.result import Figure

from hal_core import Basis, Provenance

from .test_demo import needs_weights

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "texts"
#: Column of a table: where the figure is in the JSON data, its name in the CSV file, and how it is written.
VARIED = {
    ("error", "error"): ("accuracy worst", "error_worst_text", figures.ratio),
    ("error", "worst"): ("accuracy worst", "error_worst_text", figures.ratio),
    ("error", "mean"): ("accuracy mean", "error_mean", figures.ratio),
    ("time", "time"): ("costs on_device", "device_seconds", figures.seconds),
    ("time", "device's part"): ("costs on_device", "device_seconds", figures.seconds),
    ("time", "host's part"): ("costs remainder", "host_rest_seconds", figures.seconds),
    ("time", "run"): ("costs wall", "run_seconds", figures.seconds),
    ("energy", "energy"): ("costs energy", "device_joules", figures.joules),
    ("energy", "energy on it"): ("costs energy", "device_joules", figures.joules),
}


_CELLS = {"measured", "modelled", "declared", "none", "badge"}


class Page(HTMLParser):
    """The page's tables as {caption: {row: {column: text}}}, its charts' rows and the labels of its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, dict[str, dict[str, str]]] = {}
        self.values: list[tuple[str, str]] = []
        self.pictures: list[str] = []
        self.conclusion = ""
        self._into: Callable[[str], None] | None = None
        self._caption, self._columns, self._row = "", [""], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        named = dict(attributes)
        if named.get("role") == "img":
            self.pictures.append(named["aria-label"])
        self._into = None
        kinds = (named.get("class") or "").split()
        if tag == "caption":
            self._caption, self._columns, self._into = "", [], self._title
        elif tag == "th" and named["scope"] == "col":
            self._columns.append("")
            self._into = self._column
        elif tag == "button" and "fold" not in kinds:
            self._into = self._column
        elif tag == "th":
            self._row, self._into = "", self._name
        elif tag == "td":
            self._cell = named["data-label"]
            self.tables[self._caption].setdefault(self._row, {})[self._cell] = ""
            self._into = self._fill
        elif tag == "span" and self._caption and (not kinds or _CELLS & set(kinds)):
            self._into = self._fill
        elif tag == "span" and "swatch" in kinds:
            self._into = self._name if self._caption else None
        elif tag == "span" and kinds in (["what"], ["value"]):
            self._into = self._label if kinds == ["what"] else self._value
        elif tag == "p" and kinds == ["conclusion"]:
            self._into = self._said

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._into == self._name:
            return
        if tag == "table":
            self._caption = ""
        self._into = None if tag != "span" else self._into

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into(data)

    def _title(self, text: str) -> None:
        self._caption = text
        self.tables[text] = {}

    def _column(self, text: str) -> None:
        self._columns[-1] += text

    def _name(self, text: str) -> None:
        self._row += text

    def _fill(self, text: str) -> None:
        self.tables[self._caption][self._row][self._cell] += text

    def _label(self, text: str) -> None:
        self.values.append((text, ""))

    def _value(self, text: str) -> None:
        self.values[-1] = self.values[-1][0], text

    def _said(self, text: str) -> None:
        self.conclusion += text


def printed_tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The tables of a wide terminal."""
    lines = [line.rstrip() for line in text.splitlines()]
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for number, line in enumerate(lines):
        if line.startswith("──"):
            head, title = lines[number - 1], lines[number - 2]
            starts = [match.start() for match in re.finditer(r"(?<!\S)\S+(?: \S+)*", head)]
            columns = re.split(r"\s{2,}", head.strip())
            rows: dict[str, dict[str, str]] = {}
            for body in lines[number + 1 :]:
                if not body:
                    break
                ends = [*starts[1:], None]
                cells = [body[start:end].strip() for start, end in zip(starts, ends, strict=True)]
                rows[cells[0]] = dict(zip(columns[1:], cells[1:], strict=True))
            tables[title] = rows
    return tables


def from_json(found: Any) -> Figure | None:
    if found is None:
        return None
    return Figure(found["middle"], found["low"], found["high"], Basis(found["basis"]), Provenance(found["provenance"]))


def from_csv(line: dict[str, str], name: str) -> Figure | None:
    if not line[name]:
        return None
    low, middle, high = (float(line[key]) for key in (f"{name}_low", name, f"{name}_high"))
    return Figure(middle, low, high, Basis(line[f"{name}_basis"]), Provenance(line[f"{name}_provenance"]))


def written(figure: Figure | None, show: Callable[[float], str]) -> str:
    return figures.NOT_AVAILABLE if figure is None else figures.varied(figure, show)


def check(arguments: list[str], target: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the command and hold all that it gave against each other."""
    capsys.readouterr()
    assert main(["compare", *arguments, "--details", "--report", str(target)]) == 0
    terminal = capsys.readouterr().out
    page = Page(target.read_text(encoding="utf-8"))
    data = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    with open(target.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    rows = {row["name"]: row for row in data["rows"]}
    assert list(lines) == list(rows)

    tables = printed_tables(terminal)
    families = page.tables.pop("Each family of devices, with its variants")
    (summary,) = [title for title in tables if "per device" in title]
    printed = tables.pop(summary)
    assert families == printed, "the first table of the page is the terminal's"
    assert page.tables == tables, "the other tables of the page are those of --details"
    assert len(tables) == 4

    seen = 0
    for title, table in {"By family": families, **page.tables}.items():
        for name, cells in table.items():
            row, line = (found(name, each) for each in (rows, lines)) if title != "Text" else (None, None)
            for (_, column), (path, in_csv, show) in VARIED.items():
                if row is None or line is None or column not in cells or not row["ran"]:
                    continue
                part, field = path.split()
                want = written(from_json(row[part][field]), show)
                assert cells[column] == want, f"{title}, {name}, {column}"
                assert written(from_csv(line, in_csv), show) == want
                seen += 1
    ran = [name for name, row in rows.items() if row["ran"]]
    assert seen == 9 * len(ran)

    charted = [value for value in page.values if not value[1].endswith("%") or "±" in value[1]]
    for path, show in (
        (("accuracy", "worst"), figures.ratio),
        (("costs", "on_device"), figures.seconds),
        (("costs", "remainder"), figures.seconds),
    ):
        for name in ran:
            want = written(from_json(rows[name][path[0]][path[1]]), show)
            assert any(label.startswith(name.split(" ")[0]) and text == want for label, text in charted), (name, path)
    plots = " ".join(picture for picture in page.pictures if picture.startswith("error of the worst text against"))
    for name in ran:
        assert figures.ratio(rows[name]["accuracy"]["worst"]["middle"]) in plots
        assert figures.seconds(rows[name]["costs"]["on_device"]["middle"]) in plots
    numbers = re.findall(r"\((?:error )?([^,()]+?)(?: of [a-z]|[,)])", page.conclusion)
    everywhere = {text for cells in families.values() for text in cells.values()}
    quoted = [number for number in numbers if number[0].isdigit()]
    assert quoted
    assert set(quoted) <= everywhere, "the conclusion has a number that no table has"
    assert page.conclusion in " ".join(terminal.split())
    return data


def found(title: str, rows: dict[str, Any]) -> Any:
    """The row of a title, which is its name with the profile in it."""
    return next(row for name, row in rows.items() if set(name.split()) <= set(title.split()))


def test_every_number_is_the_same_everywhere(encoder, text, device, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    noisy = device("noisy", noise=1e-2, joules=1e-12)
    arguments = [str(encoder), "--text", str(text), "--devices", f"cpu:0,{noisy}", "--repeats", "2"]
    data = check([*arguments, "--assume-power", "65"], tmp_path / "a.html", capsys)
    assert data["assumed_power"] == 65


@needs_weights
def test_every_number_is_the_same_everywhere_in_a_run_of_the_demo(capsys, tmp_path, monkeypatch):
    """The demo's model on a few of its texts, with a device of each kind of noise and timing."""
    monkeypatch.setenv("COLUMNS", "300")
    few = tmp_path / "texts.txt"
    few.write_text("\n\n".join((DEMO / "sentences.txt").read_text(encoding="utf-8").splitlines()[:4]), encoding="utf-8")
    arguments = ["minilm", "--text", str(few), "--devices", "cpu:0,kpu:0,lightmatter:0", "--max-length", "12"]
    data = check([*arguments, "--repeats", "2"], tmp_path / "out" / "a.html", capsys)
    assert {row["repeats"] for row in data["rows"] if row["name"] == "lightmatter:0"} == {2}
    trace = json.loads((tmp_path / "out" / "a.kpu-0.trace.json").read_text(encoding="utf-8"))
    assert len(trace["traceEvents"]) > 20
    assert trace["otherData"]["fidelity"] == "simulated"

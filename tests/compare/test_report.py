"""The HTML report: self-contained, complete, honest, and never half written."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import attrs
import pytest
from hal_compare import charts, figures, lanes, measure, models, report, scale, texts
from hal_compare.result import Figure
from hal_compare.timelines import Timeline

from hal_core import Basis, MaskKind, Provenance

from . import comparisons


@pytest.fixture
def result(encoder, text, device):
    noisy = device("noisy", noise=1e-2, joules=1e-12)
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    return measure.compare(
        models.load(str(encoder), "float32"),
        texts.read([text]),
        lanes.rows_for(["cpu:0", noisy, bare]),
        repeats=2,
        batch_size=4,
        max_length=None,
        command="hal compare <model> & more",
    )


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page refers to."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(result):
    text = report.render(result)
    page = Page(text)
    assert not page.references
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    for outside in ("http:", "https:", "@import", "url(", "//cdn"):
        assert outside not in text
    assert "prefers-color-scheme: dark" in text


def test_its_policy_lets_nothing_in_but_its_own_script(result):
    text = report.render(result)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert text.count("<script") == 1
    assert not re.search(r"<[^>]* on[a-z]+=", text)


def test_it_opens_with_the_conclusion_and_the_comparison(result):
    from hal_compare.conclusion import conclusion

    page = Page(report.render(comparisons.every_family()))
    said = conclusion(comparisons.every_family())
    order = [page.text.index(part) for part in (said, "Error against time", "Error against energy", "By family")]
    assert order == sorted(order)
    assert page.text.count("Error against") == 4, (
        "attention, and attention with linear layers; one compiled row is no chart"
    )


def test_the_page_holds_every_row_number_origin_version_and_the_command(result):
    page = Page(report.render(result))
    assert "hal compare <model> & more" in page.text
    for row in result.rows:
        assert row.name in page.text
    assert "modelled, paper-projection" in page.text
    assert "not available" in page.text
    assert "boolean asked" in page.text
    for name, number in result.versions.items():
        assert f"{name} version" in page.text
        assert number in page.text
    noisy = next(row for row in result.rows if row.name == "noisy:0")
    assert figures.ratio(noisy.accuracy.worst.middle) in page.text
    assert figures.joules(noisy.costs.energy.middle) in page.text
    assert figures.seconds(noisy.costs.on_device.middle) in page.text
    assert figures.seconds(noisy.costs.remainder.middle) in page.text
    assert result.groups[0].sha256 in page.text


def test_names_cannot_inject_markup(result):
    rows = tuple(attrs.evolve(row, name="<script>x</script>") for row in result.rows)
    evil = attrs.evolve(result, rows=rows, model={**result.model, "note": "<b>", "name": "<img src=x>"})
    page = Page(report.render(evil, [report.Beside("<img>", "<img>")]))
    assert page.tags.count("script") == 1, "its own"
    assert "img" not in page.tags


def test_the_report_and_the_files_beside_it_take_their_places_whole_or_not_at_all(result, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    trace = Timeline("kpu:0", "attention", {"traceEvents": []})
    refused = Timeline("npu:0", "attention", None, "too many spans")
    written = report.write(result, target, {"format": 1}, [trace, refused])
    assert [path.name for path in written] == ["report.html", "report.csv", "report.json", "report.kpu-0.trace.json"]
    whole = {path: path.read_text(encoding="utf-8") for path in written}
    assert whole[target].endswith("</html>\n")
    page = Page(whole[target])
    assert page.references == ["report.csv", "report.json", "report.kpu-0.trace.json"]
    assert "no timeline of npu:0: too many spans" in page.text
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in written)
    assert json.loads(whole[tmp_path / "report.json"]) == {"format": 1}
    assert json.loads(whole[tmp_path / "report.kpu-0.trace.json"]) == {"traceEvents": []}

    real = os.replace

    def fails(source, place):
        if str(place).endswith(".html"):
            raise OSError("midway")
        real(source, place)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="midway"):
        report.write(result, target)
    assert target.read_text(encoding="utf-8") == whole[target]

    def breaks(comparison, beside):
        raise RuntimeError("before")

    monkeypatch.setattr(report.files, "render", breaks)
    with pytest.raises(RuntimeError, match="before"):
        report.write(result, target)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".txt" and path.is_file()} == {
        path.name for path in written
    }, "nothing half written is left"


def test_a_report_takes_the_place_of_an_earlier_one(result, tmp_path):
    target = tmp_path / "a.html"
    for _ in range(2):
        report.check_target(target)
        report.write(result, target)


def test_without_data_the_json_file_holds_the_comparison(result, tmp_path):
    report.write(result, tmp_path / "a.html")
    data = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in data["rows"]] == [row.name for row in result.rows]


def test_the_csv_file_has_a_line_a_row_and_every_figure_with_its_origin(result, tmp_path):
    report.write(result, tmp_path / "a.html")
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row.name for row in result.rows]
    by_name = {line["row"]: line for line in lines}
    noisy = next(row for row in result.rows if row.name == "noisy:0")
    assert float(by_name["noisy:0"]["device_joules"]) == noisy.costs.energy.middle
    assert float(by_name["noisy:0"]["error_worst_text_high"]) == noisy.accuracy.worst.high
    assert by_name["noisy:0"]["device_seconds_basis"] == "modelled"
    assert by_name["noisy:0"]["device_seconds_source"] == "a test"
    assert by_name["cpu:0"]["device_joules"] == "", "nothing is guessed"
    assert "boolean asked" in by_name["bare:0"]["refusals"]


def test_a_host_time_is_added_to_no_modelled_time_and_ranks_nothing():
    result = comparisons.every_family()
    text = report.render(result)
    kpu = next(row for row in result.rows if row.name == "kpu:0")
    assert figures.seconds(kpu.costs.total.middle) not in Page(text).text
    for column in ("host's part", "run", "its part of the run"):
        name = column.replace("'", "&#x27;")
        assert f'class="plain">{name}</th>' in text, f"{column} has no button to sort by"


def test_a_page_where_nothing_ran_still_says_why(encoder, text, device):
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    result = measure.compare(
        models.load(str(encoder), "float32"),
        texts.read([text]),
        lanes.rows_for([bare]),
        repeats=1,
        batch_size=4,
        max_length=None,
        command="hal compare",
    )
    only = attrs.evolve(result, rows=tuple(row for row in result.rows if not row.ran))
    assert "boolean asked" in Page(report.render(only)).text


def figure(middle, low=None, high=None, basis=Basis.MEASURED):
    provenance = Provenance.MEASURED_SILICON
    return Figure(middle, middle if low is None else low, middle if high is None else high, basis, provenance)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123, "1.23 ms"),
        (0.0009996, "1 ms"),
        (0.99999, "1 s"),
        (12.34, "12.3 s"),
        (1234.5, "1234 s"),
        (0, "0 s"),
        (3.2e-13, "0.32 ps"),
        (2.5e-6, "2.5 µs"),
    ],
)
def test_seconds_are_written_with_three_digits(value, text):
    assert figures.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "100%"), (0.99999, "> 99.9%"), (0.5, "50.0%"), (0, "0%"), (1e-5, "< 0.1%"), (0.175, "17.5%")],
)
def test_shares_say_all_only_where_it_is_all(value, text):
    assert figures.percent(value) == text


def test_spread_is_shown_where_there_is_one():
    assert figures.varied(figure(2.0, 1.9, 2.1), figures.seconds) == "2 s ±5%"
    assert figures.varied(figure(2.0), figures.seconds) == "2 s"
    assert figures.ranged(figure(2e-3, 1.9e-3, 2.1e-3), figures.seconds) == "2 ms (1.9 to 2.1 ms)"
    assert figures.interval(figure(1.0, 0.9, 1.1), figures.seconds) == "900 ms to 1.1 s"
    assert figures.interval(figure(1.0), figures.seconds) == ""


def test_charts_draw_zero_infinitely_small_and_absent_values():
    marks = [
        charts.Mark(label="a", parts=(figure(0.0), figure(0.0))),
        charts.Mark(label="b", parts=(figure(1e-7), figure(1e-2))),
    ]
    for picture in (
        charts.dots(marks, "errors"),
        charts.bars([charts.Mark(label="c", note="none")], figures.seconds, "times"),
        charts.bars([charts.Mark(label="d", parts=(figure(0.0),))], figures.seconds, "times"),
        charts.lines([(marks[0], [0.0, 0.0]), (marks[1], [1e-8, 1e-2])], "layers"),
        charts.shares([("e", "neutral", 0.0), ("f", 1, 1.0)], "shares"),
    ):
        assert "nan" not in picture
        assert "inf" not in picture
        Page(picture)


@pytest.mark.parametrize(("value", "step"), [(0.9, 1), (1, 1), (1.1, 2), (3, 5), (7, 10), (0.03, 0.05)])
def test_axis_steps_are_round(value, step):
    assert scale.nice_step(value) == pytest.approx(step)

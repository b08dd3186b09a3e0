"""A comparison as one self-contained HTML file: no script, no font, no request to anywhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from hal_core import Basis, Fidelity, HalError

from . import charts, layers_report, tables
from .charts import Mark, bars, colour, dots, lines, shares
from .figures import NOT_AVAILABLE, cosine, interval, joules, macs, percent, plain, ratio, seconds
from .result import Comparison, Figure, Row
from .tables import file_names, headline, mask_hint, refusal

STYLE = Path(__file__).with_name("report.css")


def check_target(path: Path) -> None:
    """Make the report's folder, and raise HalError where the report could not be written, before anything long runs."""
    if path.is_dir():
        raise HalError(f"the report {path} is a folder: give a file name, for example {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise HalError(f"the report {path} cannot be written ({error.strerror}): give another place") from error


def write(comparison: Comparison, path: Path) -> None:
    """Write the report. A reader never sees half of it: it is written beside its place and renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(comparison))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def render(comparison: Comparison) -> str:
    """The whole page."""
    ran = [row for row in comparison.rows if row.ran]
    parts = [_header(comparison)]
    if ran:
        parts += [_cards(comparison, ran), _charts(comparison, ran), layers_report.section(comparison)]
        parts += [_tables(comparison, ran)]
    parts += [_refused(comparison), _terms(comparison), _origins(comparison)]
    title = escape(f"hal compare: {comparison.model['name']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style></head>'
        f"<body>{_HATCH}<main>{''.join(parts)}</main></body></html>\n"
    )


_HATCH = (
    '<svg class="defs" aria-hidden="true"><defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="3" height="7" style="fill:var(--hatch)"/></pattern></defs></svg>'
)


def _header(comparison: Comparison) -> str:
    model = comparison.model
    texts = sum(group.texts for group in comparison.groups)
    share = sum(group.attention_macs for group in comparison.groups) / comparison.macs
    grouped = (
        f"{model['heads']}/{model['key_value_heads']}" if model["key_value_heads"] != model["heads"] else model["heads"]
    )
    facts = [
        (f"{model['layers']}", "layers"),
        (f"{grouped} x {model['head_dim']}", "heads x head size"),
        (f"{model['parameters'] / 1e6:.3g} M", f"parameters, stored as {model['stored_dtype']}"),
        (model["dtype"], "run in"),
        (f"{texts}", "texts"),
        (f"{comparison.tokens:,}", "tokens"),
        (macs(comparison.macs), "in one pass"),
        (percent(share), "of it attention"),
    ]
    listed = "".join(f"<li><b>{escape(str(value))}</b><span>{escape(what)}</span></li>" for value, what in facts)
    note = f'<p class="note">{escape(model["note"])}</p>' if model["note"] else ""
    lead = headline(comparison).partition(": ")[2]
    return (
        f'<p class="kicker">hal compare · {escape(comparison.created.replace("T", " ").replace("+00:00", " UTC"))}</p>'
        f"<h1>{escape(Path(model['name']).name)}</h1>"
        f'<p class="lead">{escape(lead)}. Every number is marked with its origin.</p>{note}'
        f'<ul class="facts">{listed}</ul>'
    )


def _colours(ran: Sequence[Row]) -> dict[str, int]:
    """Grey for torch's own attention, a colour for each device."""
    devices = [row.name for row in ran if not row.baseline]
    return {row.name: 0 if row.baseline else 1 + devices.index(row.name) % 7 for row in ran}


def _cards(comparison: Comparison, ran: Sequence[Row]) -> str:
    cards, tones = "", _colours(ran)
    for row in ran:
        assert row.accuracy is not None
        assert row.costs is not None
        energy = (
            f'<span class="none">{NOT_AVAILABLE}</span>'
            if row.costs.energy is None
            else joules(row.costs.energy.middle)
        )
        what = tables.task(comparison)
        cards += (
            f'<div class="card" style="--tone:{colour(tones[row.name])}"><header><b>{escape(row.name)}</b>'
            f'<span class="badge {row.fidelity}">{row.fidelity}</span></header><dl>'
            f'<dt>worst error</dt><dd class="big">{ratio(row.accuracy.worst.middle)}</dd>'
            f"<dt>{what}</dt><dd>{percent(row.accuracy.agreement.middle)}</dd>"
            f"<dt>time, whole model</dt><dd>{seconds(row.costs.total.middle)}</dd>"
            f"<dt>time, its part</dt><dd>{seconds(row.costs.on_device.middle)}</dd>"
            f"<dt>energy, its part</dt><dd>{energy}</dd></dl>"
            f"<p>time of {escape(row.scope)} {_badge(row.costs.on_device)}</p></div>"
        )
    return f'<h2>At a glance</h2><div class="cards">{cards}</div>'


def _charts(comparison: Comparison, ran: Sequence[Row]) -> str:
    figures = [
        _error_chart(ran),
        _time_chart(ran),
        _energy_chart(ran),
        _layer_chart(ran),
        _share_chart(comparison, ran),
    ]
    return f'<h2>Side by side</h2><div class="charts">{"".join(figures)}</div>'


def _figure(title: str, text: str, picture: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{title}</h3><p>{text}</p>{picture}{below}</figure>"


def _error_chart(ran: Sequence[Row]) -> str:
    tones, marks = _colours(ran), []
    for row in ran:
        assert row.accuracy is not None
        found = row.accuracy
        marks.append(
            Mark(
                label=row.name,
                colour=tones[row.name],
                modelled=found.worst.basis is not Basis.MEASURED,
                parts=(found.mean, found.worst),
                text=ratio(found.worst.middle),
            )
        )
    picture = dots(marks, "relative error of the hidden states by device")
    return _figure(
        "Error",
        "‖h - reference‖ / ‖reference‖ of a text's last hidden states, against the float64 run",
        picture,
        "Hollow: mean over texts. Filled: worst text. Bars: range over repeats. Dashed: a simulator's error model.",
    )


def _time_chart(ran: Sequence[Row]) -> str:
    tones, marks, line = _colours(ran), [], None
    for row in ran:
        assert row.costs is not None
        costs = row.costs
        line = costs.total.middle if row.baseline and line is None else line
        marks.append(
            Mark(
                label=row.name,
                colour=tones[row.name],
                modelled=costs.on_device.basis is not Basis.MEASURED,
                parts=(costs.remainder, costs.on_device),
                text=seconds(costs.total.middle),
            )
        )
    picture = bars(marks, seconds, "seconds of one pass by device", line=line)
    key = (
        f'<span class="key" style="background:{colour("neutral")}"></span>the rest of the model, on the host '
        f'<span class="key" style="background:{colour(1)}"></span>the device\'s part. '
        "Hatched: modelled. Dashed line: torch today."
    )
    return _figure("Time of one pass", "The whole model over all text", picture, key)


def _energy_chart(ran: Sequence[Row]) -> str:
    tones, marks = _colours(ran), []
    for row in ran:
        assert row.costs is not None
        energy = row.costs.energy
        marks.append(
            Mark(
                label=row.name,
                colour=tones[row.name],
                modelled=energy is not None and energy.basis is not Basis.MEASURED,
                parts=() if energy is None else (energy,),
                text="" if energy is None else joules(energy.middle),
                note="not available: no meter, no published power",
            )
        )
    picture = bars(marks, joules, "joules of each device's part")
    caption = "The host's energy for the rest of the model is not available: nothing here meters it."
    return _figure("Energy of the device's part", "What ran on the device, over all text", picture, caption)


def _layer_chart(ran: Sequence[Row]) -> str:
    tones, series = _colours(ran), []
    for row in ran:
        assert row.accuracy is not None
        modelled = row.accuracy.worst.basis is not Basis.MEASURED
        series.append((Mark(label=row.name, colour=tones[row.name], modelled=modelled), row.accuracy.layers))
    return _figure(
        "Error by layer", "Mean over texts, after the embeddings and after each layer", lines(series, "error by layer")
    )


def _share_chart(comparison: Comparison, ran: Sequence[Row]) -> str:
    tones = _colours(ran)
    rows: list[tuple[str, int | str, float]] = []
    names = file_names(comparison)
    for group in comparison.groups:
        name = names[group.name]
        rows.append((name, "neutral", group.attention_macs / group.macs))
        for row in ran:
            if row.baseline or (row.device is not None and row.device.fidelity != Fidelity.SIMULATED):
                costs = row.groups[group.name]
                rows.append((row.name, tones[row.name], costs.inside.middle / costs.wall.middle))
    return _figure(
        "How much of the model is attention",
        "Its share of the multiply-accumulates (grey), and of the measured time (coloured), by text file",
        shares(rows, "attention's share of work and time"),
    )


def _badge(figure: Figure) -> str:
    return f'<span class="badge {figure.basis}" title="{escape(figure.source)}">{escape(figure.origin)}</span>'


def _value(figure: Figure | None, show: Callable[[float], str]) -> str:
    if figure is None:
        return f'<span class="none">{NOT_AVAILABLE}</span>'
    between = f"<small>{escape(range_)}</small>" if (range_ := interval(figure, show)) else ""
    return (
        f'<span title="{escape(figure.source)}"><b>{escape(show(figure.middle))}</b>{between}'
        f'<small class="{figure.basis}">{escape(figure.origin)}</small></span>'
    )


def _counted(text: str) -> str:
    return f'<b>{escape(text)}</b><small class="measured">counted</small>'


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="box scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _tables(comparison: Comparison, ran: Sequence[Row]) -> str:
    causal = comparison.model["kind"] in ("causal", "seq2seq")
    accuracy, time, energy = [], [], []
    for row in ran:
        found, costs = row.accuracy, row.costs
        assert found is not None
        assert costs is not None
        device = row.device
        detail = "scaled_dot_product_attention" if device is None else f"{device.vendor} {device.model}".strip()
        badge = f"<span class='badge {row.fidelity}'>{row.fidelity}</span>"
        name = f"{escape(row.name)} {badge}<small>{escape(detail)}</small>"
        accuracy.append(
            [
                name,
                _value(found.worst, ratio),
                _value(found.mean, ratio),
                _value(found.cosine, cosine),
                _value(found.agreement, percent),
                *([_value(found.perplexity, plain)] if causal else []),
            ]
        )
        time.append(
            [
                name,
                *(
                    _value(figure, seconds)
                    for figure in (costs.wall, costs.inside, costs.remainder, costs.on_device, costs.total)
                ),
            ]
        )
        energy.append(
            [
                name,
                f"{costs.calls:,}",
                _counted(macs(costs.macs)),
                _counted(percent(comparison.share(row))),
                _value(costs.energy, joules),
                _value(None, joules),
                _value(None, joules),
            ]
        )
    task = _task(comparison, ran)
    reference = next((row.accuracy.reference_perplexity for row in ran if row.accuracy), None)
    of_reference = f" (the float64 run's perplexity: {plain(reference)})" if reference is not None else ""
    texts = [
        [
            escape(group.name),
            f"{group.texts}",
            f"{group.tokens:,}",
            f"{group.longest}",
            macs(group.macs),
            escape(percent(group.attention_macs / group.macs)),
        ]
        for group in comparison.groups
    ]
    return (
        "<h2>All numbers</h2>"
        + _table(
            f"Error against float64{of_reference}", ["device", "worst text", "mean", "lowest cosine", *task], accuracy
        )
        + _table(
            f"Time of one pass, median of {comparison.repeats} with the range",
            ["device", "wall", "its part", "the rest, on the host", "on the device", "total"],
            time,
        )
        + _table(
            "Work and energy of one pass",
            ["device", "calls", "work on it", "of the model", "energy on it", "of the rest", "total"],
            energy,
        )
        + _table("Text", ["file", "texts", "tokens", "longest", "model's work", "of it attention"], texts)
    )


def _task(comparison: Comparison, ran: Sequence[Row]) -> list[str]:
    """Columns of what the error does to the task."""
    decisions = next((row.accuracy.decisions for row in ran if row.accuracy), 0)
    columns = [f"{tables.task(comparison)}, of {decisions:,}"]
    return [*columns, "perplexity"] if comparison.model["kind"] in ("causal", "seq2seq") else columns


def _refused(comparison: Comparison) -> str:
    boxes = ""
    for row in comparison.rows:
        if not row.ran:
            reasons = "".join(f"<li>{escape(reason)}</li>" for reason in row.refusals)
            hint = f"<p>{escape(text)}</p>" if (text := mask_hint(row, comparison.batch_size)) else ""
            title = escape(refusal(row, comparison.batches))
            boxes += f'<div class="box refused"><h3>{title}</h3><ul>{reasons}</ul>{hint}</div>'
    return f"<h2>Did not run</h2>{boxes}" if boxes else ""


_TERMS = (
    ("measured", "read off a clock, or computed from values that really came out of the device."),
    (
        "modelled",
        "what a device's model says. The provenance names the figures behind it: measured silicon, a vendor's "
        "publication, a paper's projection, or an assumption.",
    ),
    (
        "hardware, emulated, simulated",
        "a real device; real values in the host's time; values, time and energy out of a model.",
    ),
    ("reference", "the same weights and text in float64 from end to end, eager attention, on the host."),
    ("torch sdpa", "the same model on torch's own scaled_dot_product_attention: what one has today."),
    ("its part", "attention; where a row says so also the linear layers, or all that torch.compile put on the device."),
    (
        "the rest, on the host",
        "wall time of the whole model less wall time in the device's part; measured on this host.",
    ),
    ("on the device", "time of its part; for a simulated device the time its model states, summed over the calls."),
    ("total", "the rest and the time on the device. Its origin is the worse of the two."),
    (
        "work",
        "multiply-accumulates of all matrix products, counted from the shapes, padding and masked pairs included.",
    ),
    ("not available", "no meter and no published power: nothing is guessed."),
)


def _terms(comparison: Comparison) -> str:
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in _TERMS)
    return f'<h2>How to read it</h2><div class="box"><dl class="terms">{listed}</dl></div>'


def _origins(comparison: Comparison) -> str:
    facts = {**comparison.machine, **{f"{name} version": number for name, number in comparison.versions.items()}}
    facts["run"] = f"{comparison.batches} batches of up to {comparison.batch_size} texts, {comparison.repeats} repeats"
    if comparison.model["pooling"]:
        facts["embedding"] = f"{comparison.model['pooling']} of the last hidden states; nearest by cosine"
    for group in comparison.groups:
        cut = f"; {group.cut} texts cut to {group.longest} tokens" if group.cut else ""
        facts[file_names(comparison)[group.name]] = f"sha256 {group.sha256}{cut}"
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<h2>Where it comes from</h2><div class="box"><pre>{escape(comparison.command)}</pre></div>'
        f'<div class="box"><dl class="terms">{listed}</dl></div>'
    )


__all__ = ["charts", "check_target", "render", "write"]

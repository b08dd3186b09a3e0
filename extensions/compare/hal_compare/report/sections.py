"""The page's sections of words: facts of the model, refusals, terms, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..families import family_name
from ..figures import macs, percent
from ..result import Comparison
from ..sentences import file_names, item, items, mask_hint, refusal

_TERMS = {
    "measured": "read off a clock, or computed from values that really came out of the device.",
    "modelled": "what a device's model says. The provenance names the figures behind it: measured silicon, a vendor's "
    "publication, a paper's projection, or an assumption.",
    "declared, assumed": "computed with a figure that the user assumed, and marked so. It is ranked with nothing.",
    "hardware, emulated, simulated": "a real device; real values in the host's time; values, time and energy out of a "
    "model.",
    "reference": "the same weights and {items} in float64 from end to end, eager attention, on the host.",
    "error": "‖h - reference‖ / ‖reference‖ of one {item}'s last hidden states. Where nothing else is said, of the "
    "worst {item}.",
    "torch sdpa": "the same model on torch's own scaled_dot_product_attention: what one has today.",
    "the device's part": "attention; where a row says so also the linear layers, or all that torch.compile put on the "
    "device.",
    "the host's part": "time of the whole run less time in the device's part; measured on this host.",
    "level with": "the intervals of two figures overlap, or both read the same.",
    "the number and its ±": "the median over runs, and half of their range; of a modelled figure the middle of its "
    "interval, and half of it. The CSV file has the ends of both.",
    "draws": "runs of a row. A device whose errors are random has a new draw of its noise in each, and all such "
    "devices have equally many.",
    "work": "multiply-accumulates of all matrix products, counted from the shapes, padding and masked pairs included.",
    "not available": "no meter and no published power: nothing is guessed.",
}


def facts(comparison: Comparison) -> str:
    """Sizes of the model and of what it ran on."""
    model = comparison.model
    texts = sum(group.texts for group in comparison.groups)
    share = sum(group.attention_macs for group in comparison.groups) / comparison.macs
    heads, grouped = model["heads"], model["key_value_heads"]
    shown = [
        (f"{model['layers']}", "layers"),
        (f"{heads if grouped == heads else f'{heads}/{grouped}'} x {model['head_dim']}", "heads x head size"),
        (f"{model['parameters'] / 1e6:.3g} M", f"parameters, stored as {model['stored_dtype']}"),
        (model["dtype"], "run in"),
        (f"{texts}", items(comparison)),
        (f"{comparison.tokens:,}", "tokens"),
        (macs(comparison.macs), "in one pass"),
        (percent(share), "of it attention"),
    ]
    listed = "".join(f"<li><b>{escape(str(value))}</b> <span>{escape(what)}</span></li>" for value, what in shown)
    return f'<ul class="facts">{listed}</ul>'


def refused(comparison: Comparison) -> str:
    """The rows that did not run, with every reason."""
    boxes = ""
    for row in comparison.rows:
        if not row.ran:
            reasons = "".join(f"<li>{escape(reason)}</li>" for reason in row.refusals)
            hint = f"<p>{escape(text)}</p>" if (text := mask_hint(row, comparison.batch_size)) else ""
            head = escape(refusal(row, comparison.batches))
            boxes += f'<div class="box refused"><h3>{head}</h3><ul>{reasons}</ul>{hint}</div>'
    return f"<section><h2>Did not run</h2>{boxes}</section>" if boxes else ""


def terms(comparison: Comparison) -> str:
    """What the words mean."""
    meant = {word: said.format(item=item(comparison), items=items(comparison)) for word, said in _TERMS.items()}
    return f"<section><h2>How to read it</h2>{_folded('Terms', _listed(meant))}</section>"


def provenance(comparison: Comparison) -> str:
    """The command, the machine, the versions, the files and the sources of the figures."""
    about = {**comparison.machine, **{f"{name} version": number for name, number in comparison.versions.items()}}
    about["run"] = f"{comparison.batches} batches of up to {comparison.batch_size} {items(comparison)}"
    about["run"] += f", {comparison.repeats} repeats"
    if comparison.model["pooling"]:
        about["embedding"] = f"{comparison.model['pooling']} of the last hidden states; nearest by cosine"
    for group in comparison.groups:
        cut = f"; {group.cut} {items(comparison)} cut to {group.longest} tokens" if group.cut else ""
        about[file_names(comparison)[group.name]] = f"sha256 {group.sha256}{cut}"
    sources = _sources(comparison)
    return (
        f'<section><h2>Where it comes from</h2><div class="box"><pre>{escape(comparison.command)}</pre></div>'
        f"{_folded('Sources of the figures, by family', _listed(sources)) if sources else ''}"
        f"{_folded('Machine, versions and files', _listed(about))}</section>"
    )


def _sources(comparison: Comparison) -> dict[str, str]:
    """The sources that figures of time and energy name, by family."""
    found: dict[str, dict[str, None]] = {}
    for row in comparison.rows:
        if row.costs is not None:
            for what, figure in (("time", row.costs.on_device), ("energy", row.costs.energy)):
                for source in figure.source.split("; ") if figure is not None and figure.source else ():
                    found.setdefault(f"{family_name(row)}, {what}", {})[source] = None
    return {name: "; ".join(sources) for name, sources in found.items()}


def _folded(summary: str, inside: str) -> str:
    return f'<details class="box"><summary>{escape(summary)}</summary>{inside}</details>'


def _listed(pairs: Mapping[str, str]) -> str:
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in pairs.items())
    return f'<dl class="terms">{listed}</dl>'

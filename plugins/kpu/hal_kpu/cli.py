"""`hal kpu`: profiles, products, attention, timelines and a model's coverage.

Commands return data; whoever called them prints it. What is heavy is imported when a command runs.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import CommandResult, ContractError, HalError, Table

if TYPE_CHECKING:
    from hal_core.plugin_api import AttentionRequest

    from .profiles.profile import Profile
    from .simulator.report import Report
    from .simulator.stats import ExecutionStats

_SHAPE = "1,8,512,64"
_DTYPES = ("float32", "bfloat16", "float16")
_PRODUCTS = ("float32", "float16", "int8", "int32")
_FIDELITIES = ("transactional", "cycle_accurate")
_PICTURES = (".png", ".svg", ".pdf")


def add_commands(subparsers: Any) -> None:
    """Add `kpu` to the subparsers of `hal`."""
    text = "the simulated KPU: products, attention, timelines, a model's coverage"
    parent = subparsers.add_parser("kpu", help=text, description=text)
    commands = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)
    yes = {"action": "store_true"}
    machine = (
        "--profile",
        {"metavar": "NAME|FILE", "help": "of the machine (default HAL_KPU_PROFILE, or t64)"},
    )
    memory = (
        "--profile",
        {"metavar": "NAME|FILE", "help": "whose memories one array has (default: t32x32's, grown with it)"},
    )
    dtype = ("--dtype", {"default": "float32", "choices": _DTYPES, "help": "of the operands (default %(default)s)"})
    kind = ("--dtype", {"default": "float32", "choices": _PRODUCTS, "help": "of the operands (default %(default)s)"})
    plot = ("--plot", {"type": Path, "metavar": "FILE", "help": "draw roofline and energy to a PNG, SVG or PDF file"})
    fidelity = ("--fidelity", {"default": "transactional", "choices": _FIDELITIES, "help": "(default %(default)s)"})
    whole = {"type": int, "metavar": "N"}
    shape: list[tuple[str, dict[str, Any]]] = [
        ("--shape", {"default": _SHAPE, "help": "batch,heads,length,head_dim (default %(default)s)"}),
        ("--kv-heads", whole | {"help": "key/value heads (default: as many as query heads)"}),
        ("--kv-length", whole | {"help": "keys (default: as many as queries)"}),
        ("--causal", yes),
    ]
    array: list[tuple[str, dict[str, Any]]] = [
        ("--rows", whole | {"default": 32, "help": "of the array (default %(default)s)"}),
        ("--cols", whole | {"default": 32, "help": "of the array (default %(default)s)"}),
        (
            "--dataflow",
            {
                "default": "os",
                "choices": ("os", "ws", "is"),
                "help": "what stays in the array: outputs, weights or inputs (default %(default)s)",
            },
        ),
    ]
    size: list[tuple[str, dict[str, Any]]] = [(name, {"type": int}) for name in "MNK"]
    table: tuple[tuple[Any, str, str, list[tuple[str, dict[str, Any]]]], ...] = (
        (
            _profile,
            "profile",
            "check a profile and show where each figure is from",
            [("profile", {"metavar": "NAME|FILE", "help": "a bundled profile, or a TOML file"})],
        ),
        (
            _gemm,
            "gemm",
            "cycles, energy and roofline of a matrix product",
            [*size, *array, memory, kind, fidelity, plot],
        ),
        (
            _attention,
            "attention",
            "attention fused on the chip against scores that go through DRAM",
            [*shape, machine, dtype, fidelity, plot],
        ),
        (
            _trace,
            "trace",
            "write a timeline as Chrome trace JSON, for ui.perfetto.dev",
            [
                ("--gemm", {"metavar": "M,N,K", "help": "trace this product on one array instead of attention"}),
                *shape,
                *array,
                (
                    "--profile",
                    {
                        "metavar": "NAME|FILE",
                        "help": "of the machine (default HAL_KPU_PROFILE, or t64; for a product as gemm's)",
                    },
                ),
                dtype,
                fidelity,
                ("--out", {"type": Path, "default": Path("kpu-trace.json"), "help": "file (default %(default)s)"}),
            ],
        ),
        (
            _report,
            "report",
            "how much of a model torch.compile runs on the KPU",
            [
                (
                    "model",
                    {"metavar": "MODEL", "help": "a model's folder, minilm, or a small configuration: bert, gpt2 ..."},
                ),
                ("--length", whole | {"default": 32, "help": "tokens (default %(default)s)"}),
                ("--batch", whole | {"default": 1, "help": "texts or images (default %(default)s)"}),
                ("--fidelity", {"default": "behavioral", "choices": ("behavioral", *_FIDELITIES)}),
            ],
        ),
    )
    for run, name, text, arguments in table:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for flag, settings in arguments:
            command.add_argument(flag, **settings)


def _profile(options: argparse.Namespace) -> CommandResult:
    import attrs

    from .profiles.profile import load

    p = load(options.profile)
    figures = {key: attrs.asdict(figure) for key, figure in p.figures.items()}
    data = {"name": p.name, "title": p.title, "vendor": p.vendor, "notes": p.notes, "figures": figures}
    rows = [[key, f"{f.value:g}", f.unit, str(f.provenance), f.source] for key, f in p.figures.items()]
    columns = ["figure", "value", "unit", "provenance", "source"]
    counts = Counter(str(figure.provenance) for figure in p.figures.values())
    origins = ", ".join(f"{count} figures {origin}" for origin, count in counts.items())
    text = [*([p.notes] if p.notes else []), f"{p.path}: valid. {origins}."]
    return CommandResult(data, [Table(f"{p.vendor} {p.name}: {p.title}", columns, rows)], text)


def _gemm(options: argparse.Namespace) -> CommandResult:
    from .simulator.report import report

    _check_plot(options.plot)
    title, stats, profile = _product(options, options.M, options.N, options.K)
    made = report(title, stats, profile)
    return CommandResult(made.to_dict(), made.tables(), _drawn(options, made))


def _product(
    options: argparse.Namespace,
    M: int,  # noqa: N803
    N: int,  # noqa: N803
    K: int,  # noqa: N803
) -> tuple[str, ExecutionStats, Profile]:
    """(title, counters, profile) of a matrix product on one array."""
    from .simulator.fidelity import FIDELITIES
    from .simulator.products.gemm import machine, simulate_gemm

    rows, cols, dataflow = options.rows, options.cols, options.dataflow
    title = f"{M} x {N} x {K} {options.dtype} on {rows} x {cols}, {dataflow}"
    options.progress(title, 0.0)
    stats = simulate_gemm(
        M,
        N,
        K,
        rows=rows,
        cols=cols,
        dataflow=dataflow,
        fidelity=FIDELITIES.index(options.fidelity),
        dtype=options.dtype,
        profile=options.profile,
    )
    return title, stats, machine(rows, cols, options.profile)


def _attention(options: argparse.Namespace) -> CommandResult:
    from .runtime.settings import current_profile
    from .simulator.attention.baseline import compare
    from .simulator.energy import energy
    from .simulator.report import report

    _check_plot(options.plot)
    profile, request = current_profile(options.profile), _request(options)
    options.progress("fused and unfused", 0.0)
    found = compare(profile, request, options.fidelity)
    made = report(f"attention, {request.describe()}", found.fused, profile)
    rows = [
        [
            name,
            f"{s.cycles:,}",
            f"{s.seconds * 1e3:.4g}",
            f"{s.external_bytes / 1e6:,.4g}",
            f"{s.utilization:.1%}",
            f"{energy(s, profile).total * 1e3:.3g}",
        ]
        for name, s in (("fused", found.fused), ("scores through DRAM", found.unfused))
    ]
    note = f"Fused takes {1 / found.speedup:.1%} of the baseline's cycles ({found.speedup:.2f}x)."
    columns = ["", "cycles", "ms", "DRAM, MB", "arrays used", "energy, mJ"]
    title = f"Attention on {profile.name}, simulated ({options.fidelity}): {request.describe()}"
    tables = [Table(title, columns, rows, [note]), *made.tables()]
    return CommandResult(found.to_dict() | {"report": made.to_dict()}, tables, _drawn(options, made))


def _trace(options: argparse.Namespace) -> CommandResult:
    from .simulator.trace import chrome_trace, write_trace

    if options.gemm is not None:
        title, stats, profile = _product(options, *_numbers(options.gemm, "--gemm", 3, "M,N,K"))
    else:
        title, stats, profile = _fused(options)
    timelines = [(part.label or title, part.run.timeline) for part in stats.parts if part.run is not None]
    trace = chrome_trace(timelines, profile)
    path, events = write_trace(options.out, trace), len(trace["traceEvents"])
    counted = f"{stats.cycles:,} cycles in {events:,} events (simulated, {stats.execution_backend})"
    text = [f"{title}: {counted}.", f"trace: {path} (open it at ui.perfetto.dev)"]
    return CommandResult({"file": str(path), "events": events, **trace["otherData"]}, text=text)


def _fused(options: argparse.Namespace) -> tuple[str, ExecutionStats, Profile]:
    """(title, counters, profile) of fused attention."""
    from .runtime.settings import current_profile
    from .simulator.attention.baseline import run
    from .simulator.attention.program import fused
    from .simulator.stats import new_stats

    profile, request = current_profile(options.profile), _request(options)
    stats = new_stats(profile, options.fidelity)
    stats.add(run(fused(profile, request), profile, options.fidelity), "attention")
    return f"attention, {request.describe()}", stats, profile


def _request(options: argparse.Namespace) -> AttentionRequest:
    """The attention call that the options describe."""
    from hal_core.plugin_api import AttentionRequest, Causal

    from .runtime.settings import current_profile
    from .tiling import Blocks, longest_head, room

    batch, heads, length, dim = _numbers(options.shape, "--shape", 4, "batch,heads,length,head_dim")
    kv_heads, keys = (n if n is not None else m for n, m in ((options.kv_heads, heads), (options.kv_length, length)))
    if kv_heads < 1 or keys < 1 or heads % kv_heads:
        given = f"{heads} query heads, {kv_heads} key heads and {keys} keys were given"
        raise ContractError(f"{given}: use 1 or more of each, and query heads that are a multiple of key heads")
    profile = current_profile(options.profile)
    if room(Blocks.of(profile, options.dtype), dim, dim) > profile.count("buffers.l3"):
        most = longest_head(profile, options.dtype)
        raise ContractError(f"head_dim {dim} was given: {profile.name} holds {most} at most in {options.dtype}")
    causal = Causal.BOTTOM_RIGHT if options.causal else Causal.NONE
    return AttentionRequest(batch, heads, kv_heads, length, keys, dim, dim, options.dtype, causal=causal)


def _numbers(text: str, option: str, count: int, wanted: str) -> list[int]:
    words = text.split(",")
    if len(words) != count or not all(re.fullmatch(r" *[0-9]{1,18} *", word) and int(word) > 0 for word in words):
        raise ContractError(f"{option} {text!r} was given: pass {wanted} as whole numbers of 1 or more")
    return [int(word) for word in words]


def _report(options: argparse.Namespace) -> CommandResult:
    import torch

    from .frontend.fx.coverage import measure
    from .frontend.models import load_model

    options.progress(f"loading {options.model}", 0.0)
    loaded = load_model(options.model, length=options.length, batch=options.batch)
    torch._dynamo.reset()
    compiled: Any = torch.compile(loaded.network, backend=f"kpu_{options.fidelity}")
    options.progress("compiling and running", 0.3)
    with torch.no_grad(), measure() as measurement:
        compiled(**loaded.inputs)
    found = measurement.coverage()
    data = {"model": options.model, "description": loaded.description, **found.to_dict()}
    title, notes = f"{options.model} on the KPU, simulated ({found.fidelity})", [loaded.description, *found.notes()]
    return CommandResult(data, [Table(title, ["", "on the KPU", "of all", "share"], found.rows(), notes)])


def _check_plot(path: Path | None) -> None:
    """Raise HalError where a picture could not be written, before anything is simulated."""
    if path is None:
        return
    if path.suffix.lower() not in _PICTURES:
        raise HalError(f"--plot {path} was given: choose a name that ends in .png, .svg or .pdf")
    if path.is_dir():
        raise HalError(f"--plot {path} was given: it is a folder, choose a file name in it")
    if not path.parent.is_dir():
        raise HalError(f"--plot {path} was given: {path.parent} is no folder, make it or choose another")
    if not os.access(path.parent, os.W_OK):
        raise HalError(f"--plot {path} was given: nothing can be written to {path.parent}, choose another folder")


def _drawn(options: argparse.Namespace, made: Report) -> list[str]:
    """Draw the report where `--plot` asks for it: the sentence that says so."""
    if options.plot is None:
        return []
    made.draw(options.plot)
    return [f"plot: {options.plot}"]

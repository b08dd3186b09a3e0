"""`hal plan`: memory and time of a model's attention over devices, and which strategy; links in `hal calibrate`."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from hal_core.plugin_api import CommandResult, Table, find_devices

_ABOUT = "plan a model's attention over several devices: memory per rank, time per step, which strategy"


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the subparsers of `hal`."""
    parser = subparsers.add_parser("plan", help=_ABOUT, description=_ABOUT)
    parser.add_argument("model", metavar="MODEL", help="a config.json, its folder, or a name that transformers knows")
    parser.add_argument("--tokens", type=int, required=True, help="of the whole sequence")
    parser.add_argument("--gpus", type=int, required=True, metavar="P", help="devices that share the sequence")
    parser.add_argument("--device", help="hal device of each rank (default: the best here)")
    parser.add_argument("--dtype", help="default: the model's, or bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"))
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> CommandResult:
    """Plan, and show every strategy's estimate."""
    from hal_cli import model_config

    from .planning import AttentionLayers, as_dict, plan

    config = model_config.read(options.model)
    kinds = model_config.layers(config)
    counts = model_config.counts(config, kinds)
    dtype = options.dtype or next((kind.dtype for kind in kinds if kind.dtype), "bfloat16")
    layers = [
        AttentionLayers(count, k.heads, k.heads_kv, k.dim_qk, k.dim_v, k.causal, k.window, k.softcap, k.scale)
        for k, count in zip(kinds, counts, strict=True)
    ]
    given = {name: getattr(options, name) for name in ("device", "batch", "layout", "training")}
    found = plan(layers, options.tokens, options.gpus, dtype=dtype, **given)
    passes = "forward and backward" if options.training else "forward"
    of_rank = {f"attention of {sum(counts)} layers, {passes}": _time(found.seconds)}
    of_rank |= {what: f"{size / 2**20:,.1f} MiB" for what, size in found.memory.items()}
    title = f"{found.tokens:,} tokens over {found.ranks} of {found.device}, {found.layout}: {found.strategy}"
    notes = [
        f"Times of {found.device} are {found.basis}; the link between ranks: {found.link}.",
        "Weights, their gradients and the layers around attention are not part of this plan.",
    ]
    tables = [Table(title, ["of a rank", "amount"], [list(row) for row in of_rank.items()], notes)]
    for kind, estimates in found.layers:
        window = "" if kind.window is None else f", window {kind.window}"
        rows = [
            [e.strategy, f"no: {e.refusal}", "", "", ""]
            if e.refusal
            else [e.strategy, *map(_time, (e.total, e.compute, e.exchange)), f"{e.memory / 2**20:,.1f} MiB"]
            for e in estimates
        ]
        title = f"One of {kind.number} layers: heads {kind.heads}/{kind.heads_kv}, head_dim {kind.dim_qk}{window}"
        tables.append(Table(title, ["strategy", "time", "compute", "exchange", "memory beside"], rows))
    return CommandResult(as_dict(found), tables)


def _time(seconds: float) -> str:
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def add_links(subparsers: Any) -> None:
    """Have `hal calibrate` measure the links between ranks where torchrun started several."""
    if (parser := subparsers.choices.get("calibrate")) is not None:
        parser.set_defaults(run=partial(with_links, parser.get_default("run")))


def with_links(calibrate: Callable[[Any], CommandResult], options: argparse.Namespace) -> CommandResult | None:
    """Measure the device on the first rank while the others wait, then the links, all ranks together.

    Returns:
        What the first rank prints; None on the others.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world < 2:
        return calibrate(options)
    from torch.distributed.device_mesh import init_device_mesh

    from .cost import measure_link

    kind = find_devices(options.device)[0].reads[0].partition(":")[0]
    mesh = init_device_mesh(kind, (world,))
    found = calibrate(options) if rank == 0 else None
    link = measure_link(mesh)
    if found is None:
        return None
    rows = [["bandwidth, bytes/s", f"{link.bandwidth:.6g}"], ["latency, s", f"{link.latency:.6g}"]]
    tables = [*found.tables, Table(f"Links between {world} ranks of {kind}", ["measured", "value"], rows)]
    return found._replace(data=found.data | {"link": link._asdict() | {"ranks": world}}, tables=tables)

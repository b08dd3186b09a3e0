"""The `hal` command. Errors are one sentence and exit code 2; HAL_DEBUG=1 shows the traceback."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from . import __version__
from .calibration import calibrate, load, write_whole
from .console import progress, show_table
from .errors import ContractError, DeviceUnavailableError, HalError
from .options import merged_policy, use
from .registry import Entry, registry
from .request import DTYPE_BYTES, AttentionRequest, Causal
from .selection import check_all, decide


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hal`. Returns the exit code: 0, 1 where a check failed, 2 for an error."""
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        if not hasattr(options, "run"):
            parser.print_help()
            return 2
        return int(options.run(options) or 0)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HalError, OSError) as error:
        if os.environ.get("HAL_DEBUG") == "1":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hal", description="Attention on any accelerator, with reasons and honest costs."
    )
    parser.add_argument("--version", action="version", version=f"hal-core {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    yes, device = {"action": "store_true"}, ("device", {"help": "device id or backend name"})
    dtype = ("--dtype", {"default": "float32"})
    table: tuple[tuple[Any, str, str, list[tuple[str, dict[str, Any]]]], ...] = (
        (_devices, "devices", "list the devices that are present", []),
        (_doctor, "doctor", "show every plugin: found, loaded, failed and how to mend it", []),
        (
            _explain,
            "explain",
            "show which device an attention call would run on, and why",
            [
                ("--shape", {"default": "1,8,1024,64", "help": "batch,heads,length,head_dim (default %(default)s)"}),
                ("--kv-heads", {"type": int, "help": "key/value heads (default: as many as query heads)"}),
                ("--kv-length", {"type": int, "help": "keys (default: as many as queries)"}),
                dtype,
                ("--causal", {"default": "none", "choices": ["none", "top_left", "bottom_right"]}),
                ("--window", {"help": "left,right"}),
                ("--softcap", {"type": float}),
                ("--grad", yes | {"help": "with gradients of query, key and value"}),
                ("--backend", {}),
                ("--objective", {"choices": ["time", "energy", "error"]}),
                ("--allow-simulated", yes),
            ],
        ),
        (_calibrate, "calibrate", "measure a device; its estimates use the result", [device]),
        (
            _conformance,
            "conformance",
            "hold a device to everything it claims",
            [
                device,
                ("--quick", yes | {"help": "fewer cases"}),
                ("--seed", {"type": int, "help": "draw the same cases again"}),
            ],
        ),
        (
            _bench,
            "bench",
            "time attention on a device against torch's own",
            [
                device,
                ("--lengths", {"default": "128,512,2048", "help": "comma-separated (default %(default)s)"}),
                ("--shape", {"default": "1,8,64", "help": "batch,heads,head_dim (default %(default)s)"}),
                dtype,
                ("--causal", yes),
                ("--csv", {"help": "also write the figures to this file"}),
                ("--plot", {"help": "also draw curves and a roofline to this file (PNG, SVG or PDF)"}),
            ],
        ),
    )
    for run, name, text, arguments in table:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for flag, settings in [("--json", yes | {"help": "print JSON"}), *arguments]:
            command.add_argument(flag, **settings)
    for _ in registry.call_each("hal_commands", subparsers=commands):
        pass
    return parser


def _shown(options: argparse.Namespace, record: Any, *tables: tuple[Any, ...]) -> int:
    """Print the record as JSON, or the tables: each the arguments of `show_table`."""
    if options.json:
        print(json.dumps(record, indent=2, default=str))
    for table in () if options.json else tables:
        show_table(*table)
    return 0


def _devices(options: argparse.Namespace) -> int:
    found = registry.devices()
    sizes = ["not said" if device.memory is None else f"{device.memory / 2**30:.1f} GiB" for device in found]
    rows = [
        [d.id, d.fidelity, d.vendor, d.model, size, ", ".join(d.reads)] for d, size in zip(found, sizes, strict=True)
    ]
    notes = [] if found else ["No device: `hal doctor` says why."]
    table = ("", ["device", "fidelity", "vendor", "model", "memory", "reads"], rows, notes)
    return _shown(options, [attrs.asdict(d) | {"fingerprint": d.fingerprint} for d in found], table)


def _doctor(options: argparse.Namespace) -> int:
    loaded, present = [], []
    for plugin in registry.plugin_list():
        bad = plugin.failure
        state = "loaded" if bad is None else "disabled" if bad.stage == "disabled" else f"failed ({bad.stage})"
        loaded.append([plugin.name, plugin.distribution, state, "" if bad is None else f"{bad.message} -> {bad.fix}"])
    for entry in registry.entries():
        _probe(entry)
        for device in entry.found or ():
            state = "calibrated" if load(device) else f"not calibrated (hal calibrate {device.id})"
            broken = entry.broken.get(device.id)
            details = (
                [*device.features, state] if broken is None else [f"cannot be opened, {broken.message} -> {broken.fix}"]
            )
            present.append([device.id, device.fidelity, device.model, device.driver, "; ".join(details)])
        if not entry.found:
            present.append([entry.spec.name, "absent", "", "", registry.why_absent(entry)])
    record = {
        "plugins": [attrs.asdict(plugin) for plugin in registry.plugin_list()],
        "backends": [_backend_record(entry) for entry in registry.entries()],
    }
    return _shown(
        options,
        record,
        ("Plugins", ["plugin", "distribution", "state", "why, and what to do"], loaded),
        ("Devices", ["device", "fidelity", "model", "driver", "details"], present),
    )


def _probe(entry: Entry) -> None:
    """Open each device and ask it about a small call, so that what fails there is known; the registry keeps it."""
    for device in registry.devices_of(entry):
        with suppress(DeviceUnavailableError):
            registry.session(device.id)
        for dtype in ("float32", "float16", "bfloat16"):
            check_all(AttentionRequest(1, 1, 1, 64, 64, 64, 64, dtype, device.reads[0]), device)


def _backend_record(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.spec.name,
        "distribution": entry.distribution,
        "requirements": entry.spec.requirements,
        "devices": [attrs.asdict(device) for device in entry.found or ()],
        "broken": {device: attrs.asdict(failure) for device, failure in entry.broken.items()},
        "failure": None if entry.failure is None else attrs.asdict(entry.failure),
        "absent": None if entry.found else registry.why_absent(entry),
    }


def _explain(options: argparse.Namespace) -> int:
    batch, heads, length, dim = _numbers(options.shape, 4, "--shape", "batch,heads,length,head_dim")
    window = None if options.window is None else _numbers(options.window, 2, "--window", "left,right")
    kv_heads, kv_length, cap = options.kv_heads or heads, options.kv_length or length, options.softcap
    if min(batch, heads, length, dim, kv_heads, kv_length) < 1 or heads % kv_heads:
        given = f"--shape {options.shape} with {heads} query heads, {kv_heads} key heads and {kv_length} keys was given"
        raise ContractError(f"{given}: use 1 or more of each, and query heads that are a multiple of key heads")
    if options.dtype not in DTYPE_BYTES or (cap is not None and not 0 < cap < float("inf")):
        wanted = f"one of {', '.join(DTYPE_BYTES)}, and a positive softcap"
        raise ContractError(f"dtype {options.dtype!r} and softcap {cap} were given: use {wanted}")
    request = AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=kv_heads,
        len_q=length,
        len_k=kv_length,
        dim_qk=dim,
        dim_v=dim,
        softcap=cap,
        dtype=options.dtype,
        causal=Causal(options.causal),
        window=None if window is None else (window[0], window[1]),
        grads=frozenset("qkv" if options.grad else ""),
    )
    with use(options.backend, objective=options.objective, allow_simulated=options.allow_simulated or None):
        decision = decide(request, merged_policy(None, None, None, None))
    print(decision.to_json() if options.json else decision)
    return 0 if decision.chosen else 1


def _numbers(text: str, count: int, option: str, wanted: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if (count and len(numbers) != count) or not numbers or min(numbers) < 0:
        raise ContractError(f"{option} {text!r} was given: pass {wanted} as whole numbers")
    return numbers


def _calibrate(options: argparse.Namespace) -> int:
    with progress(f"calibrating {options.device}") as report:
        calibration = calibrate(options.device, report)
    rows = [
        [name, json.dumps(value) if isinstance(value, list | dict) else str(value)]
        for name, value in calibration.values.items()
    ]
    return _shown(
        options, attrs.asdict(calibration), (f"Calibration of {calibration.device}", ["measured", "value"], rows)
    )


def _conformance(options: argparse.Namespace) -> int:
    from .testing import check_backend

    with progress(f"conformance of {options.device}") as report:
        result = check_backend(options.device, quick=options.quick, seed=options.seed, progress=report)
    print(result.to_json() if options.json else result)
    return 0 if result.passed else 1


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench, draw_run

    lengths = _numbers(options.lengths, 0, "--lengths", "one or more lengths")
    batch, heads, dim = _numbers(options.shape, 3, "--shape", "batch,heads,head_dim")
    with progress(f"timing {options.device}") as report:
        run = bench(options.device, lengths, (batch, heads, dim), options.dtype, options.causal, report)
    records = run.records
    title = f"{records[0]['device']} ({records[0]['fidelity']}), batch {batch}, {heads} heads, head_dim {dim}, {options.dtype}"
    if options.csv:
        text = io.StringIO(newline="")
        flat = [{name: r[name] for name in r if name != "conditions"} | r["conditions"] for r in records]
        writer = csv.DictWriter(text, list(dict.fromkeys(field for row in flat for field in row)))
        writer.writeheader()
        writer.writerows(flat)
        write_whole(Path(options.csv), text.getvalue())
    if options.plot:
        draw_run(options.plot, title, run)
    rows = [
        [
            str(r["length"]),
            *(f"{r[f'{n}_p50_ms']:.4g}" if f"{n}_p50_ms" in r else "-" for n in run.columns),
            f"{r['torch_p50_ms'] / r['hal_p50_ms']:.2f}x",
            str(r["hal_calls"]),
        ]
        for r in records
    ]
    facts = [
        f"{r['length']} tokens: {', '.join(f'{name} {value}' for name, value in r['conditions'].items())}"
        for r in records
        if r["conditions"]
    ]
    columns = ["tokens", *(f"{name} ms" for name in run.columns), "torch / hal", "calls"]
    return _shown(options, records, (title, columns, rows, ["medians, interleaved", *facts, *run.notes]))

"""The `hal` command. Errors are one sentence and exit code 2; HAL_DEBUG=1 shows the traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from .console import progress, show_table
from .errors import ContractError, HalError
from .registry import Entry, registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hal`. Returns the exit code: 0, 1 where a check failed, 2 for an error."""
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        if not hasattr(options, "run"):
            parser.print_help()
            return 2
        return int(options.run(options) or 0)
    except HalError as error:
        if os.environ.get("HAL_DEBUG") == "1":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="hal", description="Attention on any accelerator, with reasons and honest costs."
    )
    parser.add_argument("--version", action="version", version=f"hal-core {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    add("devices", _devices, "list the devices that are present")
    add("doctor", _doctor, "show every plugin: found, loaded, failed and how to mend it")
    explain = add("explain", _explain, "show which device an attention call would run on, and why")
    explain.add_argument("--shape", default="1,8,1024,64", help="batch,heads,length,head_dim (default %(default)s)")
    explain.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    explain.add_argument("--kv-length", type=int, help="keys (default: as many as queries)")
    explain.add_argument("--dtype", default="float32")
    explain.add_argument("--causal", default="none", choices=["none", "top_left", "bottom_right"])
    explain.add_argument("--window", help="left,right")
    explain.add_argument("--softcap", type=float)
    explain.add_argument("--grad", action="store_true", help="with gradients of query, key and value")
    explain.add_argument("--backend")
    explain.add_argument("--objective", choices=["time", "energy", "error"])
    explain.add_argument("--allow-simulated", action="store_true")
    calibrate = add("calibrate", _calibrate, "measure a device; its estimates use the result")
    calibrate.add_argument("device")
    conformance = add("conformance", _conformance, "hold a device to everything it claims")
    conformance.add_argument("device")
    conformance.add_argument("--quick", action="store_true", help="fewer cases")
    conformance.add_argument("--seed", type=int, help="draw the same cases again")
    bench = add("bench", _bench, "time attention on a device against torch's own")
    bench.add_argument("device")
    bench.add_argument("--lengths", default="128,512,2048", help="comma-separated (default %(default)s)")
    bench.add_argument("--shape", default="1,8,64", help="batch,heads,head_dim (default %(default)s)")
    bench.add_argument("--dtype", default="float32")
    bench.add_argument("--causal", action="store_true")
    bench.add_argument("--csv", help="also write every run's figures to this file")
    for _ in registry.call_each("hal_commands", subparsers=commands):
        pass
    return parser


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, default=str))
    return 0


def _devices(options: argparse.Namespace) -> int:
    found = registry.devices()
    if options.json:
        return _print_json([attrs.asdict(d) | {"fingerprint": d.fingerprint} for d in found])
    rows = [[d.id, d.fidelity, d.vendor, d.model, _bytes(d.memory), ", ".join(d.reads)] for d in found]
    show_table("", ["device", "fidelity", "vendor", "model", "memory", "reads"], rows)
    if not found:
        print("No device: `hal doctor` says why.")
    return 0


def _bytes(size: int | None) -> str:
    return "not said" if size is None else f"{size / 2**30:.1f} GiB"


def _doctor(options: argparse.Namespace) -> int:
    plugins, entries = registry.plugins(), registry.entries()
    for entry in entries:
        registry.devices_of(entry)
    if options.json:
        return _print_json({
            "plugins": [attrs.asdict(plugin) for plugin in plugins],
            "backends": [_backend_record(entry) for entry in entries],
        })  # fmt: skip
    rows = []
    for plugin in plugins:
        bad = plugin.failure
        state = "loaded" if bad is None else "disabled" if bad.stage == "disabled" else f"failed ({bad.stage})"
        rows.append([plugin.name, plugin.distribution, state, "" if bad is None else f"{bad.message} -> {bad.fix}"])
    show_table("Plugins", ["plugin", "distribution", "state", "why, and what to do"], rows)
    rows = []
    for entry in entries:
        for device in entry.found or ():
            state = _calibration_state(device)
            features = ", ".join(device.features)
            rows.append(
                [device.id, device.fidelity, device.model, device.driver, "; ".join(filter(None, [features, state]))]
            )
        if not entry.found:
            rows.append([entry.spec.name, "absent", "", "", registry.why_absent(entry)])
    show_table("Devices", ["device", "fidelity", "model", "driver", "details"], rows)
    return 0


def _calibration_state(device: Any) -> str:
    from .calibration import load

    return "calibrated" if load(device) else f"not calibrated (hal calibrate {device.id})"


def _backend_record(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.spec.name, "distribution": entry.distribution, "requirements": entry.spec.requirements,
        "devices": [attrs.asdict(device) for device in entry.found or ()],
        "failure": None if entry.failure is None else attrs.asdict(entry.failure),
        "absent": None if entry.found else registry.why_absent(entry),
    }  # fmt: skip


def _explain(options: argparse.Namespace) -> int:
    from .context import use
    from .request import AttentionRequest, Causal
    from .selection import decide, merged_policy

    batch, heads, length, dim = _numbers(options.shape, 4, "--shape", "batch,heads,length,head_dim")
    window = None if options.window is None else _numbers(options.window, 2, "--window", "left,right")
    request = AttentionRequest(
        batch=batch, heads_q=heads, heads_kv=options.kv_heads or heads, len_q=length, dtype=options.dtype,
        len_k=options.kv_length or length, dim_qk=dim, dim_v=dim, causal=Causal(options.causal), softcap=options.softcap,
        window=None if window is None else (window[0], window[1]), grads=frozenset("qkv" if options.grad else ""),
    )  # fmt: skip
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
    from .calibration import calibrate

    with progress(f"calibrating {options.device}") as report:
        calibration = calibrate(options.device, report)
    if options.json:
        return _print_json(attrs.asdict(calibration))
    rows = [[name, json.dumps(value) if isinstance(value, list | dict) else str(value)]
            for name, value in calibration.values.items()]  # fmt: skip
    show_table(f"Calibration of {calibration.device}", ["measured", "value"], rows)
    return 0


def _conformance(options: argparse.Namespace) -> int:
    from .testing import check_backend

    with progress(f"conformance of {options.device}") as report:
        result = check_backend(options.device, quick=options.quick, seed=options.seed, progress=report)
    print(result.to_json() if options.json else result)
    return 0 if result.passed else 1


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench

    lengths = _numbers(options.lengths, 0, "--lengths", "one or more lengths")
    batch, heads, dim = _numbers(options.shape, 3, "--shape", "batch,heads,head_dim")
    with progress(f"timing {options.device}") as report:
        result = bench(options.device, lengths, batch, heads, dim, options.dtype, options.causal, report)
    if options.csv:
        result.write_csv(options.csv)
    if options.json:
        return _print_json(result.to_dict())
    show_table(result.title, result.columns, result.rows, result.notes)
    return 0

"""The commands of this package and their options. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from hal_core.plugin_api import CommandResult

from .parser import CommandParser

Option = tuple[str, dict[str, Any]]


class _Command(NamedTuple):
    """A command: its name, which is that of the module with its `run`, its help and its options."""

    name: str
    help: str
    options: tuple[Option, ...] = ()


_YES = {"action": "store_true"}
_DEVICE: Option = ("device", {"help": "device id or backend name"})
_DTYPE: Option = ("--dtype", {"default": "float32"})

COMMANDS = (
    _Command("devices", "list the devices that are present"),
    _Command("doctor", "show every plugin: found, loaded, failed and how to mend it"),
    _Command(
        "explain",
        "show which device an attention call would run on, and why",
        (
            ("--shape", {"default": "1,8,1024,64", "help": "batch,heads,length,head_dim (default %(default)s)"}),
            ("--kv-heads", {"type": int, "help": "key/value heads (default: as many as query heads)"}),
            ("--kv-length", {"type": int, "help": "keys (default: as many as queries)"}),
            _DTYPE,
            ("--causal", {"default": "none", "choices": ["none", "top_left", "bottom_right"]}),
            ("--window", {"help": "left,right"}),
            ("--softcap", {"type": float}),
            ("--grad", _YES | {"help": "with gradients of query, key and value"}),
            ("--plan", _YES | {"help": "open the device and show how it cuts the work"}),
            ("--backend", {}),
            ("--objective", {"choices": ["time", "energy", "error"]}),
            ("--allow-simulated", _YES),
        ),
    ),
    _Command("calibrate", "measure a device; its estimates use the result", (_DEVICE,)),
    _Command(
        "warm",
        "compile a device's kernels ahead, so that first calls do not wait",
        (
            _DEVICE,
            (
                "--model",
                {"help": "what this model needs: a config.json, its folder, or a name that transformers knows"},
            ),
            ("--dtype", {"help": "comma-separated (default: the model's, or bfloat16)"}),
            ("--training", _YES | {"help": "gradients too"}),
            ("--processes", {"type": int, "help": "how many compile at once (default: one for each core)"}),
        ),
    ),
    _Command(
        "conformance",
        "hold a device to everything it claims",
        (
            _DEVICE,
            ("--quick", _YES | {"help": "fewer cases"}),
            ("--seed", {"type": int, "help": "draw the same cases again"}),
        ),
    ),
    _Command(
        "bench",
        "time attention on a device against torch's own",
        (
            _DEVICE,
            ("--lengths", {"default": "128,512,2048", "help": "comma-separated (default %(default)s)"}),
            ("--shape", {"default": "1,8,64", "help": "batch,heads,head_dim (default %(default)s)"}),
            _DTYPE,
            ("--causal", _YES),
            ("--csv", {"help": "also write the figures to this file"}),
            ("--plot", {"help": "also draw curves and a roofline to this file (PNG, SVG or PDF)"}),
        ),
    ),
)


def add_commands(subparsers: argparse._SubParsersAction[CommandParser]) -> None:
    """Add the commands of this package to the subparsers of `hal`."""
    for command in COMMANDS:
        parser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        parser.set_defaults(run=_later(command.name))
        for flag, settings in command.options:
            parser.add_argument(flag, **settings)


def _later(module: str) -> Callable[[argparse.Namespace], CommandResult]:
    """The `run` of a module of this package, imported when it is called."""

    def run(options: argparse.Namespace) -> CommandResult:
        result: CommandResult = import_module(f".{module}", __package__).run(options)
        return result

    return run

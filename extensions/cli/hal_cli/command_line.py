"""The `hal` command. Errors are one sentence and exit code 2; HAL_DEBUG=1 shows the traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import hal_core as hal
from hal_core.plugin_api import CommandResult, HalError, registry

from . import commands
from .output import quiet_output, show
from .parser import CommandParser
from .progress import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hal`.

    Args:
        arguments: the words after "hal"; None for those of the process.

    Returns:
        The exit code: 0, 1 where a check failed, 2 for an error, 130 where the user stopped it.
    """
    try:
        parser = make_parser()
        options = parser.parse_args(arguments)
        if not hasattr(options, "run"):
            parser.print_help()
            return 2
        return _run(options)
    except BrokenPipeError:
        quiet_output()
        return 0
    except (HalError, OSError) as error:
        if os.environ.get("HAL_DEBUG") == "1":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # a command may say what is kept
        print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 130


def make_parser() -> CommandParser:
    """The parser with the commands of this package and those of every installed plugin."""
    parser = CommandParser(prog="hal", description="Attention on any accelerator, with reasons and honest costs.")
    parser.add_argument("--version", action="version", version=f"hal-core {hal.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_commands(subparsers)
    for _ in registry.call_each("hal_commands", subparsers=subparsers):
        pass
    parser.complete()
    return parser


def _run(options: argparse.Namespace) -> int:
    """Run the command that was asked for, and print what it returned."""
    with Progress(options.command) as progress:
        options.progress = progress
        result = options.run(options)
    if isinstance(result, CommandResult):
        show(result, options.json)
        sys.stdout.flush()  # so that a reader that went away is noticed here and not at exit
        return result.exit_code
    return int(result or 0)

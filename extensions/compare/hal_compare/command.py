"""The command line of `hal compare`. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Run one model once per device on real text, and print error against float64, what the error does to the task, time and
energy, side by side, each with its origin. The row "torch sdpa" is the same model on torch's own attention, timed in turn
with the others.
"""


def add_parser(subparsers: Any) -> None:
    """Add `compare` to the subparsers of `hal`."""
    parser = subparsers.add_parser(
        "compare", help="run a model once per device: error, time and energy side by side", description=DESCRIPTION
    )
    parser.add_argument("model", metavar="MODEL", help="folder with config.json and *.safetensors, or 'minilm'")
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        type=Path,
        default=[],
        help="a UTF-8 file, or a folder of *.txt: texts divided by blank lines, or one a line; may be repeated "
        "(default: a short sample)",
    )
    parser.add_argument(
        "--devices",
        metavar="LIST",
        action="append",
        default=[],
        help="device ids or backend names, divided by commas; may be repeated (default: every device there is)",
    )
    parser.add_argument(
        "--linear",
        metavar="LIST",
        action="append",
        default=[],
        help="devices that run the model's linear layers too, in rows of their own; 'all' for those that can",
    )
    parser.add_argument(
        "--compiled",
        metavar="LIST",
        action="append",
        default=[],
        help="devices that run the whole model by torch.compile, in rows of their own; 'all' for those that can",
    )
    parser.add_argument(
        "--repeats", metavar="N", type=positive, default=3, help="timed runs of each device (default: 3)"
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=positive,
        default=20,
        help="a device whose repeats would take longer is timed once (default: 20)",
    )
    parser.add_argument(
        "--batch", metavar="N", type=positive, default=8, help="texts in a batch; 1 needs no padding mask"
    )
    parser.add_argument("--max-length", metavar="N", type=positive, help="tokens of a text that are used")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--report", metavar="FILE", type=Path, help="write a self-contained HTML report")
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given: pass a whole number, 1 or more")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write the report.

    Returns:
        0, or 1 where no device ran the model.

    Raises:
        HalError: a model, text or device that does not exist or cannot be read.
    """
    from . import lanes, measure, models, report, tables, texts

    if arguments.report is not None:
        report.check_target(arguments.report)
    read = texts.read(arguments.text)
    listed = (arguments.devices, arguments.linear, arguments.compiled)
    rows = lanes.rows_for(*([name for words in given for name in words.split(",") if name] for given in listed))
    model = models.load(arguments.model, arguments.dtype)
    comparison = measure.compare(
        model,
        read,
        rows,
        repeats=arguments.repeats,
        batch_size=arguments.batch,
        max_length=arguments.max_length,
        command=command_line(),
        budget=arguments.budget,
    )
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        tables.show(comparison)
    if arguments.report is not None:
        report.write(comparison, arguments.report)
        print(f"report: {os.path.relpath(arguments.report)}", file=sys.stderr if arguments.json else sys.stdout)
    return 0 if any(row.ran for row in comparison.rows if not row.baseline) else 1


def command_line() -> str:
    """The command as typed, for the report."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "python -m hal_core"), *sys.argv[1:]])

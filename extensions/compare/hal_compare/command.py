"""The command line of `hal compare`. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hal_core import HalError
from hal_core.plugin_api import CommandResult

from .threads import spin_briefly

DESCRIPTION = """\
Run one model on real text, once per device, and print error against float64, what the error does to the task, time
and energy, side by side, each with its origin. The row "torch sdpa" is the same model on torch's own attention, timed
in turn with the others. One row per device family is compared, with attention alone on the device; --all takes every
device, its linear layers and its torch.compile backend too.
"""


def add_parser(subparsers: Any) -> None:
    """Add `compare` to the subparsers of `hal`."""
    parser = subparsers.add_parser(
        "compare", help="run a model once per device: error, time and energy side by side", description=DESCRIPTION
    )
    add_input(parser)
    parser.add_argument(
        "--devices",
        metavar="LIST",
        action="append",
        default=[],
        help="device ids, or backend names for all devices of a backend, divided by commas; may be repeated (default: "
        "the first device of every backend)",
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
        "--all",
        action="store_true",
        help="every device instead of one per family (unless --devices names them), and --linear all --compiled all",
    )
    parser.add_argument(
        "--digital",
        metavar="LIST",
        action="append",
        default=[],
        help="linear layers, by name or pattern ('encoder.layer.0.*'), that stay on torch in the rows of --linear; may "
        "be repeated",
    )
    parser.add_argument(
        "--keep",
        metavar="SHARE",
        type=share,
        help="look for the cheapest set of digital layers with which each row of --linear keeps this share of the "
        "float64 run's nearest neighbours or next tokens, for example 0.9",
    )
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the devices that have it, for example passes=4 for photonic ones; may be repeated",
    )
    parser.add_argument(
        "--layers", action="store_true", help="error, time and energy of every layer of the model too, in every row"
    )
    parser.add_argument(
        "--layer",
        metavar="LIST",
        action="append",
        default=[],
        help="the same of these layers, or attention modules and linear layers in them, by name or pattern "
        "('encoder.layer.0.*'); may be repeated",
    )
    parser.add_argument("--details", action="store_true", help="print tables of text, error, time, work and energy too")
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive,
        default=3,
        help="timed runs of each device, and draws of each noisy device's noise (default: 3)",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=positive,
        default=20,
        help="a device without noise whose repeats would take longer is timed once (default: 20)",
    )
    parser.add_argument(
        "--batch", metavar="N", type=positive, default=8, help="texts in a batch; 1 needs no padding mask"
    )
    parser.add_argument("--max-length", metavar="N", type=positive, help="tokens of a text that are used")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the run")
    parser.add_argument(
        "--assume-power",
        metavar="WATTS",
        type=watts,
        help="state an energy for torch's attention and for devices of this host without a meter: this power times "
        "their time, marked as assumed",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="write a self-contained HTML report, and beside it the same as CSV and JSON, and timelines of simulators",
    )
    parser.set_defaults(run=run)


def add_input(parser: argparse.ArgumentParser) -> None:
    """Add the model and what it reads."""
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
    for option, what in (
        ("--images", "images, for a model that reads them"),
        ("--audio", "wav files, for one of sound"),
    ):
        parser.add_argument(
            option,
            metavar="FOLDER",
            action="append",
            type=Path,
            default=[],
            help=f"a folder of {what}; may be repeated",
        )


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given: pass a whole number, 1 or more")
    return int(text)


def watts(text: str) -> float:
    """A power above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} was given: pass a number of watts above 0, for example 65")
    return number


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given: pass a number above 0, up to 1")
    return number


def run(arguments: argparse.Namespace) -> CommandResult:
    """Compare, and write the report.

    Returns:
        The comparison as data and as tables. The exit code is 1 where no device ran the model.

    Raises:
        HalError: a model, text or device that does not exist or cannot be read, or a report that cannot be written;
            all of them are looked at before anything is measured.
    """
    spin_briefly()
    from . import (
        assumed,
        device_options,
        digital,
        lanes,
        layers,
        layers_report,
        measure,
        models,
        report,
        tables,
        tasks,
        timelines,
    )

    if arguments.report is not None:
        report.check_target(arguments.report)
    read = files_of(arguments, tasks.task_of(models.find(arguments.model)).modality)
    every = ["all"] if arguments.all else []
    rows = lanes.rows_for(
        names_of(arguments.devices, "--devices") or (["all"] if arguments.all else []),
        [*names_of(arguments.linear, "--linear"), *every],
        [*names_of(arguments.compiled, "--compiled"), *every],
    )
    if (arguments.keep or arguments.digital) and not any(row.scope is lanes.Scope.LINEAR for row in rows):
        option = "--keep" if arguments.keep else "--digital"
        raise HalError(f"{option} is about linear layers, and none run on a device: add --linear and a device")
    if arguments.keep and arguments.digital:
        raise HalError("--digital and --keep were given: name the digital layers, or have them looked for")
    optional = device_options.set_options(rows, arguments.option)
    model = models.load(arguments.model, arguments.dtype)
    named = names_of(arguments.layer, "--layer")
    by_layer = layers.chosen(model.network, named) if arguments.layers or named else []
    lanes.keep_digital(model.network, rows, names_of(arguments.digital, "--digital"))
    chosen = []
    if arguments.keep:
        chosen = digital.search(model, read, rows, arguments)
    comparison = measure.compare(
        model,
        read,
        rows,
        repeats=arguments.repeats,
        batch_size=arguments.batch,
        max_length=arguments.max_length,
        command=command_line(),
        budget=arguments.budget,
        progress=arguments.progress,
    )
    if by_layer:
        tokens = measure.batches_of(model, read, arguments.batch, arguments.max_length)
        comparison = layers.with_layers(comparison, model, rows, tokens, by_layer, arguments.progress)
    if arguments.assume_power is not None:
        comparison = assumed.with_assumed_power(comparison, arguments.assume_power)
    data, text = comparison.to_dict(), [*tables.refused(comparison), *optional]
    data["options"] = {row.name: row.options for row in rows if row.options}
    data["digital"] = {row.name: sorted(row.digital) for row in rows if row.digital}
    text += digital.sentences(model.network, rows, chosen)
    if arguments.report is not None:
        written = report.write(comparison, arguments.report, data, timelines.timelines(comparison))
        data["report"], data["beside"] = str(written[0]), [str(path) for path in written[1:]]
        beside = ", ".join(path.name for path in written[1:])
        text.append(f"report: {os.path.relpath(written[0])} (beside it: {beside})")
    shown = [tables.summary(comparison), *(tables.details(comparison) if arguments.details else [])]
    shown += layers_report.tables(comparison)
    ran = any(row.ran for row in comparison.rows if not row.baseline)
    return CommandResult(data, shown, text, 0 if ran else 1)


def files_of(arguments: argparse.Namespace, modality: str) -> Any:
    """The files of the option that the model reads."""
    from . import media, texts

    given = {"text": arguments.text, "image": arguments.images, "audio": arguments.audio}
    options = {"text": "--text FILE", "image": "--images FOLDER", "audio": "--audio FOLDER"}
    others = [options[name] for name, paths in given.items() if paths and name != modality]
    if others or (modality != "text" and not given[modality]):
        what = f"{' and '.join(others)} was given" if others else "no input was given"
        raise HalError(f"{arguments.model} reads {modality}, and {what}: pass {options[modality]}")
    if modality == "image":
        return media.read(given["image"], media.IMAGES, "images")
    if modality == "audio":
        return media.read(given["audio"], media.SOUNDS, "wav files")
    return texts.read(given["text"])


def names_of(listed: Sequence[str], option: str) -> list[str]:
    """The names that an option lists.

    Raises:
        HalError: the option was given, and names nothing.
    """
    names = [name.strip() for words in listed for name in words.split(",") if name.strip()]
    if listed and not names:
        raise HalError(f"{option} {listed[0]!r} was given, which names nothing: give names divided by commas")
    return names


def command_line() -> str:
    """The command as typed, for the report."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "python -m hal_core"), *sys.argv[1:]])

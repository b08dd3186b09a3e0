"""The command line of `hal sweep`. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal_core import DeviceUnavailableError, HalError
from hal_core.plugin_api import CommandResult, registry, write_whole

from ..command import command_line, positive
from ..threads import spin_briefly
from .lists import whole_numbers

if TYPE_CHECKING:
    from ..models import Model
    from .cells import Cell, SweptLane
    from .run import Plan

DESCRIPTION = """\
Run one model over lengths of text, batch sizes, devices and profiles, and write error, time and energy with their
origins as a page of Pareto charts, CSV and JSON. Each result is kept as soon as it is there: the same command goes on
from what is in its folder. Texts are cut to each length out of the files; where these are too short for one, the texts
are random.
"""
#: Lengths where none are asked for: those of them that the model takes.
LENGTHS = (32, 64, 128, 256, 512)


def add_parser(subparsers: Any) -> None:
    """Add `sweep` to the subparsers of `hal`."""
    parser = subparsers.add_parser(
        "sweep", help="error, time and energy of a model over lengths, batches and profiles", description=DESCRIPTION
    )
    lists = {"metavar": "LIST", "action": "append", "default": []}
    parser.add_argument("model", metavar="MODEL", help="folder with config.json and *.safetensors, or 'minilm'")
    parser.add_argument(
        "--devices",
        **lists,
        help="device ids, or backend names for all devices of a backend, divided by commas; may be repeated (default: "
        "the first device of every backend)",
    )
    parser.add_argument("--lengths", **lists, help=f"tokens of a text (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--batches", **lists, help="texts in a batch (default: 8)")
    parser.add_argument(
        "--profiles",
        metavar="GLOB",
        action="append",
        default=[],
        help="profiles that the simulated devices are swept over, each in rows of its own: names ('t*'), or files "
        "('mine/*.toml'); divided by commas, may be repeated",
    )
    parser.add_argument(
        "--linear",
        **lists,
        help="devices that run the linear layers too, in rows of their own; 'all' for those that can",
    )
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the devices that have it, for example passes=4 for photonic ones; may be repeated",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        type=Path,
        default=[],
        help="a UTF-8 file, or a folder of *.txt, whose text is cut to the lengths (default: a short sample)",
    )
    parser.add_argument("--random-text", action="store_true", help="random texts at every length")
    parser.add_argument("--texts", metavar="N", type=positive, default=8, help="texts of each length (default: 8)")
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive,
        default=3,
        help="timed runs, and draws of each noisy device's noise (default: 3)",
    )
    parser.add_argument(
        "--budget",
        metavar="SECONDS",
        type=positive,
        default=20,
        help="a device whose repeats would take longer at one length and batch is timed once (default: 20)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the run")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="where results are kept, and page, CSV and JSON are written (default: sweep-MODEL)",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the results in the folder, or measure all anew",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> CommandResult:
    """Sweep, and write page, CSV and JSON.

    Returns:
        The sweep as data and as tables. The exit code is 1 where no device ran the model.

    Raises:
        HalError: a model, text, device, profile, length, batch or folder that cannot be used: all of them are looked
            at before anything is measured. KeyboardInterrupt: stopped by the user; it says what is kept.
    """
    spin_briefly()
    lengths = whole_numbers(arguments.lengths, "--lengths") if arguments.lengths else []
    batches = whole_numbers(arguments.batches, "--batches") if arguments.batches else [8]
    folder = arguments.out or Path(f"sweep-{Path(arguments.model).expanduser().resolve().name}")
    if folder.exists() and not folder.is_dir():
        raise HalError(f"--out {folder} is a file: give a folder")
    with ExitStack() as stack:
        lanes = _lanes(arguments, stack)
        plan = _plan(arguments, lengths, batches, lanes)
        _check_folder(folder)
        return _swept(arguments, plan, folder)


def _check_folder(folder: Path) -> None:
    """Make the folder, and raise HalError where nothing could be written. Files of an earlier sweep are replaced."""
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "cells"):
            with tempfile.NamedTemporaryFile(dir=place):
                pass
    except OSError as error:
        raise HalError(f"--out {folder} cannot be written ({error.strerror}): give another folder") from error
    for name in ("sweep.html", "sweep.csv", "sweep.json"):
        if (folder / name).is_dir():
            raise HalError(f"--out {folder} has a folder called {name}: give another folder, or move that one")


def _lanes(arguments: argparse.Namespace, stack: ExitStack) -> list[SweptLane]:
    """The rows: devices as they are present, and profiles in place of those that are swept over them."""
    from ..device_options import set_options
    from ..lanes import rows_for
    from .cells import SweptLane
    from .profiles import chosen, registered

    named, patterns = _words(arguments.devices), _words(arguments.profiles)
    rows = rows_for(named)
    if absent := [row.refusals[0] for row in rows if row.refusals]:
        raise DeviceUnavailableError("; ".join(absent))
    listed = [row.device.id for row in rows if row.device is not None]
    by_device = {}
    if patterns:
        backends = list(dict.fromkeys(registry.entry(name).spec.name for name in listed))
        profiles = chosen(patterns, backends)
        made = stack.enter_context(registered(profiles))
        by_device = {one.device.id: one for one in made}
        listed = [name for name in listed if registry.entry(name).spec.name not in profiles] + list(by_device)
    linear = _words(arguments.linear)
    rows = rows_for(listed, [name for word in linear for name in _with_profiles(word, by_device)])
    set_options(rows, arguments.option)
    lanes = []
    for row in rows:
        found = by_device.get(row.device.id) if row.device is not None else None
        mark = "" if row.device is None else row.name.removeprefix(row.device.id)
        mark += "".join(f" {name}={value}" for name, value in sorted(row.options.items()))
        if found is not None:
            lanes.append(SweptLane(row, found.label + mark, found.family, found.profile))
        else:
            family = "torch" if row.device is None else registry.entry(row.device.id).spec.name
            lanes.append(SweptLane(row, row.name if row.device is None else row.device.id + mark, family))
    return lanes


def _with_profiles(word: str, by_device: dict[str, Any]) -> Sequence[str]:
    """A device named in `--linear`; where it is swept over profiles, the devices of these."""
    own = [device for device, one in by_device.items() if one.family == word.partition(":")[0]]
    return own or [word]


def _plan(arguments: argparse.Namespace, lengths: list[int], batches: list[int], lanes: Sequence[SweptLane]) -> Plan:
    """What is measured: the model, its texts, and a grid that model and memory allow."""
    from .. import models, tasks, texts
    from .limits import check_lengths, check_memory, most_tokens
    from .run import Plan
    from .token_texts import TextMaker

    task = tasks.task_of(models.find(arguments.model))
    if task.modality != "text":
        raise HalError(f"{arguments.model} reads {task.modality}, which has no length in tokens: use hal compare")
    files = texts.read(arguments.text)
    model: Model = models.load(arguments.model, arguments.dtype)
    maker = TextMaker(model, files, always_random=arguments.random_text)
    if not lengths:
        most = most_tokens(model)
        lengths = [length for length in LENGTHS if (most is None or length <= most) and length >= maker.shortest]
        lengths = lengths or [most or maker.shortest]
    check_lengths(model, lengths, maker)
    plan = Plan(
        model=model,
        maker=maker,
        lanes=lanes,
        lengths=lengths,
        batches=batches,
        texts=arguments.texts,
        draws=arguments.repeats,
        budget=arguments.budget,
        command=command_line(),
    )
    devices = [swept.lane.device for swept in lanes if swept.lane.device is not None]
    check_memory(plan.model, plan.workloads, [plan.count(batch) for _, batch in plan.workloads], devices)
    return plan


def _swept(arguments: argparse.Namespace, plan: Plan, folder: Path) -> CommandResult:
    from hal_cli.output import to_json

    from . import files, page, tables
    from .records import Records
    from .run import sources, sweep

    records = Records(folder)
    try:
        cells: list[Cell] = sweep(plan, records, arguments.progress, resume=arguments.resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"results are kept in {folder}, and the same command goes on from there") from None
    data = files.as_dict(plan, cells, records.remarks)
    paths = {kind: folder / f"sweep.{kind}" for kind in ("html", "csv", "json")}
    write_whole(paths["json"], to_json(data) + "\n")
    write_whole(paths["csv"], files.as_csv(cells))
    write_whole(paths["html"], page.render(plan, cells, data))
    there = [f"{records.used} of {len(cells)} results were in {folder} already."] if records.used else []
    text = [tables.conclusion(cells), *tables.refused(cells), *records.remarks, *there]
    text += [f"{kind}: {os.path.relpath(path)}" for kind, path in paths.items()]
    data["files"] = {kind: str(path) for kind, path in paths.items()}
    ran = any(cell.ran for cell in cells if cell.family != "torch")
    return CommandResult(data, tables.tables(plan, cells, sources(plan)), text, 0 if ran else 1)


def _words(listed: Sequence[str]) -> list[str]:
    return [word.strip() for words in listed for word in words.split(",") if word.strip()]

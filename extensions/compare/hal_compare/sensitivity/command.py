"""The command line of `hal sensitivity`. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from hal_core import HalError
from hal_core.plugin_api import CommandResult

from ..command import add_input, command_line, files_of, names_of, positive, share
from ..threads import spin_briefly

DESCRIPTION = """\
What moves a model's result most. With --device: which figure of the simulated device's profile, each alone at both
ends of its stated uncertainty, or of a default that is marked assumed. With --layers: which layer of the model, each
alone with the device's errors, or without a device with noise or fewer bits.
"""


def add_parser(subparsers: Any) -> None:
    """Add `sensitivity` to the subparsers of `hal`."""
    parser = subparsers.add_parser(
        "sensitivity",
        help="which figure of a profile, or which layer, moves a model's result most",
        description=DESCRIPTION,
    )
    add_input(parser)
    parser.add_argument("--device", metavar="DEVICE", help="a device that is simulated from a profile: lightmatter:0")
    parser.add_argument("--layers", action="store_true", help="the model's layers instead of the profile's figures")
    parser.add_argument(
        "--layer", metavar="LIST", action="append", default=[], help="only these layers, by name or pattern; repeatable"
    )
    parser.add_argument("--noise", metavar="SHARE", type=share, help="of a layer's output, for --layers: 0.1 is 20 dB")
    parser.add_argument("--bits", metavar="N", type=positive, help="that a layer is rounded to, for --layers")
    parser.add_argument(
        "--figures",
        metavar="LIST",
        action="append",
        default=[],
        help="only these figures, by name or pattern ('noise.*'); may be repeated",
    )
    parser.add_argument(
        "--uncertainty",
        metavar="SHARE",
        type=share,
        help="of figures whose profile states none, instead of the default for their provenance: 0.25 is ±25%%",
    )
    parser.add_argument("--attention", action="store_true", help="attention alone on the device, and no linear layer")
    parser.add_argument("--draws", metavar="N", type=positive, default=2, help="of noise, averaged (default: 2)")
    parser.add_argument(
        "--texts", metavar="N", type=positive, default=8, help="of the input that are used (default: 8)"
    )
    parser.add_argument("--top", metavar="N", type=positive, default=10, help="rows of a table (default: 10)")
    parser.add_argument("--max-length", metavar="N", type=positive, default=64, help="tokens of a text (default: 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the run")
    parser.add_argument("--report", metavar="FILE", type=Path, help="write a self-contained HTML page with the picture")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="with --device, where each result is kept as soon as it is there: the same command goes on from them",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> CommandResult:
    """Measure, and write the page.

    Raises:
        HalError: a model, text, device, figure or layer that does not exist, wishes that do not go together, or a page
            that cannot be written; all of them are looked at before anything is measured.
    """
    spin_briefly()
    from .. import measure, models, report, tasks
    from . import model_layers, page, tables, tornado
    from .outcomes import Outcomes, key_of
    from .trial import Trial

    by_layer = bool(arguments.layers or arguments.layer)
    _check(arguments, by_layer)
    if arguments.report is not None:
        report.check_target(arguments.report)
    read = files_of(arguments, tasks.task_of(models.find(arguments.model)).modality)
    patterns = names_of(arguments.layer, "--layer") if by_layer else names_of(arguments.figures, "--figures")
    device = None
    if arguments.device is not None:
        device = tornado.device_of(arguments.device) if by_layer else tornado.simulated_device(arguments.device)
        if not by_layer:
            tornado.chosen(device, patterns, arguments.uncertainty)
    model = models.load(arguments.model, arguments.dtype)
    if by_layer:
        model_layers.check(model.network, patterns, device)
    tokens = measure.batches_of(model, _first(read, arguments.texts), 8, arguments.max_length)
    kept = None
    if arguments.out is not None:
        assert device is not None
        kept = Outcomes(arguments.out, key_of(model, tokens, device, arguments))
    trial = Trial(model, tokens, draws=arguments.draws, linear=not arguments.attention)
    progress = arguments.progress
    found: tornado.Tornado | model_layers.LayerEffects
    if device is None:
        noise = None if arguments.bits else arguments.noise or 0.1
        found = model_layers.disturbed(trial, patterns, noise=noise, bits=arguments.bits, progress=progress)
    elif by_layer:
        found = model_layers.on_device(trial, device, patterns, progress)
    else:
        try:
            found = tornado.measure(
                trial,
                device,
                patterns=patterns,
                default=arguments.uncertainty,
                progress=progress,
                outcomes=kept,
            )
        except KeyboardInterrupt:
            if kept is None:
                raise
            raise KeyboardInterrupt(
                f"results are kept in {arguments.out}, and the same command goes on from there"
            ) from None
    shown = (
        tables.of_figures(found, arguments.top)
        if isinstance(found, tornado.Tornado)
        else tables.of_layers(found, arguments.top)
    )
    data, text = {"model": arguments.model, **found.to_dict()}, []
    if kept is not None and kept.used:
        text.append(f"{kept.used} of {kept.used + kept.made} results were in {arguments.out} already.")
    if arguments.report is not None:
        page.write(
            arguments.report,
            f"{Path(arguments.model).name} on {arguments.device or 'torch'}",
            command_line(),
            found,
            shown,
        )
        data["report"] = str(arguments.report)
        text.append(f"report: {os.path.relpath(arguments.report)}")
    return CommandResult(data, shown, text)


def _check(arguments: argparse.Namespace, by_layer: bool) -> None:
    """Refuse wishes that do not go together."""
    if not by_layer and arguments.device is None:
        raise HalError(
            "neither --device nor --layers was given: name the device whose figures are to be changed, or pass --layers"
        )
    disturbance = [f"--{name}" for name in ("noise", "bits") if getattr(arguments, name) is not None]
    if disturbance and not by_layer:
        raise HalError(f"{disturbance[0]} is about the model's layers: pass --layers too, or leave it out")
    if disturbance and arguments.device is not None:
        raise HalError(
            f"{disturbance[0]} and --device were given: a layer has the device's errors, or others; pass one"
        )
    if len(disturbance) > 1:
        raise HalError("--noise and --bits were given: pass one of them")
    if arguments.bits is not None and not 2 <= arguments.bits <= 24:
        raise HalError(f"--bits {arguments.bits} was given: pass 2 to 24")
    if by_layer and (arguments.figures or arguments.uncertainty):
        raise HalError("--figures and --uncertainty are about a profile's figures: leave out --layers, or them")
    if by_layer and arguments.out is not None:
        raise HalError("--out keeps the results of a profile's figures: leave out --layers, or it")
    if by_layer and arguments.attention:
        raise HalError("--attention leaves no linear layer on the device, and --layers asks for them: leave one out")


def _first(files: Any, most: int) -> Any:
    """The first texts, images or clips of the files, at least two."""
    import attrs

    kept, left = [], max(most, 2)
    for file in files:
        if left > 0:
            kept.append(attrs.evolve(file, texts=file.texts[:left]))
            left -= len(kept[-1].texts)
    return kept

"""`hal conformance`: hold a device to everything it claims."""

from __future__ import annotations

import argparse
import json
import os

import hal_core as hal
from hal_core.plugin_api import CommandResult


def run(options: argparse.Namespace) -> CommandResult:
    """Run the conformance kit; exit code 1 where the device fails."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler prints a line for each start
    report = hal.testing.check_backend(
        options.device, quick=options.quick, seed=options.seed, progress=options.progress
    )
    return CommandResult(json.loads(report.to_json()), (), str(report).splitlines(), 0 if report.passed else 1)

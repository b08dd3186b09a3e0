"""A photonic device as a file: every figure with its value, unit, provenance and source.

    [array]
    cores = { value = 4, unit = "count", provenance = "silicon", source = "Nature 640, 368 (2025)" }

`hal photonics profile FILE` checks such a file, `hal_photonics.register_profile` makes it a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import hal_simulation
from hal_simulation import Figure as Figure, ProfileError as ProfileError, Schema

from hal_core.plugin_api import Provenance

from .figures import FIGURES, MECHANISMS

#: The words of a profile file for provenances, best first.
WORDS = {
    "silicon": Provenance.MEASURED_SILICON,  # measured on a chip, published by others
    "paper": Provenance.PAPER_PROJECTION,  # projected by the authors of a design
    "assumed": Provenance.ASSUMED,  # chosen by this project
}


@attrs.frozen(kw_only=True, eq=False)
class Profile(hal_simulation.Profile):
    """A checked photonic profile.

    Attributes:
        mechanism: "crossbar", "mesh" or "ring".
        chip: the number of the simulated chip; its static errors are drawn from it.
        linearised: whether the vendor has removed the smooth non-linearity of the inputs.
        calibrated: whether this project's calibration is applied; without it the device is as its vendor left it.
    """

    SCHEMA: ClassVar[Schema] = FIGURES
    HEAD: ClassVar[Mapping[str, str | tuple[str, ...]]] = {**hal_simulation.Profile.HEAD, "mechanism": MECHANISMS}
    OPTIONS: ClassVar[Mapping[str, type]] = {"notes": str, "chip": int, "linearised": bool, "calibrated": bool}
    VARIANT_KEY: ClassVar[str] = "mechanism"
    PROVENANCES: ClassVar[Mapping[str, Provenance]] = WORDS

    mechanism: str
    chip: int = 1
    linearised: bool = True
    calibrated: bool = True

    def raw(self) -> Profile:
        """The same chip without this project's calibration."""
        name, title = f"{self.name}-raw", f"{self.title}, as its vendor left it"
        return attrs.evolve(self, calibrated=False, name=name, title=title)

    def check(self, where: str) -> None:
        """Shares of the power add up to 1; thermal limits are in order, further apart than the hysteresis."""
        shares = [key for key in self.figures if key.startswith("power.share_")]
        total = math.fsum(self[key] for key in shares)
        if abs(total - 1) > 1e-9:
            raise ProfileError(f"{where}: {', '.join(shares)}: their sum is {total:g}: make it 1")
        limits = ("thermal.working", "thermal.derate", "thermal.throttle", "thermal.trip")
        gap = self["thermal.hysteresis"]
        for lower, upper in itertools.pairwise(limits):
            if not self[upper] - self[lower] > gap:
                wanted = f"more than {lower} ({self[lower]:g}) plus the hysteresis ({gap:g})"
                raise ProfileError(f"{where}: {upper}: {self[upper]:g} was given: use {wanted}")


def word(provenance: Provenance) -> str:
    """A profile file's word for a provenance."""
    return next(name for name, meant in WORDS.items() if meant is provenance)


def load(path: str | Path) -> Profile:
    """Read and check a profile file.

    Raises:
        ProfileError: the first thing that is wrong, with the file, the key and what is wanted.
    """
    return Profile.load(path)

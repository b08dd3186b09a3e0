"""Which photonic devices there are: profiles named by the user, and cards on the PCI bus.

HAL_PHOTONIC_PROFILES=first.toml:second.toml    the profiles of photonic:0, photonic:1 ...
HAL_PHOTONIC_PCI_IDS=1234:5678,1234:5679        vendor:device of cards to look for, as `lspci -nn` prints them

No vendor publishes a driver, so a card is reported and not used. This project invents no ids: the user names them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from hal_core.plugin_api import ContractError

from .profiles.profile import Profile, ProfileError, load

#: Profile files of the generic device, separated as in PATH; the bundled profile where it is not set.
PROFILES_VARIABLE = "HAL_PHOTONIC_PROFILES"
IDS_VARIABLE = "HAL_PHOTONIC_PCI_IDS"
#: The folder of the bundled profiles; generic.toml is the device photonic:0.
BUNDLED = Path(__file__).parent / "profiles"
_BUS = Path("/sys/bus/pci/devices")
_PAIR = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")


def profiles() -> list[Profile]:
    """The profiles of `PROFILES_VARIABLE` in its order, or the bundled one.

    Raises:
        ProfileError: a file that is no profile.
    """
    listed = [part for part in os.environ.get(PROFILES_VARIABLE, "").split(os.pathsep) if part]
    if not listed:
        return [bundled("generic")]
    try:
        return [load(file) for file in listed]
    except ProfileError as error:
        raise ProfileError(f"{PROFILES_VARIABLE}: {error}") from None


def bundled_names() -> list[str]:
    """Names of the bundled profile files, devices or not: `hal photonics sweep --device NAME` takes them."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def bundled(name: str) -> Profile:
    """The bundled profile of a name of `bundled_names`."""
    return load(BUNDLED / f"{name}.toml")


class Card(NamedTuple):
    """A card of the bus: its address ("0000:01:00.0") and ids ("1234:5678")."""

    address: str
    ids: str

    @property
    def remark(self) -> str:
        return f"card {self.ids} at {self.address}: no public driver, it is not used"


def configured_ids() -> frozenset[str]:
    """The vendor:device pairs of `IDS_VARIABLE`.

    Raises:
        ContractError: a word that is not a pair of four hexadecimal digits each.
    """
    words = [word.strip().lower() for word in os.environ.get(IDS_VARIABLE, "").split(",") if word.strip()]
    for word in words:
        if not _PAIR.fullmatch(word):
            raise ContractError(f"{IDS_VARIABLE}: {word!r} was given: write vendor:device in hexadecimal, as 1234:5678")
    return frozenset(words)


def cards(bus: Path | None = None) -> list[Card]:
    """Cards with configured ids; none without a PCI bus or without configured ids.

    Args:
        bus: the folder of the bus's devices; None for the system's.
    """
    wanted, folder = configured_ids(), _BUS if bus is None else bus
    if not wanted or not folder.is_dir():
        return []
    found = []
    for place in sorted(folder.iterdir()):
        try:
            ids = ":".join((place / part).read_text().strip().removeprefix("0x") for part in ("vendor", "device"))
        except OSError:  # the device was removed between listing and reading
            continue
        if ids.lower() in wanted:
            found.append(Card(place.name, ids.lower()))
    return found

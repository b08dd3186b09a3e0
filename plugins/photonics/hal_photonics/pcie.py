"""Photonic cards on the PCI bus. No vendor publishes a driver, and no ids are invented here: the user names them.

HAL_PHOTONIC_PCI_IDS=1234:5678,1234:5679        vendor:device, as `lspci -nn` prints them
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from hal_core.plugin_api import ContractError

IDS_VARIABLE = "HAL_PHOTONIC_PCI_IDS"
_BUS = Path("/sys/bus/pci/devices")
_PAIR = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")


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
        ContractError: something else than pairs of four hexadecimal digits.
    """
    words = [word.strip().lower() for word in os.environ.get(IDS_VARIABLE, "").split(",") if word.strip()]
    for word in words:
        if not _PAIR.fullmatch(word):
            raise ContractError(f"{IDS_VARIABLE}: {word!r} was given: write vendor:device in hexadecimal, as 1234:5678")
    return frozenset(words)


def cards(bus: Path = _BUS) -> list[Card]:
    """Cards with configured ids; empty without a PCI bus or without configured ids."""
    wanted = configured_ids()
    if not wanted or not bus.is_dir():
        return []
    found = []
    for place in sorted(bus.iterdir()):
        try:
            ids = ":".join((place / part).read_text().strip().removeprefix("0x") for part in ("vendor", "device"))
        except OSError:  # a device that vanished between listing and reading is not there
            continue
        if ids.lower() in wanted:
            found.append(Card(place.name, ids.lower()))
    return found

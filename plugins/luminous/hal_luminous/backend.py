"""The device: a bank of micro-rings, every figure of it assumed, because no specification was ever published."""

from __future__ import annotations

from pathlib import Path

from hal_photonics import ProfileBackend, load

PROFILES = Path(__file__).parent / "profiles"


class LuminousBackend(ProfileBackend):
    """luminous:0, hypothetical and simulated."""

    def __init__(self) -> None:
        super().__init__("luminous", [load(PROFILES / "bank.toml")])

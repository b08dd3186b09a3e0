"""The devices: one for each published chip, and the measured one also uncalibrated and under its other reading."""

from __future__ import annotations

from pathlib import Path

from hal_photonics import ProfileBackend, load

PROFILES = Path(__file__).parent / "profiles"


class LightmatterBackend(ProfileBackend):
    """Six simulated devices; no driver is public.

    lightmatter:0 is the 2025 chip, calibrated; :1 the same chip as in its public measurements, before this project's
    calibration; :2 its hypothetical 2 GHz version; :3 Envise; :4 Mars; :5 the 2025 chip with 128 inputs a readout.
    """

    def __init__(self) -> None:
        measured = load(PROFILES / "2025.toml")
        others = [load(PROFILES / f"{name}.toml") for name in ("2025-2ghz", "envise", "mars", "2025-128")]
        super().__init__("lightmatter", [measured, measured.raw(), *others])

"""The settings of the process: fidelity, clock and profile, where a call gives none."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import attrs

from hal_core.plugin_api import ContractError

from ..profiles.profile import Profile, ProfileError, load
from ..simulator.fidelity import BEHAVIORAL, FIDELITIES, check_fidelity

DEFAULT_PROFILE = "t64"
#: The process's profile where `set_profile` names none: a bundled name, or the path of a TOML file.
PROFILE_VARIABLE = "HAL_KPU_PROFILE"


@attrs.define
class _Settings:
    fidelity: int = BEHAVIORAL
    clock_ghz: float | None = None
    profile: Profile | None = None


_settings, _lock = _Settings(), threading.Lock()


def set_fidelity(fidelity: int) -> None:
    """The fidelity of the process, where none is given."""
    with _lock:
        _settings.fidelity = check_fidelity(fidelity)


def get_fidelity() -> int:
    """The fidelity of the process."""
    return _settings.fidelity


def get_fidelity_name() -> str:
    """ "BEHAVIORAL", "TRANSACTIONAL" or "CYCLE_ACCURATE"."""
    return FIDELITIES[_settings.fidelity].upper()


def set_clock_frequency(ghz: float | None) -> None:
    """The clock of every engine, in GHz; the DRAM keeps its own speed. None: the profile's."""
    if ghz is not None and (isinstance(ghz, bool) or not isinstance(ghz, int | float) or not 1e-6 <= ghz <= 100):
        raise ContractError(f"clock frequency {ghz!r} was given: a number of GHz from 1e-6 to 100 is wanted")
    with _lock:
        _settings.clock_ghz = ghz


def get_clock_frequency() -> float:
    """In GHz."""
    if _settings.clock_ghz is not None:
        return _settings.clock_ghz
    return float(get_profile()["clock.frequency"]) / 1e9


def set_profile(profile: Profile | str | Path | None) -> None:
    """The machine of the process, where none is given: a bundled name, the path of a TOML file, or a profile. None: the
    one that HAL_KPU_PROFILE names, or T64.

    Compiled models and the simulators follow it at once; kpu:0 is the machine that was set when it was first looked
    for.

    Raises:
        ProfileError: no such profile, or the first thing that is wrong in it.
    """
    found = profile if profile is None or isinstance(profile, Profile) else load(profile)
    with _lock:
        _settings.profile = found


def get_profile() -> Profile:
    """The machine of the process.

    Raises:
        ProfileError: HAL_KPU_PROFILE names no profile, or one that cannot be used.
    """
    if _settings.profile is not None:
        return _settings.profile
    try:
        return load(os.environ.get(PROFILE_VARIABLE) or DEFAULT_PROFILE)
    except ProfileError as error:
        raise ProfileError(f"{PROFILE_VARIABLE}: {error}") from None


def current_profile(profile: Profile | str | None = None) -> Profile:
    """A profile, or the process's, at the process's clock."""
    found = profile if isinstance(profile, Profile) else load(profile) if profile else get_profile()
    if _settings.clock_ghz is None:
        return found
    return _clocked(found, _settings.clock_ghz)


@functools.lru_cache(maxsize=64)
def _clocked(profile: Profile, ghz: float) -> Profile:
    return profile.replace(clock__frequency=ghz * 1e9)


def info() -> dict[str, object]:
    """What a run of this process would use: version, machine, clock in GHz, fidelity, and torch's version or None."""
    from importlib import metadata

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    return {
        "version": metadata.version("hal-kpu"),
        "profile": get_profile().name,
        "clock_ghz": get_clock_frequency(),
        "fidelity": get_fidelity_name(),
        "torch": torch,
    }

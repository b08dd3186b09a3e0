"""The settings of the process: fidelity, clock and profile, where a call gives none."""

from __future__ import annotations

import functools
import threading

import attrs

from hal_core.plugin_api import ContractError

from ..profiles.profile import Profile, load
from ..simulator.fidelity import BEHAVIORAL, FIDELITIES, check_fidelity

DEFAULT_PROFILE = "t64"


@attrs.define
class _Settings:
    fidelity: int = BEHAVIORAL
    clock_ghz: float | None = None
    profile: str = DEFAULT_PROFILE


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
    return load(_settings.profile)["clock.frequency"] / 1e9


def current_profile(profile: Profile | str | None = None) -> Profile:
    """A profile, or the process's, at the process's clock."""
    found = profile if isinstance(profile, Profile) else load(profile or _settings.profile)
    if _settings.clock_ghz is None:
        return found
    return _clocked(found, _settings.clock_ghz)


@functools.lru_cache(maxsize=64)
def _clocked(profile: Profile, ghz: float) -> Profile:
    return profile.replace(clock__frequency=ghz * 1e9)

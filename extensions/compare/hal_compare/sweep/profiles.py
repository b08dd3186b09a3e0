"""Profiles as devices, for as long as a sweep runs.

A backend that simulates from profiles offers them by `profile_names()`, and by `at_profile(profile, name)` a backend of
one device, `<name>:0`, that is registered under a name of its own.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import hal_core as hal
from hal_core import Device, HalError
from hal_core.plugin_api import listing, registry


class ProfileDevice(NamedTuple):
    """A profile that was made a device.

    Attributes:
        family: the backend that simulates it ("kpu"). profile: its name ("t256"). device: the device.
    """

    family: str
    profile: str
    device: Device

    @property
    def label(self) -> str:
        """What it is called in results: "kpu t256"."""
        return f"{self.family} {self.profile}"


def offered(backend: str) -> list[str]:
    """Names of the profiles that a backend simulates; empty where it knows none."""
    names = getattr(registry.backend_of(backend), "profile_names", None)
    return [] if names is None else list(names())


def chosen(patterns: Sequence[str], backends: Sequence[str]) -> dict[str, list[str]]:
    """Profiles by backend: names that a pattern matches, and files.

    Args:
        patterns: of names ("t*"), in any case, or of files ("mine/*.toml"), which are those that end with .toml.
        backends: names of the backends that may simulate them.

    Raises:
        HalError: a pattern that nothing matches, with the closest names.
    """
    names = {backend: offered(backend) for backend in backends}
    able = [backend for backend in backends if names[backend]]
    if not able:
        raise HalError(
            f"--profiles was given, and {listing(backends)} simulates from no profile: name a simulated device by "
            "--devices, or leave --profiles out"
        )
    found: dict[str, list[str]] = {backend: [] for backend in able}
    for pattern in patterns:
        if pattern.endswith(".toml"):
            for file in _files(pattern):
                found[_reader(file, able)].append(file)
            continue
        matched = {
            backend: [name for name in names[backend] if fnmatchcase(name.lower(), pattern.lower())] for backend in able
        }
        if not any(matched.values()):
            every = sorted({name for backend in able for name in names[backend]})
            close = difflib.get_close_matches(pattern.strip("*?").lower(), every, 3, 0.4)
            wanted = f"did you mean {listing(close)}?" if close else f"there are {', '.join(every)}"
            raise HalError(f"--profiles {pattern!r} matches no profile of {listing(able)}: {wanted}")
        for backend, those in matched.items():
            found[backend] += those
    return {backend: list(dict.fromkeys(those)) for backend, those in found.items() if those}


def _files(pattern: str) -> list[str]:
    files = sorted(glob.glob(str(Path(pattern).expanduser())))
    if not files:
        raise HalError(f"--profiles {pattern!r} matches no file: give the path of a profile, or a pattern of paths")
    return files


def _reader(file: str, backends: Sequence[str]) -> str:
    """The backend that simulates a profile file. Raises HalError with what each says against it."""
    failures = []
    for backend in backends:
        try:
            _backend(backend).at_profile(file, "tried")
        except HalError as error:
            failures.append(str(error) if len(backends) == 1 else f"{backend}: {error}")
        else:
            return backend
    raise HalError("; ".join(failures))


def _backend(name: str) -> Any:
    return registry.backend_of(name)


@contextmanager
def registered(profiles: dict[str, list[str]]) -> Iterator[list[ProfileDevice]]:
    """The profiles as devices, until the block ends.

    Args:
        profiles: names and files, by backend.

    Raises:
        HalError: a profile that cannot be read, or a name that is taken.
    """
    made: list[str] = []
    try:
        devices: list[ProfileDevice] = []
        for family, listed in profiles.items():
            for profile in listed:
                short = Path(profile).stem if profile.endswith(".toml") else profile
                if any((one.family, one.profile) == (family, short) for one in devices):
                    raise HalError(f"two profiles of {family} are called {short!r}, the second {profile}: rename one")
                name = re.sub(r"\W", "_", f"{family}_{short}")
                backend = _backend(family).at_profile(profile, name)
                hal.register(backend, name)
                made.append(name)
                devices.append(ProfileDevice(family, short, backend.devices()[0]))
        yield devices
    finally:
        for name in made:
            hal.unregister(name)

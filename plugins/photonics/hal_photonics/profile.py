"""A photonic device as a file: every figure with its unit, its provenance and its source.

    [array]
    cores = { value = 4, unit = "count", provenance = "silicon", source = "Nature 640, 368 (2025)" }

A user's own chip is such a file: `hal photonics profile FILE` checks it, `hal_photonics.register_profile` makes it a
device.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from hal_core.plugin_api import ContractError, Provenance, listing

from .figures import FIGURES, MECHANISMS, Kind

_HEAD = {
    "name": "a short name",
    "title": "one line",
    "vendor": "who makes it",
    "mechanism": listing(list(MECHANISMS)),
}
_HEAD_OPTIONAL = {"notes", "sources", "chip", "linearised", "calibrated"}


class Origin(enum.StrEnum):
    """Where a figure comes from, best first."""

    SILICON = "silicon"  # measured on a chip by others
    PAPER = "paper"  # a design's projection
    ASSUMED = "assumed"  # ours

    @property
    def provenance(self) -> Provenance:
        return {
            "silicon": Provenance.MEASURED_SILICON,
            "paper": Provenance.PAPER_PROJECTION,
            "assumed": Provenance.ASSUMED,
        }[self.value]


class ProfileError(ContractError):
    """A profile that cannot be used. Says the file, the key and what is wanted."""


@attrs.frozen
class Figure:
    """One number of a profile with where it comes from."""

    value: float
    unit: str
    origin: Origin
    source: str


@attrs.frozen(kw_only=True)
class Profile:
    """A checked profile.

    Attributes:
        name, title, vendor: for people. mechanism: "crossbar", "mesh" or "ring". notes: what else is to be known.
        figures: "section.key" to `Figure`; complete, with defaults (assumed, source "left out").
        chip: number of the simulated chip: its static errors are drawn from it.
        linearised: whether inputs arrive with their smooth non-linearity taken out by the vendor.
        calibrated: whether this project's calibration is applied; without it the device is as its vendor left it.
        path: the file.
    """

    name: str
    title: str
    vendor: str
    mechanism: str
    figures: Mapping[str, Figure] = attrs.field(eq=False)
    notes: str = ""
    chip: int = 1
    linearised: bool = True
    calibrated: bool = True
    path: str = ""
    digest: str = ""

    def __getitem__(self, key: str) -> float:
        return self.figures[key].value

    def count(self, key: str) -> int:
        return int(self.figures[key].value)

    def origin(self, *keys: str) -> Origin:
        """The worst origin among figures ("section" stands for its whole section)."""
        found = [f.origin for k, f in self.figures.items() if k in keys or k.partition(".")[0] in keys]
        return max(found, key=list(Origin).index, default=Origin.ASSUMED)

    def raw(self) -> Profile:
        """The same chip without this project's calibration."""
        return attrs.evolve(
            self, calibrated=False, name=f"{self.name}-raw", title=f"{self.title}, as its vendor left it"
        )

    def replace(self, **values: float) -> Profile:
        """The same profile with figures changed by "section__key"; changed ones count as assumed. For what-if
        studies.
        """
        figures = dict(self.figures)
        for name, value in values.items():
            key = name.replace("__", ".")
            if key not in figures:
                raise ProfileError(f"profile {self.name}: no figure {key!r}: use one of {', '.join(figures)}")
            kind = FIGURES[key.partition(".")[0]][key.partition(".")[2]]
            _check_value(f"profile {self.name}", key, kind, value)
            figures[key] = Figure(float(value), kind.unit, Origin.ASSUMED, "changed in a what-if study")
        digest = hashlib.sha256(f"{self.digest} {sorted(values.items())}".encode()).hexdigest()[:16]
        return attrs.evolve(self, figures=figures, digest=digest)


def load(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        ProfileError: the first thing that is wrong, with the file, the key and what is wanted.
    """
    text = _text(Path(path))
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path}: not TOML ({error}): mend the line") from None
    return parse(data, str(path), hashlib.sha256(text.encode()).hexdigest()[:16])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ProfileError(f"{path}: {reason}: pass a profile, a TOML file") from None


def parse(data: dict[str, Any], where: str, digest: str = "") -> Profile:
    """Check what a TOML file held. `where` names it in messages."""
    _check_keys(where, "", data, [*_HEAD, *_HEAD_OPTIONAL, *FIGURES])
    for key, wanted in _HEAD.items():
        if not isinstance(data.get(key), str) or not data[key]:
            raise ProfileError(f"{where}: {key}: {data.get(key)!r} was given: {wanted} is wanted, as text")
    if data["mechanism"] not in MECHANISMS:
        raise ProfileError(f"{where}: mechanism: {data['mechanism']!r} was given: use {listing(list(MECHANISMS))}")
    sources = data.get("sources", {})
    figures: dict[str, Figure] = {}
    for section, kinds in FIGURES.items():
        given = data.get(section, {})
        if not isinstance(given, dict):
            raise ProfileError(f"{where}: {section}: {given!r} was given: a table [{section}] is wanted")
        _check_keys(where, f"{section}.", given, kinds)
        for key, kind in kinds.items():
            if kind.of and kind.of != data["mechanism"]:
                continue
            name = f"{section}.{key}"
            if key in given:
                figures[name] = _figure(where, name, kind, given[key], sources)
            elif kind.default is not None:
                figures[name] = Figure(kind.default, kind.unit, Origin.ASSUMED, "left out of the profile")
            else:
                raise ProfileError(f"{where}: {name}: missing: give {kind.meaning}, in {kind.unit}")
    _check_whole(where, figures)
    options = {k: data[k] for k in ("notes", "chip", "linearised", "calibrated") if k in data}
    for key, kind_of in (("notes", str), ("chip", int), ("linearised", bool), ("calibrated", bool)):
        if key in options and type(options[key]) is not kind_of:
            raise ProfileError(f"{where}: {key}: {options[key]!r} was given: {kind_of.__name__} is wanted")
    head = {key: data[key] for key in _HEAD}
    return Profile(**head, **options, figures=figures, path=where, digest=digest)


def _check_keys(where: str, prefix: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            wanted = f"did you mean {close[0]!r}?" if close else f"use {listing(known)}"
            raise ProfileError(f"{where}: {prefix}{key}: unknown key: {wanted}")


def _figure(where: str, name: str, kind: Kind, given: Any, sources: Mapping[str, Any]) -> Figure:
    form = f'{{ value = ..., unit = "{kind.unit}", provenance = "silicon", source = "..." }}'
    if not isinstance(given, dict):
        raise ProfileError(f"{where}: {name}: {given!r} was given: write {form}")
    _check_keys(where, f"{name}.", given, ("value", "unit", "provenance", "source"))
    if "unit" not in given:
        raise ProfileError(f'{where}: {name}.unit: missing: write unit = "{kind.unit}"')
    if given["unit"] != kind.unit:
        raise ProfileError(f"{where}: {name}.unit: {given['unit']!r} was given: convert the value to {kind.unit!r}")
    if "value" not in given:
        raise ProfileError(f"{where}: {name}.value: missing: give {kind.meaning}, in {kind.unit}")
    _check_value(where, name, kind, given["value"])
    if given.get("provenance") not in list(Origin):
        text = repr(given["provenance"]) + " was given" if "provenance" in given else "missing"
        raise ProfileError(f"{where}: {name}.provenance: {text}: use {listing(list(Origin))}")
    source = given.get("source", "")
    if not isinstance(source, str) or not source:
        raise ProfileError(f"{where}: {name}.source: missing: say where the figure is from, or a key of [sources]")
    return Figure(float(given["value"]), kind.unit, Origin(given["provenance"]), str(sources.get(source, source)))


def _check_value(where: str, name: str, kind: Kind, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not kind.low <= value <= kind.high or (kind.whole and value != int(value)):
        limits = f"{kind.low:g} or more" if math.isinf(kind.high) else f"{kind.low:g} to {kind.high:g}"
        wanted = f"a {'whole ' if kind.whole else ''}number, {limits} {kind.unit}"
        raise ProfileError(f"{where}: {name}.value: {value!r} was given: {wanted} is wanted ({kind.meaning})")


def _check_whole(where: str, figures: Mapping[str, Figure]) -> None:
    """What no single figure can show: shares that add to 1, limits in order."""
    shares = [key for key in figures if key.startswith("power.share_")]
    total = math.fsum(figures[key].value for key in shares)
    if abs(total - 1) > 1e-9:
        raise ProfileError(f"{where}: {', '.join(shares)}: they add up to {total:g}: make it 1")
    order = ["thermal.working", "thermal.derate", "thermal.throttle", "thermal.trip"]
    values = [figures[key].value for key in order]
    gap = figures["thermal.hysteresis"].value
    for low, high, before, after in zip(order, order[1:], values, values[1:], strict=False):
        if not after - before > gap:
            raise ProfileError(
                f"{where}: {high}: {after:g} was given: more than {low} ({before:g}) and the hysteresis ({gap:g}) is wanted"
            )

"""A device as a file: every figure with its value, unit, provenance and source.

    name = "chip"
    title = "one line for people"
    vendor = "who makes it"

    [array]
    rows = { value = 32, unit = "count", provenance = "paper-projection", source = "data sheet" }

A figure may state its uncertainty, relative to its value: `uncertainty = 0.1`. A plugin subclasses `Profile`, lists the
figures in `SCHEMA`, and adds what no single figure can show in `check`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import attrs

from hal_core.plugin_api import Provenance, listing

from .toml_file import ProfileError as ProfileError, parse_text, read_text

_PARTS = ("value", "unit", "provenance", "source", "uncertainty")
#: What a figure that the file leaves out has as its source.
LEFT_OUT = "left out of the profile"


class Kind(NamedTuple):
    """What one figure of a profile must be.

    Attributes:
        unit: the one unit it is given in. low, high: the smallest and largest possible value.
        meaning: one line for people. whole: whether it must be a whole number.
        default: the value of a figure that may be left out; None where it may not.
        variant: the figure exists only in profiles of this variant (`Profile.VARIANT_KEY`); "" for all.
    """

    unit: str
    low: float
    high: float
    meaning: str
    whole: bool = False
    default: float | None = None
    variant: str = ""


#: Every figure by section and key.
Schema = Mapping[str, Mapping[str, Kind]]


@attrs.frozen
class Figure:
    """One number of a profile with where it comes from, and its relative uncertainty where that is stated."""

    value: float
    unit: str
    provenance: Provenance
    source: str
    uncertainty: float | None = None


def worst(provenances: Iterable[Provenance]) -> Provenance:
    """The worst of several provenances; `ASSUMED` of none."""
    return max(provenances, key=lambda provenance: provenance.rank, default=Provenance.ASSUMED)


@attrs.frozen(kw_only=True, eq=False)
class Profile:
    """A checked profile, hashable. Two profiles are equal where everything but notes, path and digest is.

    A subclass is an `attrs.frozen(kw_only=True, eq=False)` class. Fields that it adds appear in `HEAD` or `OPTIONS`.

    Attributes:
        name, title, vendor, notes: for people.
        figures: "section.key" to `Figure` in the order of `SCHEMA`; complete, figures left out at their defaults.
        path: the file. digest: 16 hexadecimal digits of its text's SHA-256; "" where it was not read from a file.

    Class attributes:
        SCHEMA: the figures there are.
        HEAD: top-level keys that every file has; each with what is wanted, as text or as a tuple of choices.
        OPTIONS: top-level keys that a file may have; each with its type.
        VARIANT_KEY: the key of `HEAD` whose value is compared with `Kind.variant`; "" for none.
        PROVENANCES: the words a file may use for a provenance.
    """

    SCHEMA: ClassVar[Schema] = {}
    HEAD: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "name": "a short name",
        "title": "one line",
        "vendor": "who makes it",
    }
    OPTIONS: ClassVar[Mapping[str, type]] = {"notes": str}
    VARIANT_KEY: ClassVar[str] = ""
    PROVENANCES: ClassVar[Mapping[str, Provenance]] = {origin.value: origin for origin in Provenance}

    name: str
    title: str
    vendor: str
    figures: Mapping[str, Figure]
    notes: str = ""
    path: str = ""
    digest: str = ""
    _compared: tuple[Any, ...] = attrs.field(init=False, repr=False)
    _hash: int = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        fields = [name for name in (*self.HEAD, *self.OPTIONS) if name != "notes"]
        compared = (*(getattr(self, name) for name in fields), tuple(self.figures.items()))
        object.__setattr__(self, "_compared", compared)
        object.__setattr__(self, "_hash", hash((self.name, tuple(figure.value for figure in self.figures.values()))))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Profile) or type(self) is not type(other) or self._hash != other._hash:
            return False
        return self._compared == other._compared

    def __hash__(self) -> int:
        return self._hash

    def __getitem__(self, key: str) -> float:
        """The value of "section.key", in its unit."""
        return self.figures[key].value

    def count(self, key: str) -> int:
        """The value of "section.key" as a whole number."""
        return int(self.figures[key].value)

    def provenance(self, *keys: str) -> Provenance:
        """The worst provenance among figures.

        Args:
            keys: "section.key" for one figure, "section" for all figures of a section; none for the whole profile.
        """
        return worst(
            figure.provenance
            for key, figure in self.figures.items()
            if not keys or key in keys or key.partition(".")[0] in keys
        )

    def replace(self, **values: float) -> Self:
        """The same profile with some figures changed, for what-if studies. Changed figures count as assumed.

        Args:
            values: by "section__key", in the figure's unit.

        Raises:
            ProfileError: no such figure, or a value that is not possible.
        """
        figures = dict(self.figures)
        for name, value in values.items():
            key = name.replace("__", ".")
            if key not in figures:
                raise ProfileError(f"profile {self.name}: no figure {key!r}: use one of {', '.join(figures)}")
            section, _, short = key.partition(".")
            kind = self.SCHEMA[section][short]
            number = _checked_value(f"profile {self.name}", key, kind, value)
            figures[key] = Figure(number, kind.unit, Provenance.ASSUMED, "changed in a what-if study")
        digest = hashlib.sha256(f"{self.digest} {sorted(values.items())}".encode()).hexdigest()[:16]
        return attrs.evolve(self, figures=figures, digest=digest)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a profile file.

        Raises:
            ProfileError: the first thing that is wrong, with the file, the key and what is wanted.
        """
        text = read_text(path)
        return cls.parse(parse_text(text, str(path)), str(path), hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str, digest: str = "") -> Self:
        """Check what a profile file holds.

        Args:
            data: the parsed file. where: names it in messages. digest: of its text.

        Raises:
            ProfileError: as `load`.
        """
        check_keys(where, "", data, [*cls.HEAD, *cls.OPTIONS, "sources", *cls.SCHEMA])
        head = {key: _head_value(where, key, data.get(key), wanted) for key, wanted in cls.HEAD.items()}
        options = {}
        for key, kind in cls.OPTIONS.items():
            if key in data:
                if type(data[key]) is not kind:
                    raise ProfileError(f"{where}: {key}: {shown(data[key])} was given: use a {_NAMES[kind]}")
                options[key] = data[key]
        figures = _figures(cls, data, where, head.get(cls.VARIANT_KEY, ""))
        profile = cls(**head, **options, figures=figures, path=where, digest=digest)
        profile.check(where)
        return profile

    def check(self, where: str) -> None:
        """Raise ProfileError for what no single figure can show. `where` names the file."""


_NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number"}


def _head_value(where: str, key: str, given: Any, wanted: str | tuple[str, ...]) -> str:
    if isinstance(wanted, tuple):
        if given not in wanted:
            raise ProfileError(f"{where}: {key}: {shown(given)} was given: use {listing(list(wanted))}")
    elif not isinstance(given, str) or not given:
        raise ProfileError(f"{where}: {key}: {shown(given)} was given: use text, {wanted}")
    return str(given)


def _figures(profile: type[Profile], data: Mapping[str, Any], where: str, variant: str) -> dict[str, Figure]:
    sources = data.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise ProfileError(f"{where}: sources: {shown(sources)} was given: use a table of names and texts")
    figures: dict[str, Figure] = {}
    for section, kinds in profile.SCHEMA.items():
        given = data.get(section, {})
        if not isinstance(given, dict):
            raise ProfileError(f"{where}: {section}: {shown(given)} was given: use a table [{section}]")
        check_keys(where, f"{section}.", given, kinds)
        for key, kind in kinds.items():
            if kind.variant and kind.variant != variant:
                continue
            name = f"{section}.{key}"
            if key in given:
                figures[name] = _figure(where, name, kind, given[key], sources, profile.PROVENANCES)
            elif kind.default is not None:
                figures[name] = Figure(kind.default, kind.unit, Provenance.ASSUMED, LEFT_OUT)
            else:
                raise ProfileError(f"{where}: {name}: missing: give {kind.meaning}, in {kind.unit}")
    return figures


def _figure(
    where: str,
    name: str,
    kind: Kind,
    given: Any,
    sources: Mapping[str, str],
    provenances: Mapping[str, Provenance],
) -> Figure:
    if not isinstance(given, dict):
        form = f'{{ value = ..., unit = "{kind.unit}", provenance = "assumed", source = "..." }}'
        raise ProfileError(f"{where}: {name}: {shown(given)} was given: write {form}")
    check_keys(where, f"{name}.", given, _PARTS)
    if "unit" not in given:
        raise ProfileError(f'{where}: {name}.unit: missing: write unit = "{kind.unit}"')
    if given["unit"] != kind.unit:
        raise ProfileError(f"{where}: {name}.unit: {shown(given['unit'])} was given: convert the value to {kind.unit}")
    if "value" not in given:
        raise ProfileError(f"{where}: {name}.value: missing: give {kind.meaning}, in {kind.unit}")
    value = _checked_value(where, name, kind, given["value"])
    origin = given.get("provenance")
    if not isinstance(origin, str) or origin not in provenances:
        text = f"{shown(origin)} was given" if "provenance" in given else "missing"
        raise ProfileError(f"{where}: {name}.provenance: {text}: use {listing(list(provenances))}")
    source = given.get("source")
    if not isinstance(source, str) or not source:
        raise ProfileError(f"{where}: {name}.source: missing: say where the figure is from, or name a key of [sources]")
    spread = given.get("uncertainty")
    if spread is not None and (isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread <= 1):
        wanted = "use a number from 0 to 1, relative to the value, or leave it out"
        raise ProfileError(f"{where}: {name}.uncertainty: {shown(spread)} was given: {wanted}")
    stated = None if spread is None else float(spread)
    return Figure(value, kind.unit, provenances[origin], sources.get(source, source), stated)


def _checked_value(where: str, name: str, kind: Kind, value: Any) -> float:
    """The value as a float; ProfileError if it is not a number of this kind."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond float64
            number = math.inf
    possible = math.isfinite(number) and kind.low <= number <= kind.high
    if not possible or (kind.whole and number != int(number)):
        limits = f"of {kind.low:g} or more" if math.isinf(kind.high) else f"from {kind.low:g} to {kind.high:g}"
        wanted = f"a {'whole ' if kind.whole else ''}number {limits} {kind.unit}"
        raise ProfileError(f"{where}: {name}.value: {shown(value)} was given: use {wanted} ({kind.meaning})")
    return number


def check_keys(where: str, prefix: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ProfileError for the first key that is not known, with the nearest known one."""
    names = list(known)
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(key[:80], names, 1)
            wanted = f"did you mean {close[0]!r}?" if close else f"use {listing(names)}"
            raise ProfileError(f"{where}: {prefix}{shown(key)[1:-1]}: unknown key: {wanted}")


def shown(value: Any) -> str:
    """The value for a message, shortened: a file may hold anything, an integer of 100,000 digits included."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return "an integer of too many digits"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

"""A KPU as a file: every figure with its unit, its provenance and its source.

    [array]
    rows = { value = 32, unit = "count", provenance = "paper-projection", source = "machine" }

`load("t64")` reads one of the profiles that come with the package, `load("my-kpu.toml")` a user's own.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from hal_core.plugin_api import ContractError, Provenance, listing

FOLDER = Path(__file__).resolve().parent


class ProfileError(ContractError):
    """A profile that cannot be used. Says the file, the key and what is wanted."""


@attrs.frozen
class Kind:
    """What a figure must be: its unit, its range, its meaning."""

    unit: str
    low: float
    high: float
    meaning: str
    whole: bool = False


FIGURES: dict[str, dict[str, Kind]] = {
    "array": {
        "rows": Kind("count", 1, 4096, "rows of processing elements in one array", whole=True),
        "cols": Kind("count", 1, 4096, "columns of processing elements in one array", whole=True),
        "tiles": Kind(
            "count", 1, 1e5, "arrays of all kinds, each with its L3, L2, block movers and vector unit", whole=True
        ),
        "tiles_int8": Kind("count", 1, 1e5, "arrays that work on integers", whole=True),
        "tiles_bf16": Kind("count", 1, 1e5, "arrays that work on 16-bit floats", whole=True),
        "tiles_matrix": Kind("count", 1, 1e5, "arrays that work on float32", whole=True),
        "matrix_rows": Kind("count", 1, 4096, "rows of a float32 array", whole=True),
        "matrix_cols": Kind("count", 1, 4096, "columns of a float32 array", whole=True),
    },
    "clock": {"frequency": Kind("Hz", 1e3, 1e11, "of every engine")},
    "dram": {
        "bandwidth": Kind("B/s", 1e3, 1e15, "of all controllers together"),
        "controllers": Kind("count", 1, 1024, "working in step: a page lies across all of them", whole=True),
        "burst": Kind("B", 1, 65536, "least that is moved at once", whole=True),
        "page": Kind("B", 64, 1 << 24, "open row across all controllers", whole=True),
        "banks": Kind("count", 1, 1024, "each with one open page", whole=True),
        "lookahead": Kind("count", 1, 1024, "page visits whose bank may be opened ahead", whole=True),
        "activate": Kind("s", 0, 1e-3, "closing one page of a bank and opening another (tRP + tRCD)"),
        "refresh_interval": Kind("s", 1e-9, 1, "between two refreshes of one bank (tREFI)"),
        "refresh_time": Kind("s", 0, 1e-3, "the bus waits in one interval for the refreshes of all banks (tRFCab)"),
    },
    "buffers": {
        "l3": Kind("B", 1, 1 << 40, "L3 beside one array", whole=True),
        "l2": Kind("B", 1, 1 << 40, "L2 banks beside one array", whole=True),
        "l1": Kind("B", 1, 1 << 40, "stream buffer of one row or column at the array's edge", whole=True),
    },
    "engines": {
        "dma_bandwidth": Kind("B/s", 1e3, 1e15, "of one DMA channel"),
        "mover_bandwidth": Kind("B/cycle", 0.125, 1e6, "of one block mover beside one array"),
        "vector_lanes": Kind("count", 1, 1e6, "elements a vector unit beside one array takes in a cycle", whole=True),
    },
    "energy": {
        "dram": Kind("pJ/B", 0, 1e6, "reading or writing DRAM"),
        "l3": Kind("pJ/B", 0, 1e6, "reading or writing L3"),
        "l2": Kind("pJ/B", 0, 1e6, "reading or writing L2"),
        "l1": Kind("pJ/B", 0, 1e6, "reading or writing L1"),
        "dma": Kind("pJ/B", 0, 1e6, "through a DMA channel"),
        "mover": Kind("pJ/B", 0, 1e6, "through a block mover"),
        "streamer": Kind("pJ/B", 0, 1e6, "through a streamer"),
        "mac_int8": Kind("pJ", 0, 1e6, "one multiply-accumulate of integers"),
        "mac_bf16": Kind("pJ", 0, 1e6, "one multiply-accumulate of 16-bit floats"),
        "mac_fp32": Kind("pJ", 0, 1e6, "one multiply-accumulate of float32"),
        "vector": Kind("pJ", 0, 1e6, "one operation of the vector unit on one element"),
    },
    "power": {
        "tdp": Kind("W", 0, 1e5, "thermal design power"),
        "static": Kind("W", 0, 1e5, "drawn whether or not it works"),
    },
}
_HEAD = ("name", "title", "vendor")


@attrs.frozen
class Figure:
    """One number of a profile with where it comes from."""

    value: float
    unit: str
    provenance: Provenance
    source: str


@attrs.frozen(kw_only=True)
class Profile:
    """A checked profile, hashable: two profiles with equal figures time equal work equally.

    Attributes:
        name, title, vendor, notes: for people.
        figures: (("section.key", `Figure`), ...) in the order of `FIGURES`, complete.
    """

    name: str
    title: str
    vendor: str
    figures: tuple[tuple[str, Figure], ...]
    notes: str = attrs.field(default="", eq=False)
    path: str = attrs.field(default="", eq=False)
    _values: Mapping[str, float] = attrs.field(init=False, eq=False, repr=False)
    _hash: int = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_values", {key: figure.value for key, figure in self.figures})
        object.__setattr__(self, "_hash", hash((self.name, tuple(self._values.values()))))

    def __hash__(self) -> int:
        return self._hash

    def __getitem__(self, key: str) -> float:
        """Value of "section.key" in its unit."""
        return self._values[key]

    def figure(self, key: str) -> Figure:
        return dict(self.figures)[key]

    def count(self, key: str) -> int:
        return int(self._values[key])

    def provenance(self, *keys: str) -> Provenance:
        """The worst provenance among figures; "section" stands for its whole section, nothing for all."""
        found = [f.provenance for k, f in self.figures if not keys or k in keys or k.partition(".")[0] in keys]
        return max(found, key=list(Provenance).index, default=Provenance.ASSUMED)

    def arrays(self, dtype: str) -> tuple[int, int, int]:
        """(rows, columns, number) of the arrays that multiply this dtype ("int8", "bfloat16", "float32", ...)."""
        rows, cols = self.count("array.rows"), self.count("array.cols")
        if dtype.startswith(("int", "uint", "bool")):
            return rows, cols, self.count("array.tiles_int8")
        if dtype in ("bfloat16", "float16"):
            return rows, cols, self.count("array.tiles_bf16")
        return self.count("array.matrix_rows"), self.count("array.matrix_cols"), self.count("array.tiles_matrix")

    def bytes_per_cycle(self, key: str = "dram.bandwidth") -> float:
        """A figure in B/s as bytes in one cycle of the clock."""
        return self[key] / self["clock.frequency"]

    def cycles(self, key: str) -> float:
        """A figure in seconds as cycles of the clock."""
        return self[key] * self["clock.frequency"]

    def replace(self, **values: float) -> Profile:
        """The same profile with figures changed by "section__key"; changed ones count as assumed. For what-if
        studies.
        """
        figures = dict(self.figures)
        for name, value in values.items():
            key = name.replace("__", ".")
            if key not in figures:
                raise ProfileError(f"profile {self.name}: no figure {key!r}: use one of {', '.join(figures)}")
            section, _, short = key.partition(".")
            kind = FIGURES[section][short]
            _check_value(f"profile {self.name}", key, kind, value)
            figures[key] = Figure(float(value), kind.unit, Provenance.ASSUMED, "changed in a what-if study")
        return attrs.evolve(self, figures=tuple(figures.items()))

    def with_array(self, rows: int, cols: int) -> Profile:
        """One array of rows x cols for every dtype, with this profile's memories."""
        return self.replace(
            array__rows=rows,
            array__cols=cols,
            array__matrix_rows=rows,
            array__matrix_cols=cols,
            array__tiles=1,
            array__tiles_int8=1,
            array__tiles_bf16=1,
            array__tiles_matrix=1,
        )


def names() -> list[str]:
    """Profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name_or_path: str | Path) -> Profile:
    """Read and check a profile: a name of `names()` in any case, or the path of a TOML file.

    Raises:
        ProfileError: the first thing that is wrong, with the file, the key and what is wanted.
    """
    text = str(name_or_path)
    if text.lower() in names():
        return _read(FOLDER / f"{text.lower()}.toml")
    if not text.endswith(".toml"):
        raise ProfileError(f"{text!r} is no profile: use {listing(names())}, or the path of a .toml file")
    return _parse_file(Path(text))


@functools.cache
def _read(path: Path) -> Profile:
    return _parse_file(path)


def _parse_file(path: Path) -> Profile:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}: pass a profile, a TOML file") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: not UTF-8 text: pass a profile, a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{path}: not TOML ({error}): mend the line") from None
    return parse(data, str(path))


def parse(data: dict[str, Any], where: str) -> Profile:
    """Check what a TOML file held. `where` names it in messages."""
    _check_keys(where, "", data, [*_HEAD, "notes", "sources", *FIGURES])
    for key in (*_HEAD, *(k for k in ("notes",) if k in data)):
        if not isinstance(data.get(key), str) or not data[key]:
            raise ProfileError(f"{where}: {key}: {data.get(key)!r} was given: text is wanted")
    sources = data.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(value, str) for value in sources.values()):
        raise ProfileError(f"{where}: sources: {sources!r} was given: a table of names to text is wanted")
    figures: dict[str, Figure] = {}
    for section, kinds in FIGURES.items():
        given = data.get(section, {})
        if not isinstance(given, dict):
            raise ProfileError(f"{where}: {section}: {given!r} was given: a table [{section}] is wanted")
        _check_keys(where, f"{section}.", given, list(kinds))
        for key, kind in kinds.items():
            if key not in given:
                raise ProfileError(f"{where}: {section}.{key}: missing: give {kind.meaning}, in {kind.unit}")
            figures[f"{section}.{key}"] = _figure(where, f"{section}.{key}", kind, given[key], sources)
    for key in ("int8", "bf16", "matrix"):
        if figures[f"array.tiles_{key}"].value > figures["array.tiles"].value:
            raise ProfileError(f"{where}: array.tiles_{key}: more than array.tiles: count every array there")
    if figures["dram.page"].value < figures["dram.burst"].value:
        raise ProfileError(f"{where}: dram.page: shorter than dram.burst: a page holds at least one burst")
    if figures["dram.refresh_time"].value >= figures["dram.refresh_interval"].value:
        raise ProfileError(f"{where}: dram.refresh_time: as long as dram.refresh_interval: a shorter one is wanted")
    return Profile(
        figures=tuple(figures.items()), notes=data.get("notes", ""), path=where, **{k: data[k] for k in _HEAD}
    )


def _figure(where: str, key: str, kind: Kind, given: Any, sources: Mapping[str, str]) -> Figure:
    form = f'{{ value = ..., unit = "{kind.unit}", provenance = "...", source = "..." }}'
    if not isinstance(given, dict):
        raise ProfileError(f"{where}: {key}: {given!r} was given: {form} is wanted")
    _check_keys(where, f"{key}.", given, ["value", "unit", "provenance", "source"])
    for part in ("value", "unit", "provenance", "source"):
        if part not in given:
            raise ProfileError(f"{where}: {key}: {part} is missing: {form} is wanted")
    _check_value(where, key, kind, given["value"])
    if given["unit"] != kind.unit:
        raise ProfileError(f"{where}: {key}: unit {given['unit']!r} was given: {kind.unit!r} is wanted")
    origins = [origin.value for origin in Provenance]
    if given["provenance"] not in origins:
        raise ProfileError(f"{where}: {key}: provenance {given['provenance']!r} was given: use {listing(origins)}")
    if not isinstance(given["source"], str) or not given["source"]:
        raise ProfileError(
            f"{where}: {key}: source {given['source']!r} was given: text or a name under [sources] is wanted"
        )
    source = sources.get(given["source"], given["source"])
    return Figure(float(given["value"]), kind.unit, Provenance(given["provenance"]), source)


def _check_value(where: str, key: str, kind: Kind, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not kind.low <= value <= kind.high or (kind.whole and value != int(value)):
        wanted = f"a {'whole ' if kind.whole else ''}number from {kind.low:g} to {kind.high:g} {kind.unit}"
        raise ProfileError(f"{where}: {key}: {value!r} was given: {wanted} is wanted ({kind.meaning})")


def _check_keys(where: str, prefix: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise ProfileError(f"{where}: {prefix}{key}: unknown: use {listing(known)}")

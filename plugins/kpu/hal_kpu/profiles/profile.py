"""The profile of a KPU: a TOML file in which every figure has its unit, its provenance and its source.

    [array]
    rows = { value = 32, unit = "count", provenance = "paper-projection", source = "machine" }

`load("t64")` reads one of the profiles that come with the package, `load("my-kpu.toml")` a user's own.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import ClassVar

import attrs
from hal_simulation import Kind, Profile as ProfileFile, ProfileError as ProfileError, Schema

from hal_core.plugin_api import listing

FOLDER = Path(__file__).resolve().parent

#: Every figure by section and key, and what it must be.
FIGURES: Schema = {
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


@attrs.frozen(kw_only=True, eq=False)
class Profile(ProfileFile):
    """A checked profile, hashable: two profiles with equal figures time equal work equally.

    `profile["section.key"]` is a value in its unit; `profile.figures` has each with its provenance and source.
    """

    SCHEMA: ClassVar[Schema] = FIGURES

    def check(self, where: str) -> None:
        """Raise ProfileError where figures contradict each other: arrays, bursts and pages, refreshes."""
        for key in ("int8", "bf16", "matrix"):
            if self[f"array.tiles_{key}"] > self["array.tiles"]:
                raise ProfileError(f"{where}: array.tiles_{key}: more than array.tiles: count every array there")
        if self["dram.page"] < self["dram.burst"]:
            raise ProfileError(f"{where}: dram.page: shorter than dram.burst: a page holds at least one burst")
        if self["dram.refresh_time"] >= self["dram.refresh_interval"]:
            raise ProfileError(f"{where}: dram.refresh_time: as long as dram.refresh_interval: use a shorter one")

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
        return _bundled(text.lower())
    if not text.endswith(".toml"):
        close = difflib.get_close_matches(text.lower()[:80], names(), 1)
        question = "".join(f" (did you mean {name!r}?)" for name in close)
        raise ProfileError(f"{text!r} is no profile{question}: use {listing(names())}, or the path of a .toml file")
    return Profile.load(Path(text))


@functools.cache
def _bundled(name: str) -> Profile:
    return Profile.load(FOLDER / f"{name}.toml")

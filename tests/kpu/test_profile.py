"""Profiles of the KPU: what comes with the package, and what a bad file is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hal_kpu.profiles import profile
from hal_kpu.profiles.profile import FIGURES, FOLDER, ProfileError

from hal_core import Provenance


def test_every_profile_is_complete_and_says_where_each_figure_is_from():
    assert {"t64", "t256", "t768", "t4x4", "t16x16", "t32x32"} <= set(profile.names())
    for name in profile.names():
        loaded = profile.load(name)
        assert list(loaded.figures) == [f"{section}.{key}" for section in FIGURES for key in FIGURES[section]]
        assert all(figure.source and isinstance(figure.provenance, Provenance) for figure in loaded.figures.values())
        assert loaded.provenance() is Provenance.ASSUMED  # none of these chips has been measured


@pytest.mark.parametrize(("name", "arrays", "clock", "tera"), [("t64", 64, 475e6, 62.3), ("t256", 256, 600e6, 314.6)])
def test_published_int8_rate_is_all_arrays_at_the_clock(name, arrays, clock, tera):
    t = profile.load(name)
    assert t.count("array.tiles") == arrays
    assert t["clock.frequency"] == clock
    rate = 2 * t["array.rows"] * t["array.cols"] * arrays * clock
    assert rate / 1e12 == pytest.approx(tera, abs=0.05)


def test_arrays_by_dtype():
    t768 = profile.load("T768")
    assert t768.arrays("int8") == (16, 8, 537)
    assert t768.arrays("bfloat16") == (16, 8, 154)
    assert t768.arrays("float32") == (8, 8, 77)
    assert t768.with_array(5, 7).arrays("float32") == (5, 7, 1)


def test_a_path_is_read_and_equal_figures_are_equal_profiles(tmp_path: Path):
    copy = tmp_path / "mine.toml"
    copy.write_text((FOLDER / "t64.toml").read_text())
    assert profile.load(copy) == profile.load("t64")
    assert hash(profile.load(copy)) == hash(profile.load("t64"))
    changed = profile.load("t64").replace(dram__bandwidth=1e9)
    assert changed != profile.load("t64")
    assert changed.figures["dram.bandwidth"].provenance is Provenance.ASSUMED


BAD = [
    (r"rows = \{[^}]*\}", "", "array.rows: missing: give rows of processing elements in one array, in count"),
    (
        r"rows = \{ value = 32",
        "rows = { value = 0",
        "array.rows.value: 0 was given: use a whole number from 1 to 4096",
    ),
    (r"rows = \{ value = 32", "rows = { value = 2.5", "array.rows.value: 2.5 was given"),
    (r"rows = \{ value = 32", "rows = { value = true", "array.rows.value: True was given"),
    (r"rows = \{[^}]*\}", "rows = 32", "array.rows: 32 was given"),
    (r'unit = "Hz"', 'unit = "MHz"', "clock.frequency.unit: 'MHz' was given: convert the value to Hz"),
    (
        r'"Hz", provenance = "[a-z-]*"',
        '"Hz", provenance = "rumour"',
        "provenance: 'rumour' was given: use assumed",
    ),
    (
        r'"Hz", provenance = "[a-z-]*", source = "[^"]*"',
        '"Hz", provenance = "assumed"',
        "frequency.source: missing",
    ),
    (r"\[clock\]", "[clocks]", "clocks: unknown key: did you mean 'clock'?"),
    (r"banks =", "bank =", "dram.bank: unknown key"),
    (r'name = "t64"', "name = 64", "name: 64 was given: use text"),
    (r"refresh_time = \{ value = 280e-9", "refresh_time = { value = 280e-6", "as long as dram.refresh_interval"),
    (r"page = \{ value = 8192", "page = { value = 64", None),
    (r"tiles_int8 = \{ value = 44", "tiles_int8 = { value = 65", "array.tiles_int8: more than array.tiles"),
    (r"\[clock\]", "[clock", "not TOML"),
    (r'name = "t64"', "name = " + "[" * 100_000 + "]" * 100_000, "nested deeper than 16 levels"),
    (r"rows = \{ value = 32", "rows = { value = " + "9" * 10_000, "not TOML"),
]


@pytest.mark.parametrize(("pattern", "change", "message"), BAD)
def test_a_bad_file_is_told_the_key_and_what_is_wanted(tmp_path: Path, pattern, change, message):
    bad = tmp_path / "bad.toml"
    text, number = re.subn(pattern, change, (FOLDER / "t64.toml").read_text(), count=1, flags=re.MULTILINE)
    assert number == 1
    bad.write_text(text)
    if message is None:
        profile.load(bad)  # one burst is the shortest page
        return
    with pytest.raises(ProfileError, match=re.escape(message)) as caught:
        profile.load(bad)
    assert str(bad) in str(caught.value)


def test_a_wrong_name_a_missing_file_and_bytes():
    with pytest.raises(ProfileError, match=r"'t65' is no profile \(did you mean 't64'\?\): use t16x16, t256"):
        profile.load("t65")
    with pytest.raises(ProfileError, match=r"none\.toml: No such file"):
        profile.load("/tmp/none.toml")
    with pytest.raises(ProfileError, match=r"no figure 'dram.speed'"):
        profile.load("t64").replace(dram__speed=1)

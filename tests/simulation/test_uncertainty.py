"""The interval of a profile's figures: as stated, or by the default for their provenance."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import pytest
from hal_simulation import Kind, Profile, ProfileError, Schema, Variation, variations


@attrs.frozen(kw_only=True, eq=False)
class Chip(Profile):
    SCHEMA: ClassVar[Schema] = {
        "a": {
            "rows": Kind("count", 1, 64, "rows", whole=True),
            "clock": Kind("Hz", 0, 1e12, "clock"),
            "noise": Kind("LSB", 0, 10, "noise"),
            "share": Kind("ratio", 0, 1, "part of one"),
            "other": Kind("ratio", 0, 1, "the rest of one"),
            "rin": Kind("dB/Hz", -250, -50, "noise of the laser"),
            "ambient": Kind("degC", -273, 200, "outside"),
            "zero": Kind("ratio", 0, 1, "nothing", default=0.0),
        }
    }

    def check(self, where: str) -> None:
        if abs(self["a.share"] + self["a.other"] - 1) > 1e-9:
            raise ProfileError(f"{where}: share and other: their sum is not 1")


def chip(**stated: Any) -> Chip:
    figures: dict[str, tuple[float, str, str]] = {
        "rows": (8, "count", "measured-silicon"),
        "clock": (1e9, "Hz", "measured-silicon"),
        "noise": (8, "LSB", "assumed"),
        "share": (0.5, "ratio", "assumed"),
        "other": (0.5, "ratio", "assumed"),
        "rin": (-150, "dB/Hz", "vendor-published"),
        "ambient": (25, "degC", "assumed"),
    }
    data = {
        key: {"value": value, "unit": unit, "provenance": origin, "source": "a test"}
        | ({"uncertainty": stated[key]} if key in stated else {})
        for key, (value, unit, origin) in figures.items()
    }
    return Chip.parse({"name": "chip", "title": "a chip", "vendor": "test", "a": data}, "chip.toml")


def by_key(profile: Chip, default: float | None = None) -> dict[str, Variation]:
    return {each.key.removeprefix("a."): each for each in variations(profile, default)}


def test_a_stated_uncertainty_is_taken_and_others_have_the_default_of_their_provenance() -> None:
    found = by_key(chip(clock=0.02))
    assert (found["clock"].low, found["clock"].high) == (pytest.approx(0.98e9), pytest.approx(1.02e9))
    assert found["clock"].stated
    assert (found["noise"].low, found["noise"].uncertainty, found["noise"].stated) == (4, 0.5, False)
    assert found["noise"].high == 10, "no more than is possible"
    assert by_key(chip())["clock"].uncertainty == 0.1


def test_a_default_of_the_users_does_not_touch_what_is_stated() -> None:
    found = by_key(chip(clock=0.02), 0.25)
    assert (found["clock"].uncertainty, found["noise"].uncertainty) == (0.02, 0.25)
    assert not found["noise"].stated


def test_decibels_are_varied_as_the_ratio_that_they_stand_for() -> None:
    found = by_key(chip(rin=0.5))["rin"]
    assert (found.low, found.high) == (pytest.approx(-153.01, abs=0.01), pytest.approx(-148.24, abs=0.01))


def test_what_is_not_varied_says_why() -> None:
    reasons = {key: each.reason for key, each in by_key(chip()).items() if each.reason}
    assert reasons == {
        "rows": "a whole number, which a design chooses",
        "share": "at 0.25 ratio alone, it: share and other: their sum is not 1",
        "other": "at 0.25 ratio alone, it: share and other: their sum is not 1",
        "ambient": "a temperature in degC has no relative uncertainty",
        "zero": "0, which has no relative uncertainty",
    }
    assert by_key(chip(clock=0))["clock"].reason == "stated as exact"


def test_a_whole_number_with_a_stated_uncertainty_stays_whole() -> None:
    found = by_key(chip(rows=0.2))["rows"]
    assert (found.low, found.high, found.reason) == (6, 10, "")


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "10%", float("nan")])
def test_an_uncertainty_that_is_none_is_refused_with_what_is_wanted(value: Any) -> None:
    with pytest.raises(ProfileError, match=r"chip.toml: a.clock.uncertainty: .* was given: use a number from 0 to 1"):
        chip(clock=value)

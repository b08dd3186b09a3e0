"""A profile that is wrong is refused with the file, the key and what is wanted."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hal_cli import main
from hal_photonics import register_profile
from hal_photonics.backend import BUNDLED, PhotonicBackend
from hal_photonics.benchmark import profile_named
from hal_photonics.profiles.figures import FIGURES
from hal_photonics.profiles.profile import WORDS, Profile, ProfileError, load

import hal_core as hal
from hal_core import HalError, Provenance

TEXT = (BUNDLED / "generic.toml").read_text()


def written(folder: Path, text: str) -> Path:
    path = folder / "chip.toml"
    path.write_text(text)
    return path


def line_of(key: str) -> str:
    return next(line for line in TEXT.splitlines() if line.startswith(f"{key} = "))


@pytest.mark.parametrize(
    ("key", "changed", "said"),
    [
        ("gain", "gain = 2", "converters.gain: 2 was given"),
        ("gain", 'gain = { unit = "ratio", provenance = "assumed", source = "x" }', "converters.gain.value: missing"),
        ("gain", 'gain = { value = 2, provenance = "assumed", source = "x" }', 'unit: missing: write unit = "ratio"'),
        (
            "clock",
            'clock = { value = 1, unit = "GHz", provenance = "assumed", source = "x" }',
            "convert the value to Hz",
        ),
        ("electrical", 'electrical = { value = -1, unit = "W", provenance = "assumed", source = "x" }', "-1 was given"),
        (
            "adc_bits",
            'adc_bits = { value = 0, unit = "bit", provenance = "assumed", source = "x" }',
            "from 2 to 16 bit",
        ),
        (
            "adc_bits",
            'adc_bits = { value = 7.5, unit = "bit", provenance = "assumed", source = "x" }',
            "a whole number",
        ),
        ("adc_bits", 'adc_bits = { value = nan, unit = "bit", provenance = "assumed", source = "x" }', "nan was given"),
        ("gain", 'gain = { value = 2, unit = "ratio", source = "x" }', "converters.gain.provenance: missing"),
        ("gain", 'gain = { value = 2, unit = "ratio", provenance = "guess", source = "x" }', "'guess' was given"),
        ("gain", 'gain = { value = 2, unit = "ratio", provenance = "assumed" }', "converters.gain.source: missing"),
        ("gain", "", "converters.gain: missing: give analogue gain"),
        ("gain", line_of("gain") + "\ngian = 1", "converters.gian: unknown key: did you mean 'gain'?"),
        ("share_adc", 'share_adc = { value = 0.9, unit = "ratio", provenance = "assumed", source = "x" }', "make it 1"),
        (
            "trip",
            'trip = { value = 10, unit = "degC", provenance = "assumed", source = "x" }',
            "thermal.trip: 10 was given",
        ),
        ("mechanism", 'mechanism = "magic"', "mechanism: 'magic' was given: use crossbar, dot, mesh or ring"),
        ("vendor", "", "vendor: None was given"),
    ],
)
def test_a_wrong_profile_names_file_key_and_what_is_wanted(tmp_path: Path, key: str, changed: str, said: str) -> None:
    path = written(tmp_path, TEXT.replace(line_of(key), changed, 1))
    with pytest.raises(ProfileError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("a = [", "not TOML"), (b"\xff\xfe", "not UTF-8"), (None, "No such file")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    path = tmp_path / "chip.toml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ProfileError, match=said):
        load(path)


def test_every_figure_of_every_section_is_checked_for_its_range(generic: Profile) -> None:
    data = tomllib.loads(TEXT)
    for section, kinds in FIGURES.items():
        for key in data.get(section, {}):
            kind, broken = kinds[key], tomllib.loads(TEXT)
            for value in (kind.low - 1, kind.high * 2 + 1):
                if kind.low <= value <= kind.high:
                    continue
                broken[section][key]["value"] = value
                with pytest.raises(ProfileError, match=rf"{section}\.{key}\.value"):
                    Profile.parse(broken, "a chip")


def test_a_value_left_out_is_said_to_be_assumed(generic: Profile) -> None:
    figure = generic.figures["declared.lse_error"] if "lse_error" not in TEXT else generic.figures["time.flight"]
    assert figure.provenance in WORDS.values()
    assert generic.provenance("array") is Provenance.ASSUMED


def test_what_if_studies_count_as_assumed_and_are_checked(generic: Profile) -> None:
    study = generic.replace(converters__gain=4)
    assert study["converters.gain"] == 4
    assert study.figures["converters.gain"].provenance is Provenance.ASSUMED
    assert study.digest != generic.digest
    with pytest.raises(ProfileError, match=r"converters\.gain\.value: -1"):
        generic.replace(converters__gain=-1)
    with pytest.raises(ProfileError, match="no figure"):
        generic.replace(converters__gian=1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lightning-8", "did you mean 'lightening-8'?"),
        ("nope", "name a photonic device ("),
        ("nope:0", "a profile file (chip.toml) or one of generic, hermes, lightening-4, lightening-8"),
    ],
)
def test_a_profile_name_that_does_not_exist_is_refused_with_those_that_do(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["sweep", "--device", name], ["profile", name]):
        assert main(["photonics", *command]) == 2
        message = capsys.readouterr().err
        assert f"profile {name!r} was given: there is none of that name" in message
        assert said in message


def test_a_profile_is_found_by_its_name_its_device_and_its_file(tmp_path: Path) -> None:
    assert profile_named("hermes") == load(BUNDLED / "hermes.toml")
    assert profile_named("photonic:0").name == "generic"
    assert profile_named(str(written(tmp_path, TEXT))).name == "generic"
    with pytest.raises(HalError, match="cpu:0 is not made of a photonic profile"):
        profile_named("cpu:0")
    device = register_profile("lightening-4", "bundled")
    try:
        assert profile_named("bundled").name == profile_named(device.id).name == "lightening-4"
    finally:
        hal.unregister("bundled")


def test_a_missing_file_of_the_variable_is_named_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_PHOTONIC_PROFILES", "nope.toml")
    with pytest.raises(ProfileError, match=r"HAL_PHOTONIC_PROFILES: nope.toml: No such file"):
        PhotonicBackend()


def test_the_command_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = BUNDLED / "generic.toml"
    assert main(["photonics", "profile", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    cores = shown["figures"]["array.cores"]
    assert (cores["value"], cores["unit"], cores["provenance"]) == (2.0, "count", "assumed")
    assert cores["source"]
    assert main(["photonics", "profile", str(path)]) == 0
    assert "good" in capsys.readouterr().out
    bad = written(tmp_path, TEXT.replace(line_of("gain"), "gain = 1"))
    assert main(["photonics", "profile", str(bad)]) == 2
    assert "converters.gain" in capsys.readouterr().err


def test_profiles_are_devices_beside_the_others(tmp_path: Path) -> None:
    backend = PhotonicBackend()
    assert {"generic", "hermes", "lightening-4", "lightening-8"} <= set(backend.profile_names())
    for name in backend.profile_names():
        (device,) = backend.at_profile(name, "beside").devices()
        assert (device.id, device.model) == ("beside:0", name)
    (own,) = backend.at_profile(str(written(tmp_path, TEXT.replace('"generic"', '"mine"', 1))), "beside").devices()
    assert own.model == "mine"
    with pytest.raises(ProfileError, match=r"none\.toml"):
        backend.at_profile("none.toml", "beside")

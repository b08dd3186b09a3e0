"""Profile files: what a good one gives, and that a bad one is refused with the file, the key and what is wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
from hal_simulation import Figure, Kind, Profile, ProfileError, Schema, worst
from hal_simulation.toml_file import MAX_BYTES

from hal_core import ContractError, Provenance

SOURCED = 'provenance = "assumed", source = "ours"'
TEXT = f"""
name = "toy"
title = "a toy"
vendor = "nobody"
shape = "square"
number = 3

[sources]
ours = "chosen here"

[array]
rows = {{ value = 4, unit = "count", provenance = "paper-projection", source = "page 3" }}
gain = {{ value = 2.5, unit = "ratio", {SOURCED} }}

[square]
side = {{ value = 1e-3, unit = "m", provenance = "measured-silicon", source = "ruler" }}
"""


@attrs.frozen(kw_only=True, eq=False)
class Toy(Profile):
    """A profile with every kind of figure."""

    SCHEMA: ClassVar[Schema] = {
        "array": {
            "rows": Kind("count", 1, 64, "rows of the array", whole=True),
            "gain": Kind("ratio", 0, 10, "gain of the array"),
            "delay": Kind("s", 0, float("inf"), "delay of the array", default=0.5),
        },
        "square": {"side": Kind("m", 0, 1, "side of the square", variant="square")},
        "circle": {"radius": Kind("m", 0, 1, "radius of the circle", variant="circle")},
    }
    HEAD: ClassVar[Mapping[str, str | tuple[str, ...]]] = {**Profile.HEAD, "shape": ("square", "circle")}
    OPTIONS: ClassVar[Mapping[str, type]] = {**Profile.OPTIONS, "number": int}
    VARIANT_KEY: ClassVar[str] = "shape"

    shape: str
    number: int = 1

    def check(self, where: str) -> None:
        if self["array.gain"] > self["array.rows"]:
            raise ProfileError(f"{where}: array.gain: more than array.rows")


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "toy.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_good_file_gives_every_figure_with_its_origin(tmp_path: Path) -> None:
    toy = Toy.load(written(tmp_path, TEXT))
    assert list(toy.figures) == ["array.rows", "array.gain", "array.delay", "square.side"]
    assert toy.figures["array.rows"] == Figure(4.0, "count", Provenance.PAPER_PROJECTION, "page 3")
    assert toy.figures["array.gain"].source == "chosen here", "a key of [sources] is replaced by its text"
    assert toy.figures["array.delay"] == Figure(0.5, "s", Provenance.ASSUMED, "left out of the profile")
    assert (toy["array.gain"], toy.count("array.rows"), toy.number, toy.shape) == (2.5, 4, 3, "square")


def test_the_provenance_of_several_figures_is_the_worst(tmp_path: Path) -> None:
    toy = Toy.load(written(tmp_path, TEXT))
    assert toy.provenance("square") is Provenance.MEASURED_SILICON
    assert toy.provenance("square", "array.rows") is Provenance.PAPER_PROJECTION
    assert toy.provenance("array") is Provenance.ASSUMED
    assert toy.provenance() is Provenance.ASSUMED
    assert worst([]) is Provenance.ASSUMED


def test_equal_figures_are_equal_profiles_wherever_they_lie(tmp_path: Path) -> None:
    toy = Toy.load(written(tmp_path, TEXT))
    (tmp_path / "other").mkdir()
    copy = Toy.load(written(tmp_path / "other", f"{TEXT}\n# a comment"))
    assert (toy, hash(toy)) == (copy, hash(copy))
    assert toy.digest != copy.digest
    assert toy != attrs.evolve(toy, number=4)
    assert toy != toy.replace(array__rows=5)


def test_a_what_if_study_is_checked_and_counts_as_assumed(tmp_path: Path) -> None:
    toy = Toy.load(written(tmp_path, TEXT))
    study = toy.replace(square__side=0.5)
    assert (study["square.side"], toy["square.side"]) == (0.5, 1e-3)
    assert study.provenance("square") is Provenance.ASSUMED
    with pytest.raises(ProfileError, match=r"profile toy: square\.side\.value: 7 was given"):
        toy.replace(square__side=7)
    with pytest.raises(ProfileError, match=r"no figure 'square\.sied': use one of array\.rows"):
        toy.replace(square__sied=1)


BAD = [
    ('shape = "square"', 'shape = "cube"', "shape: 'cube' was given: use circle or square"),
    ('shape = "square"', "shape = []", "shape: [] was given: use circle or square"),
    ('name = "toy"', "", "name: None was given: use text, a short name"),
    ("number = 3", "number = true", "number: True was given: use a whole number"),
    ("[sources]", "[[sources]]", "sources: [{'ours': 'chosen here'}] was given: use a table"),
    ('ours = "chosen here"', "ours = 1", "sources: {'ours': 1} was given: use a table"),
    ("[array]", "[arrays]", "arrays: unknown key: did you mean 'array'?"),
    ("[sources]", "array = 5\n[sources]", None),
    ("rows =", "rwos =", "array.rwos: unknown key: did you mean 'rows'?"),
    ("value = 4, ", "", "array.rows.value: missing: give rows of the array, in count"),
    ("value = 4", "value = 4.5", "array.rows.value: 4.5 was given: use a whole number from 1 to 64 count (rows"),
    ("value = 4", 'value = "4"', "array.rows.value: '4' was given"),
    ("value = 4", "value = true", "array.rows.value: True was given"),
    ("value = 2.5", "value = nan", "array.gain.value: nan was given: use a number from 0 to 10 ratio"),
    ('unit = "count", ', "", 'array.rows.unit: missing: write unit = "count"'),
    ('unit = "m"', 'unit = "mm"', "square.side.unit: 'mm' was given: convert the value to m"),
    ('"paper-projection"', '"rumour"', "array.rows.provenance: 'rumour' was given: use assumed, measured-silicon"),
    ('"paper-projection"', '["assumed"]', "array.rows.provenance: ['assumed'] was given"),
    ('provenance = "paper-projection", ', "", "array.rows.provenance: missing: use"),
    (', source = "page 3"', "", "array.rows.source: missing: say where the figure is from"),
    ('source = "page 3"', "source = 3", "array.rows.source: missing: say where the figure is from"),
    ("value = 4", "value = 1", "array.gain: more than array.rows"),
    ('shape = "square"', 'shape = "circle"', "circle.radius: missing: give radius of the circle, in m"),
    ("[array]", "[array", "not TOML"),
    ("number = 3", f"number = {'9' * 5000}", "not TOML"),
    ("value = 4", f"value = {'9' * 4000}", "array.rows.value: 9999"),
    ("value = 4", f"value = 0x{'f' * 9000}", "array.rows.value: an integer of too many digits was given"),
    ("number = 3", f"{'n' * 5000} = 3", "unknown key"),
    ('name = "toy"', 'name = ["' + "x" * 100_000 + '"]', "name: ["),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD, ids=range(len(BAD)))
def test_a_bad_file_names_the_file_the_key_and_what_is_wanted(
    tmp_path: Path, old: str, new: str, said: str | None
) -> None:
    assert old in TEXT
    path = written(tmp_path, TEXT.replace(old, new, 1))
    with pytest.raises(ProfileError) as caught:
        Toy.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said is None or said in message
    assert "\n" not in message
    assert len(message) < 1000 + len(str(path))


DEEP = 100_000
NESTED = {
    "arrays": f"a = {'[' * DEEP}{']' * DEEP}",
    "arrays left open": f"a = {'[' * DEEP}",
    "inline tables": "a = " + "{a=" * DEEP + "1" + "}" * DEEP,
    "dotted key": "a" + ".a" * DEEP + " = 1",
    "dotted table": "[a" + " . a" * DEEP + "]",
    "quoted key": '"a"' + '."a"' * (DEEP // 3) + " = 1",
    "behind a string with five quotes": 'b = ["""x""""", ' + "[" * DEEP,
    "hidden behind strings": f'b = """ " \\" ]]]] """\nc = \'\'\']\'\'\'\na = {"[" * DEEP}',
}


UNENDED = {"block": '"""' + '\\"""' * 200_000, "literal": "'''" + "''x" * 300_000, "line": '"\\' * 500_000}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", UNENDED)
def test_strings_without_an_end_are_read_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProfileError, match="not TOML"):
        Toy.load(written(tmp_path, f"a = {UNENDED[name]}"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NESTED)
def test_deep_nesting_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, NESTED[name])
    with pytest.raises(ProfileError) as caught:
        Toy.load(path)
    assert str(caught.value) == f"{path}: nested deeper than 16 levels, the limit for a profile: flatten it"


def test_brackets_and_dots_in_strings_and_comments_do_not_nest(tmp_path: Path) -> None:
    many = "[" * 40 + " a" + ".b" * 40
    notes = f'# {many}\nnotes = "{many} \\" {many}"\n'
    assert Toy.load(written(tmp_path, notes + TEXT)).notes.startswith("[[[")
    block = f'notes = """\n{many}\n"quoted" \\\\ {many}"""\n'
    assert Toy.load(written(tmp_path, block + TEXT)).notes.endswith(".b")


def test_what_is_not_a_file_of_text_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"toy\.toml: not UTF-8 text"):
        Toy.load(path)
    with pytest.raises(ProfileError, match=r"none\.toml: No such file"):
        Toy.load(tmp_path / "none.toml")
    with pytest.raises(ProfileError, match="not a regular file"):
        Toy.load(tmp_path)
    with pytest.raises(ProfileError, match=r"'\\x00\.toml': not the name of a file"):
        Toy.load("\0.toml")
    with pytest.raises(ProfileError, match="File name too long"):
        Toy.load(tmp_path / ("x" * 5000))
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ProfileError, match="larger than 1,048,576 bytes"):
        Toy.load(path)


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ProfileError, match="not a regular file"):
        Toy.load(tmp_path / "pipe.toml")


def test_a_profile_error_is_a_contract_error() -> None:
    assert issubclass(ProfileError, ContractError)

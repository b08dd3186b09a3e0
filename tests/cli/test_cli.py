"""The commands of hal-cli: text and JSON, exit codes, one sentence for an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from fakes import FakeBackend, plain
from hal_cli import calibrate, main

import hal_core as hal

Fake = Callable[..., FakeBackend]
Run = Callable[..., tuple[int, str, str]]


def test_devices(run: Run, toy: FakeBackend, fake: Fake) -> None:
    fake("model", fidelity="simulated")
    code, out, _ = run("devices")
    assert code == 0
    line = next(line for line in out.splitlines() if "toy:0" in line)
    assert all(part in line for part in ("hardware", "fake", "model 0", "3.0 GiB", "cpu"))
    assert any("model:0" in line and "simulated" in line and "not said" in line for line in out.splitlines())
    code, out, _ = run("devices", "--json")
    found = {device["id"]: device for device in json.loads(out)}
    assert code == 0
    assert found["toy:0"]["fingerprint"] == toy.devices()[0].fingerprint
    assert (found["toy:0"]["memory"], found["model:0"]["fidelity"]) == (3 << 30, "simulated")


def test_devices_as_json_say_what_they_can_do(run: Run, fake: Fake) -> None:
    narrow = plain(
        head_dim=hal.Choice({64, 32}),
        masks={hal.MaskKind.NONE, hal.MaskKind.BOOLEAN},
        causal={hal.Causal.TOP_LEFT},
        features={"lse", "strides"},
        length=hal.Range(1, 4096),
    )
    fake("narrow", capabilities=narrow)
    found = {device["id"]: device for device in json.loads(run("devices", "--json")[1])}
    capabilities = found["narrow:0"]["capabilities"]
    assert capabilities["dtypes"] == ["float32"]
    assert capabilities["head_dim"] == {"values": [32, 64]}
    assert capabilities["length"] == {"low": 1, "high": 4096, "multiple": 1}
    assert (capabilities["masks"], capabilities["causal"]) == (["boolean", "none"], ["top_left"])
    assert capabilities["features"] == ["lse", "strides"]
    assert capabilities["numerics"]["float32"] == {"relative": 1e-5, "lse": 1e-5, "gradient": 1e-4, "noisy": False}
    assert set(capabilities) == {field.name for field in attrs.fields(hal.Capabilities)}
    assert all(device["capabilities"]["numerics"] for device in found.values()), "an installed device says nothing"


def test_a_device_whose_capabilities_raise_does_not_hide_the_others(run: Run, toy: FakeBackend, fake: Fake) -> None:
    broken = fake("broken")
    broken.capabilities = lambda device: {}["nothing"]  # type: ignore[method-assign]
    code, out, _ = run("devices", "--json")
    found = {device["id"]: device for device in json.loads(out)}
    assert code == 0
    assert found["broken:0"]["capabilities"] is None
    assert found["broken:0"]["failure"] == "KeyError: 'nothing'"
    assert found["toy:0"]["capabilities"]["dtypes"]


@pytest.mark.parametrize("width", ["80", "100"])
def test_devices_fit_the_terminal(run: Run, toy: FakeBackend, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    lines = run("devices")[1].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= int(width)
    words = " ".join(lines).split()
    for device in hal.devices():
        assert {device.id, str(device.fidelity), *device.model.split(), *device.vendor.split()} <= set(words)


def test_explain_names_what_is_wrong_and_nothing_else(run: Run, toy: FakeBackend) -> None:
    _, _, err = run("explain", "--dtype", "int8")
    assert "--dtype 'int8' was given: use" in err
    assert "softcap" not in err
    _, _, err = run("explain", "--softcap", "-1")
    assert "dtype" not in err
    _, _, err = run("explain", "--dtype", "int8", "--softcap", "nan")
    assert "dtype" in err, "every reason at once"
    assert "softcap" in err


def test_devices_that_are_not_hardware_are_folded(run: Run, fake: Fake) -> None:
    """Eleven simulated devices are one line, not eleven times two that say the same."""
    fake("real", capabilities=plain(head_dim=hal.Range(1, 32)))
    fake("model", fidelity="simulated", count=11)
    _, out, _ = run("explain")
    assert "head_dim  64 asked, 1 to 32 offered" in out
    folded = [line for line in out.splitlines() if "model:" in line]
    assert len(folded) == 1
    assert all(f"model:{number}" in folded[0] for number in range(11))
    assert out.count("allow_simulated=True") == 1


def test_explain_fits_the_terminal(run: Run, toy: FakeBackend, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fake("narrow", capabilities=plain(head_dim=hal.Range(1, 32)))
    lines = run("explain", "--grad", "--window", "3,3", "--softcap", "4")[1].splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("only_fakes")
def test_doctor_shows_devices_and_why_there_is_none(run: Run, toy: FakeBackend, fake: Fake) -> None:
    fake("ghost", absent="no /dev/ghost0: load the kernel module")
    fake("shut", open=lambda backend, device: {}["firmware"])
    code, out, _ = run("doctor")
    assert code == 0
    text = " ".join(out.split())
    assert "not calibrated (hal calibrate toy:0)" in text
    assert "ghost is installed but has no device: no /dev/ghost0: load the kernel module" in text
    assert "cannot be opened, KeyError: 'firmware'" in text
    code, out, _ = run("doctor", "--json")
    backends = {backend["name"]: backend for backend in json.loads(out)["backends"]}
    assert backends["toy"]["devices"][0]["id"] == "toy:0"
    assert backends["toy"]["failure"] is None
    assert "load the kernel module" in backends["ghost"]["absent"]
    assert backends["shut"]["broken"]["shut:0"]["stage"] == "open"


def test_explain(run: Run, toy: FakeBackend, fake: Fake) -> None:
    fake("narrow", capabilities=plain(head_dim=hal.Range(1, 32)))
    code, out, _ = run("explain", "--shape", "1,8,100,64", "--causal", "top_left", "--kv-heads", "2", "--window", "4,0")
    assert code == 0
    assert "toy:0 for batch 1, heads 8/2, 100 x 100, head_dim 64, float32, causal, window (4, 0)" in out
    assert "head_dim  64 asked, 1 to 32 offered" in out
    arguments = (
        "explain",
        "--json",
        "--backend",
        "toy",
        "--objective",
        "energy",
        "--kv-length",
        "7",
        "--grad",
        "--softcap",
        "9",
    )
    code, out, _ = run(*arguments, "--dtype", "bfloat16")
    record = json.loads(out)
    assert code == 0
    assert (record["chosen"], record["policy"]["objective"]) == ("toy:0", "energy")
    request = record["request"]
    assert (request["len_k"], request["grads"], request["softcap"], request["dtype"]) == (
        7,
        ["k", "q", "v"],
        9.0,
        "bfloat16",
    )
    assert hal.replay(out).chosen == "toy:0"


def test_explain_fails_where_nobody_can(run: Run, fake: Fake) -> None:
    fake("narrow", capabilities=plain())
    code, out, _ = run("explain", "--backend", "narrow", "--window", "1,1")
    assert code == 1
    assert "no device for batch 1" in out
    code, out, _ = run("explain", "--json", "--backend", "narrow", "--window", "1,1")
    assert code == 1
    assert json.loads(out)["chosen"] is None


def test_explain_takes_a_simulated_device_when_allowed(run: Run, fake: Fake) -> None:
    fake("model", fidelity="simulated", time=1e-15)
    assert "model:0 for" not in run("explain")[1]
    assert "model:0 for" in run("explain", "--allow-simulated")[1]


@pytest.mark.usefixtures("only_fakes")
def test_calibrate(run: Run) -> None:
    from test_calibration import Measured

    hal.register(Measured("measured"))
    try:
        code, out, _ = run("calibrate", "measured")
        assert code == 0
        assert "seconds" in out
        assert "1e-15" in out
        code, out, _ = run("calibrate", "measured:0", "--json")
        assert json.loads(out)["values"]["sizes"] == [1, 2]
        assert "calibrated" in run("doctor")[1]
    finally:
        hal.unregister("measured")


@pytest.mark.parametrize("passed", [True, False])
def test_conformance_s_exit_code_is_its_verdict(run: Run, monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    asked: list[Any] = []

    class Report:
        def __init__(self) -> None:
            self.passed = passed

        def __str__(self) -> str:
            return "the report"

        def to_json(self) -> str:
            return '{"report": 1}'

    def check_backend(device: str, *, quick: bool, seed: int | None, progress: Any) -> Report:
        asked.append((device, quick, seed))
        return Report()

    monkeypatch.setattr(hal.testing, "check_backend", check_backend, raising=False)
    assert run("conformance", "toy", "--quick", "--seed", "4") == (0 if passed else 1, "the report\n", "")
    assert run("conformance", "toy", "--json")[1] == '{\n  "report": 1\n}\n'
    assert asked == [("toy", True, 4), ("toy", False, None)]


#: arguments -> a part of the one sentence
BAD: dict[tuple[str, ...], str] = {
    ("explain", "--backend", "toyy"): "unknown backend 'toyy' (did you mean 'toy'?)",
    ("explain", "--backend", "ghost"): "no /dev/ghost0",
    ("explain", "--shape", "1,8,64"): "--shape '1,8,64' was given: pass batch,heads,length,head_dim",
    ("explain", "--shape", "a,b,c,d"): "--shape 'a,b,c,d'",
    ("explain", "--shape", "1,8,-5,64"): "--shape",
    ("explain", "--shape", "1,8,16,0"): "1,8,16,0",
    ("explain", "--window", "4"): "--window '4' was given: pass left,right",
    ("explain", "--window", "4,-1"): "--window '4,-1'",
    ("explain", "--kv-heads", "3"): "8 query heads, 3 key heads",
    ("explain", "--kv-heads", "-2"): "key heads",
    ("explain", "--kv-length", "-7"): "-7",
    ("explain", "--softcap", "-1"): "softcap -1.0",
    ("explain", "--softcap", "nan"): "softcap nan",
    ("explain", "--dtype", "float31"): "dtype 'float31'",
    ("calibrate", "toy"): "toy:0 has no calibration",
    ("calibrate", "nobody"): "unknown backend 'nobody'",
    ("conformance", "nobody"): "unknown backend 'nobody'",
    ("bench", "nobody"): "unknown backend 'nobody'",
    ("bench", "toy", "--lengths", ""): "--lengths",
    ("bench", "toy", "--lengths", "a"): "--lengths 'a'",
    ("bench", "toy", "--dtype", "int8"): "dtype 'int8'",
    ("bench", "toy", "--shape", "1,2"): "--shape '1,2' was given: pass batch,heads,head_dim",
    ("bench", "toy", "--lengths", "4", "--shape", "1,1,4", "--csv", "/no/such/folder/b.csv"): "/no/such/folder",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_an_error_is_one_sentence_and_exit_code_2(
    run: Run, toy: FakeBackend, fake: Fake, arguments: tuple[str, ...]
) -> None:
    fake("ghost", absent="no /dev/ghost0: load the kernel module")
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert BAD[arguments] in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("closed", ["a file is in the way", "the folder is read-only"])
def test_a_cache_that_cannot_be_written_is_said_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: str
) -> None:
    from test_calibration import Measured

    measured: list[str] = []

    class Watched(Measured):
        def calibrate(self, device: hal.Device, progress: Any) -> dict[str, Any]:
            measured.append(device.id)
            return super().calibrate(device, progress)

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "file" / "cache"))
    if closed == "the folder is read-only":

        def refuse(**arguments: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(calibrate.tempfile, "NamedTemporaryFile", refuse)
    hal.register(Watched("measured"))
    try:
        code, _, err = run("calibrate", "measured")
    finally:
        hal.unregister("measured")
    assert code == 2
    assert str(tmp_path) in err
    assert "nothing was measured" in err
    assert not measured
    assert len(err.strip().splitlines()) == 1


def test_a_calibration_is_shown_as_numbers_not_as_json(run: Run) -> None:
    values = {
        "bandwidth": 1.23456789e10,
        "rates": {"tiled float32": 2e11, "deep": {"x": 1}},
        "sizes": [1, 2],
        "grid": [[{"heads": 8}, 0.1], [{"heads": 4}, 0.2]],
        "none": [],
    }
    shown = calibrate.shown(hal.Calibration("toy:0", "f", 0.0, values), [])
    assert list(shown.tables[0].rows) == [
        ["bandwidth", "1.23457e+10"],
        ["rates.tiled float32", "2e+11"],
        ["rates.deep.x", "1"],
        ["sizes", "1, 2"],
        ["grid", "2 measurements (`--json` shows them)"],
        ["none", "none"],
    ]
    assert shown.data["values"] == values


def test_a_busy_host_is_said_with_its_calibration(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_calibration import Measured

    hal.register(Measured("measured"))
    try:
        monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (8.0, 0.0, 0.0))
        assert "The host was busy (a load of 8.0" in run("calibrate", "measured")[1]
        assert "busy" in json.loads(run("calibrate", "measured", "--json")[1])["warnings"][0]
        monkeypatch.setattr(calibrate.os, "getloadavg", lambda: (0.0, 8.0, 8.0))
        assert "busy" not in run("calibrate", "measured")[1]
    finally:
        hal.unregister("measured")


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_DEBUG", "1")
    with pytest.raises(hal.UnknownBackendError):
        run("bench", "nobody")


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("bench",), ("explain", "--objective", "speed"), ("devices", "--nope")]
)
def test_a_malformed_command_line_exits_with_2(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert "usage: hal" in out + err


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("devices", "doctor", "explain", "calibrate", "conformance", "bench"):
        assert command in out
        assert run(command, "--help")[0] == 0
    assert run("--version")[1].strip() == f"hal-core {hal.__version__}"


@pytest.mark.usefixtures("only_fakes")
def test_markup_in_a_driver_s_text_is_shown_as_it_is(run: Run, fake: Fake) -> None:
    fake("ghost", absent="use [bold]sudo[/bold] [/] modprobe")
    assert "use [bold]sudo[/bold] [/] modprobe" in " ".join(run("doctor")[1].split())


def test_explain_shows_how_the_device_cuts_the_work_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--shape", "1,2,300,16", "--softcap", "5", "--backend", "cpu"]
    assert main([*words, "--plan"]) == 0
    assert "over 300 x 300, cut by cpu" in capsys.readouterr().out
    assert main(words) == 0
    assert "cut by" not in capsys.readouterr().out

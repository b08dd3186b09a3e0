"""The `hal` command: text and JSON, exit codes, one sentence for an error."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, plain, quantity
from installed import Site

import hal_core as hal
from hal_core.bench import BenchSetup, Ceilings, draw
from hal_core.cli import main

Fake = Callable[..., FakeBackend]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("devices", "--json") -> (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def toy(fake: Fake) -> FakeBackend:
    return fake(
        "toy", device_memory=3 << 30, time=quantity(1e-9), energy=quantity(1e-3, 2e-3, "declared", "vendor-published")
    )


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


def test_bench(run: Run, fake: Fake, tmp_path: Path) -> None:
    fake("toy")
    arguments = ("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--causal", "--csv", str(tmp_path / "b.csv"))
    code, out, _ = run(*arguments)
    assert code == 0
    assert "toy:0 (hardware)" in out
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [row["length"] for row in rows] == ["4", "8"]
    assert all(float(row["hal_p50_ms"]) > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["b.csv"]
    code, out, _ = run("bench", "toy", "--lengths", "4", "--shape", "1,2,8", "--json")
    assert [record["device"] for record in json.loads(out)] == ["toy:0"]


class Benched(FakeBackend):
    """A backend with columns of its own in `hal bench`; the peer runs on the shorter length alone."""

    flushed = 0

    def benchmark(self, device: hal.Device) -> BenchSetup:
        def calls(request: Any, query: Any, key: Any, value: Any) -> dict[str, Any]:
            assert request.len_q == query.shape[2]
            return {"own": lambda: query @ key.mT, **({"peer": lambda: query + 1} if request.len_q == 4 else {})}

        def flush() -> None:
            self.flushed += 1

        ceilings = Ceilings(1e12, 1e11, "measured here")
        return BenchSetup(
            calls, lambda: {"MHz": 1980, "W": 571}, lambda: ["other-peer is not installed"], flush, ceilings
        )


def test_bench_shows_what_a_backend_adds(run: Run, tmp_path: Path) -> None:
    backend = Benched("toy")
    hal.register(backend, name="toy")
    arguments = ("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--csv", str(tmp_path / "b.csv"))
    try:
        _, out, _ = run(*arguments)
        _, text, _ = run(*arguments, "--json")
    finally:
        hal.unregister("toy")
    head = next(line for line in out.splitlines() if "tokens" in line)
    assert [name for name in ("torch", "hal", "bound", "own", "peer") if f"{name} ms" in head] == head.replace(
        "tokens", ""
    ).replace("torch / hal", "").replace("calls", "").replace(" ms", "").split()
    assert "other-peer is not installed" in out
    assert "4 tokens: MHz 1980, W 571" in out
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [row["W"] for row in rows] == ["571", "571"]
    assert float(rows[0]["peer_p50_ms"]) > 0
    assert rows[1]["peer_p50_ms"] == ""
    records = json.loads(text)
    assert [record["operations"] for record in records] == [2 * 2 * 4 * 4 * 16, 2 * 2 * 8 * 8 * 16]
    assert backend.flushed > sum(record["own_calls"] for record in records)


def test_bench_draws_curves_and_a_roofline(run: Run, fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fake("toy")
    picture = tmp_path / "b.png"
    assert run("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("bench", "toy", "--lengths", "4", "--shape", "1,2,8", "--plot", "/no/such/folder/b.png")[0] == 2


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(hal.HalError, match="pip install matplotlib"):
        draw(tmp_path / "b.png", {}, {}, None)


def test_the_roofline_lies_under_its_ceilings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The roof rises with the bandwidth to the knee, 10 operations a byte, and is flat behind it."""
    axes = pytest.importorskip("matplotlib.axes")
    drawn: list[Any] = []
    monkeypatch.setattr(
        axes.Axes, "plot", lambda self, x, y, *rest, **named: drawn.append((named["label"], list(x), list(y)))
    )
    monkeypatch.setattr(axes.Axes, "legend", lambda self, **named: None)
    draw(tmp_path / "b.png", {}, {"own": [(4.0, 2e11), (400.0, 8e11)]}, Ceilings(1e12, 1e11, "measured here"))
    label, x, y = drawn[0]
    assert label == "ceilings, measured here"
    assert x == [1.0, 10.0, 1600.0]
    assert y == [0.1, 1.0, 1.0]
    assert drawn[1] == ("own", [4.0, 400.0], [0.2, 0.8])


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
    assert run("conformance", "toy", "--json")[1] == '{"report": 1}\n'
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


def test_a_cache_that_cannot_be_written_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from test_calibration import Measured

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "file" / "cache"))
    hal.register(Measured("measured"))
    try:
        code, _, err = run("calibrate", "measured")
    finally:
        hal.unregister("measured")
    assert code == 2
    assert str(tmp_path) in err
    assert len(err.strip().splitlines()) == 1


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


def test_without_rich_it_is_plain_text(run: Run, toy: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    code, out, _ = run("devices")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["device", "fidelity", "vendor", "model", "memory", "reads"]
    assert any(line.split()[:3] == ["toy:0", "hardware", "fake"] for line in lines)
    assert out.isascii()
    assert "\x1b" not in out
    assert run("doctor")[0] == 0


def test_markup_in_a_driver_s_text_is_shown_as_it_is(run: Run, fake: Fake) -> None:
    fake("ghost", absent="use [bold]sudo[/bold] [/] modprobe")
    assert "use [bold]sudo[/bold] [/] modprobe" in " ".join(run("doctor")[1].split())


# The command in a process of its own


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_command_runs_and_imports_torch_only_when_it_must(site: Site) -> None:
    site.add("good")
    done = site.python("-m", "hal_core", "devices", "--json")
    assert [device["id"] for device in json.loads(done.stdout)] == ["good:0"]
    code = "import sys; from hal_core.cli import main; main(['{0}']); sys.exit('torch' in sys.modules)"
    for command in ("devices", "explain"):
        assert site.python("-c", code.format(command)).returncode == 0


def test_debug_shows_the_traceback_of_a_process(site: Site) -> None:
    plain, debug = (site.python("-m", "hal_core", "calibrate", "nobody", HAL_DEBUG=value) for value in ("0", "1"))
    assert (plain.returncode, plain.stderr.count("\n"), "Traceback" in plain.stderr) == (2, 1, False)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_a_plugin_adds_a_command(site: Site) -> None:
    site.add(
        "tool",
        """
        from hal_core import ContractError, hookimpl

        def run(options):
            if options.number == 13:
                raise ContractError("number 13 was given: use a luckier one")
            print("ran with", options.number)
            return 1 if options.number else 0

        @hookimpl
        def hal_commands(subparsers):
            command = subparsers.add_parser("tool", help="a tool")
            command.add_argument("number", type=int)
            command.set_defaults(run=run)
    """,
    )
    results = [site.python("-m", "hal_core", "tool", number) for number in ("0", "5", "13")]
    assert [done.returncode for done in results] == [0, 1, 2]
    assert results[1].stdout == "ran with 5\n"
    assert results[2].stderr == "ContractError: number 13 was given: use a luckier one\n"


def test_a_plugin_s_commands_that_clash_or_raise_leave_the_others(site: Site) -> None:
    hook = "from hal_core import hookimpl\n@hookimpl\ndef hal_commands(subparsers):\n"
    site.add("clash", hook + "    subparsers.add_parser('devices').set_defaults(run=lambda o: 7)")
    site.add("raises", hook + "    raise RuntimeError('no terminal')")
    site.add("fine", hook + "    subparsers.add_parser('fine').set_defaults(run=lambda o: print('fine'))")
    done = site.python("-m", "hal_core", "fine")
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    assert "no terminal" in site.python("-m", "hal_core", "doctor").stdout
    assert site.python("-m", "hal_core", "devices", "--json").returncode == 0


def test_a_reader_that_goes_away_is_no_error(site: Site) -> None:
    for n in range(30):
        site.add(f"device{n}")
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from hal_core.cli import main;"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = site.python("-c", code)
    assert done.returncode in (0, 120), done.stderr
    assert "Traceback" not in done.stderr

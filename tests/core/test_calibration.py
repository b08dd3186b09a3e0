"""Measurements that outlive the process: whole, of this device alone, and used from then on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from fakes import FakeBackend, draw

import hal_core as hal
from hal_core import calibration

Fake = Callable[..., FakeBackend]


class Measured(FakeBackend):
    """A device that measures itself once, and then estimates what it measured."""

    def calibrate(self, device: hal.Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        progress("bandwidth", 0.0)
        progress("done", 1.0)
        return {"seconds": 1e-15, "sizes": [1, 2], "nested": {"a": None}}

    def estimate(self, request: hal.AttentionRequest, device: hal.Device) -> hal.Estimate:
        known = calibration.load_calibration(device)
        seconds, basis = (1e-2, "declared") if known is None else (known.values["seconds"], "measured")
        return hal.Estimate(time=hal.Quantity(seconds, seconds, basis, "assumed"))


@pytest.fixture
def measured(fake: Fake) -> FakeBackend:
    fake("other", time=1e-13)
    backend = Measured("measured")
    hal.register(backend)
    yield backend
    hal.unregister("measured")


def files() -> list[Path]:
    return [path for path in hal.cache_dir().rglob("*") if path.is_file()]


def test_tests_never_touch_the_users_cache(tmp_path: Path) -> None:
    assert hal.cache_dir() == Path(os.environ["HAL_CACHE"])
    assert Path.home() not in hal.cache_dir().parents


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "here"))
    assert hal.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("HAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hal.cache_dir() == tmp_path / "xdg" / "hal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hal.cache_dir() == tmp_path / ".cache" / "hal"
    assert not list(tmp_path.iterdir())  # asking makes nothing


def test_a_calibration_is_stored_and_read_back(measured: FakeBackend) -> None:
    steps: list[tuple[str, float]] = []
    device = measured.devices()[0]
    assert calibration.load_calibration(device) is None
    stored = calibration.calibrate("measured", lambda text, share: steps.append((text, share)))
    assert steps == [("bandwidth", 0.0), ("done", 1.0)]
    assert stored.values == {"seconds": 1e-15, "sizes": [1, 2], "nested": {"a": None}}
    assert calibration.load_calibration(device) == stored
    assert len(files()) == 1
    calibration.calibrate("measured:0")
    assert len(files()) == 1


def test_decisions_use_a_calibration_at_once(measured: FakeBackend, generator: torch.Generator) -> None:
    tensors = draw(generator)
    hal.attention(*tensors)
    assert hal.explain(*tensors).chosen == "other:0"
    calibration.calibrate("measured")
    assert hal.explain(*tensors).chosen == "measured:0"
    hal.attention(*tensors)
    assert len(measured.ran) == 1


def test_another_model_or_driver_has_no_calibration(measured: FakeBackend) -> None:
    calibration.calibrate("measured")
    device = measured.devices()[0]
    assert calibration.load_calibration(attrs.evolve(device, driver="2.0")) is None
    assert calibration.load_calibration(attrs.evolve(device, model="successor")) is None
    assert calibration.load_calibration(device) is not None


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", "{}", '{"format": 99}', "\udcff", '{"format": 1, "fingerprint": 3}']
)
def test_a_damaged_file_counts_as_none_and_is_replaced(measured: FakeBackend, damage: str) -> None:
    calibration.calibrate("measured")
    device = measured.devices()[0]
    (path,) = files()
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert calibration.load_calibration(device) is None
    calibration.calibrate("measured")
    assert calibration.load_calibration(device) is not None


def test_a_file_of_another_device_is_not_believed(measured: FakeBackend) -> None:
    calibration.calibrate("measured")
    (path,) = files()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 16}))
    assert calibration.load_calibration(measured.devices()[0]) is None


def test_what_cannot_be_written_leaves_the_old_file_whole(measured: FakeBackend) -> None:
    stored = calibration.calibrate("measured")
    with pytest.raises(TypeError):
        calibration.save(measured.devices()[0], {"seconds": object()})
    assert calibration.load_calibration(measured.devices()[0]) == stored
    assert len(files()) == 1


def test_threads_that_store_at_once_leave_one_whole_file(measured: FakeBackend) -> None:
    device = measured.devices()[0]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: calibration.save(device, {"n": n, "pad": "x" * 10000}), range(64)))
    found = calibration.load_calibration(device)
    assert found is not None
    assert len(found.values["pad"]) == 10000
    assert len(files()) == 1


def test_a_device_without_calibration_says_so(fake: Fake) -> None:
    fake("plain")
    with pytest.raises(hal.UnsupportedError, match="plain:0 has no calibration"):
        calibration.calibrate("plain")
    with pytest.raises(hal.UnknownBackendError):
        calibration.calibrate("nobody")


DAMAGED: dict[str, Any] = {
    "no values": {"values": {}},
    "text": {"values": "fast"},
    "NaN": {"values": {"seconds": float("nan")}},
    "negative": {"values": {"rates": [1.0, -2.0]}},
    "infinite": {"values": {"nested": {"seconds": float("inf")}}},
    "a date beyond every float": {"created": 10**400},
    "another format": {"format": 99},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_calibration_is_named_once_and_the_device_goes_on(
    measured: FakeBackend, generator: torch.Generator, name: str
) -> None:
    calibration.calibrate("measured")
    (path,) = files()
    data = json.loads(path.read_text()) | DAMAGED[name]
    path.write_text(json.dumps(data))
    hal.configure()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hal.attention(*draw(generator), backend="measured")
        hal.attention(*draw(generator, len_q=40), backend="measured")
    (message,) = [str(w.message) for w in caught if str(path) in str(w.message)]
    assert "run `hal calibrate measured:0`" in message


def test_a_calibration_nested_beyond_the_stack_is_not_used(measured: FakeBackend, generator: torch.Generator) -> None:
    calibration.calibrate("measured")
    (path,) = files()
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    hal.configure()
    with pytest.warns(RuntimeWarning, match="is not used"):
        hal.attention(*draw(generator), backend="measured")


def test_a_pipe_in_the_place_of_a_calibration_does_not_hang(measured: FakeBackend, generator: torch.Generator) -> None:
    calibration.calibrate("measured")
    (path,) = files()
    path.unlink()
    os.mkfifo(path)
    hal.configure()
    with pytest.warns(RuntimeWarning, match="not a regular file"):
        hal.attention(*draw(generator), backend="measured")


def test_a_cache_that_cannot_be_written_is_found_before_anything_is_measured(
    measured: FakeBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "file"))
    steps: list[str] = []
    with pytest.raises(OSError):
        calibration.calibrate("measured", lambda text, share: steps.append(text))
    assert not steps


def test_a_temporary_file_has_a_random_name_and_follows_no_link(tmp_path: Path) -> None:
    target, victim = tmp_path / "out.json", tmp_path / "victim"
    victim.write_text("mine")
    for name in (f"out.json.{os.getpid()}.tmp", ".out.json.tmp"):
        (tmp_path / name).symlink_to(victim)
    calibration.write_whole(target, "written")
    assert (target.read_text(), victim.read_text()) == ("written", "mine")
    assert len(list(tmp_path.iterdir())) == 4

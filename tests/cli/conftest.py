"""The `hal` command as a function, and the core's fake devices."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.registry import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from fakes import FakeBackend, quantity
from hal_cli import main
from installed import Site


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeBackend]]:
    """fake("alpha", time=1e-9, ...): registers a `FakeBackend`, and unregisters it after the test."""
    names: list[str] = []

    def register(name: str, **traits: Any) -> FakeBackend:
        backend = FakeBackend(name, **traits)
        hal.register(backend, name=name)
        names.append(name)
        return backend

    yield register
    for name in names:
        with contextlib.suppress(hal.UnknownBackendError):
            hal.unregister(name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(fake: Callable[..., FakeBackend]) -> FakeBackend:
    """A fast device with a memory, a time and an energy."""
    return fake(
        "toy", device_memory=3 << 30, time=quantity(1e-9), energy=quantity(1e-3, 2e-3, "declared", "vendor-published")
    )


@pytest.fixture
def only_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed backends: `hal doctor` would open each of their devices."""
    every = registry.entries
    monkeypatch.setattr(registry, "entries", lambda: [entry for entry in every() if not entry.distribution])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
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
def site(tmp_path: Path) -> Site:
    """A folder of installed plugins, and processes that see no other."""
    return Site(tmp_path)

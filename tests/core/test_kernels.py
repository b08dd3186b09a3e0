"""Kernels beside attention: found by name, on the device that provides them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend, FakeSession
from installed import Site

import hal_core as hal
from hal_core import UnsupportedError
from hal_core.registry import resolve

Fake = Callable[..., FakeBackend]


class Provider(FakeBackend):
    def kernel_names(self, device: hal.Device) -> frozenset[str]:
        return frozenset({"double"})


class KernelSession(FakeSession):
    def kernel(self, name: str) -> Callable[[float], Any]:
        return lambda x: (self.device.id, name, 2 * x)


@pytest.fixture
def provide() -> Any:
    names: list[str] = []

    def register(name: str, **traits: Any) -> FakeBackend:
        backend = Provider(name, open=KernelSession, **traits)
        hal.register(backend, name=name)
        names.append(name)
        return backend

    yield register
    for name in names:
        hal.unregister(name)


def test_hardware_provides_before_a_simulator(provide: Fake, fake: Fake) -> None:
    fake("aaa_without")
    provide("model", fidelity="simulated")
    provide("silicon")
    assert hal.kernel("double")(3) == ("silicon:0", "double", 6)
    assert hal.kernel("double", "model")(3) == ("model:0", "double", 6)
    assert hal.kernel("double", "silicon:0")(4) == ("silicon:0", "double", 8)


def test_a_kernel_that_nobody_provides_is_refused(provide: Fake, fake: Fake) -> None:
    fake("plain")
    provide("silicon")
    with pytest.raises(UnsupportedError, match="'double' is not provided on plain"):
        hal.kernel("double", "plain")
    with pytest.raises(UnsupportedError, match="'triple' is not provided on any installed device"):
        hal.kernel("triple")
    with pytest.raises(hal.UnknownBackendError, match="did you mean 'silicon'"):
        hal.kernel("double", "silicom")


def test_a_provider_that_raises_does_not_hide_the_others(provide: Fake) -> None:
    broken = provide("aaa_broken")
    broken.kernel_names = lambda device: {}["firmware"]  # type: ignore[attr-defined]
    with pytest.raises(hal.UnsupportedError, match=r"aaa_broken:0 failed \(KeyError: 'firmware'\)"):
        hal.kernel("double")
    provide("silicon")
    assert hal.kernel("double")(3)[0] == "silicon:0"


def test_a_provider_that_does_not_open_does_not_hide_the_others(provide: Fake) -> None:
    broken = provide("aaa_broken")
    broken.open = lambda device: {}["firmware"]  # type: ignore[method-assign]
    provide("silicon")
    assert hal.kernel("double")(3)[0] == "silicon:0"
    with pytest.raises(hal.DeviceUnavailableError, match="firmware"):
        hal.kernel("double", "aaa_broken")


def test_plugins_specify_kernels(tmp_path: Path) -> None:
    site = Site(tmp_path)
    spec = (
        'KernelSpec(name="{n}", signature="s", reference="math:sqrt", sampler="math:pi", tolerance={{"float32": 1e-5}})'
    )
    hook = "from hal_core import KernelSpec, hookimpl\n@hookimpl\ndef hal_kernels():\n    return [{specs}]"
    site.add("one", hook.format(specs=spec.format(n="sort") + "," + spec.format(n="softmax")))
    site.add("two", hook.format(specs=spec.format(n="fft")))
    got = site.run("""
        import json, sys, hal_core as hal
        from hal_core.registry import registry
        try:
            hal.kernel("fft")
        except hal.UnsupportedError as error:
            print(json.dumps([sorted(registry.kernel_specs()), str(error), "torch" in sys.modules]))
    """)
    assert got[0] == ["fft", "linear", "matmul", "softmax", "sort"]
    assert "specified kernels are fft, linear, matmul, softmax, sort" in got[1]
    assert got[2] is False


def test_targets_are_resolved_by_name() -> None:
    assert resolve("fakes:FakeBackend.devices") is FakeBackend.devices
    with pytest.raises(AttributeError):
        resolve("fakes:Nothing")
    with pytest.raises(ModuleNotFoundError):
        resolve("no_such_module:x")

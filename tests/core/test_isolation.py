"""What one plugin, one device or one process does never takes another's along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from installed import Site

RUN = """
import json, sys, torch, hal_core as hal
q = torch.randn(1, 2, 3, 4)
"""
FINE = RUN + "hal.attention(q, q, q)\nprint(json.dumps([d.id for d in hal.devices()]))"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.add("good", time=1e-9)
    return made


@pytest.mark.parametrize("raised", ["BaseException('x')", "GeneratorExit", "KeyboardInterrupt"])
def test_whatever_an_import_raises_the_others_work(site: Site, raised: str) -> None:
    site.add("bad", f"raise {raised}")
    assert site.run(FINE) == ["good:0"]


INTERRUPTED = """
import threading, _thread
threading.Timer(0.7, _thread.interrupt_main).start()
try:
    hal.devices()
    interrupted = False
except KeyboardInterrupt:
    interrupted = True
print(json.dumps([interrupted, sorted(d.id for d in hal.devices())]))
"""


def test_a_user_s_interrupt_while_a_plugin_is_imported_is_the_user_s(site: Site) -> None:
    site.add("slow", None)
    module = site.folder / "slow_hook.py"
    module.write_text("import time\ntime.sleep(2)\n" + module.read_text())
    assert site.run("import json, hal_core as hal\n" + INTERRUPTED) == [True, ["good:0", "slow:0"]]


def test_an_import_that_hangs_is_given_up_after_its_limit(site: Site) -> None:
    site.add("slow", "import time\ntime.sleep(1000)")
    code = "import hal_core.plugins as p\np.IMPORT_SECONDS = 0.5\n" + FINE
    assert site.run(code) == ["good:0"]


@pytest.mark.parametrize("field", ["priority='high'", "install_hint=5", "name='Bad Name'"])
def test_a_malformed_spec_is_its_plugin_s_failure(site: Site, field: str) -> None:
    given = {"name": "'bad'", "target": "'bad_device:Backend'"} | dict([field.split("=")])
    spec = ", ".join(f"{key}={value}" for key, value in given.items())
    site.add("bad", f"from hal_core import *\n@hookimpl\ndef hal_backends():\n    return [BackendSpec({spec})]")
    assert site.run(FINE) == ["good:0"]


@pytest.mark.parametrize(
    "device",
    [
        "Backend.open = lambda self, device: None",
        "Backend.check = lambda self, request, device: [1, 'x']",
        "Backend.devices = lambda self: [5]",
        "Backend.why_absent = lambda self: 1 / 0\nBackend.devices = lambda self: []",
        "Backend.estimate = lambda self, request, device: 'soon'",
    ],
)
def test_a_backend_that_breaks_its_contract_leaves_automatic_calls_alone(site: Site, device: str) -> None:
    site.add("bad", None, device, time=1e-12)
    assert "good:0" in site.run(FINE)
    code = RUN + "try:\n    hal.session('bad')\nexcept hal.HalError as error:\n    print(json.dumps(str(error)))\n"
    if "open" in device or "why_absent" in device or "devices" in device:
        assert site.run(code)


def test_two_specifications_of_one_kernel_name_both_plugins(site: Site) -> None:
    spec = (
        'KernelSpec(name="fft", signature="s", reference="math:sqrt", sampler="math:pi", tolerance={"float32": 1e-5})'
    )
    for name in ("one", "two"):
        site.add(name, f"from hal_core import KernelSpec, hookimpl\n@hookimpl\ndef hal_kernels():\n    return [{spec}]")
    code = """
        import json
        from hal_core.registry import registry
        failures = [p.failure for p in registry.plugin_list() if p.failure]
        print(json.dumps([f.message for f in failures if f.stage == "hook"]))
    """
    (message,) = site.run(code)
    assert "hal-one 1.0" in message
    assert "hal-two 1.0" in message


@pytest.mark.parametrize(
    ("allowed", "imported"),
    [("cpu", False), ("CPU", False), ("aaa-evil:cpu", True), ("AAA_Evil:cpu", True), ("good", False)],
)
def test_a_plain_name_allows_the_known_distribution_alone(site: Site, allowed: str, imported: bool) -> None:
    other = site.folder / "aaa_evil-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa-evil\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[hal.plugins]\ncpu = evil_hook\n")
    (site.folder / "evil_hook.py").write_text("open('imported', 'w').close()")
    site.run("import json, hal_core as hal\nprint(json.dumps([d.id for d in hal.devices()]))", HAL_PLUGINS=allowed)
    assert (site.folder / "imported").exists() == imported


@pytest.mark.parametrize(
    ("variables", "plugin", "fix"),
    [
        ({"HAL_PLUGINS": "other"}, "good", "add good to HAL_PLUGINS"),
        ({"HAL_PLUGINS": "good"}, "joined", "add hal-good:joined to HAL_PLUGINS"),
        ({"HAL_DISABLE": "good"}, "good", "remove good from HAL_DISABLE"),
    ],
)
def test_a_plugin_that_is_switched_off_says_what_to_change(
    site: Site, variables: dict[str, str], plugin: str, fix: str
) -> None:
    site.add("joined", distribution="good")
    code = RUN + f"try:\n    hal.device({plugin!r})\nexcept hal.HalError as error:\n    print(json.dumps(str(error)))\n"
    assert fix in site.run(code, **variables)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("import json\ndef flops(r): return json.loads(r.flops)\n", "bad_device.py:"),
        ("def flops(r): return hal.Quantity(2, 1, 'declared', 'assumed')\n", "(flops)"),
    ],
)
def test_a_plugin_that_raises_is_told_its_own_line(site: Site, device: str, says: str) -> None:
    """The innermost line of the plugin, though the core or a library raised further in."""
    site.add("bad", None, device + "Backend.estimate = lambda self, request, device: flops(request)", time=1e-12)
    code = RUN + "try:\n    hal.attention(q, q, q, backend='bad')\nexcept hal.HalError as error:\n"
    code += "    print(json.dumps(str(error)))"
    message = site.run(code)
    assert ", raised in " in message
    assert says in message
    assert "(flops)" in message
    assert "if this plugin is yours, mend it; otherwise upgrade or uninstall hal-bad 1.0" in message


def test_a_typing_error_at_import_is_told_its_line(site: Site) -> None:
    site.add("bad", None, "Backend.dtypes = hal.no_such_name")
    code = RUN + "try:\n    hal.device('bad')\nexcept hal.HalError as error:\n    print(json.dumps(str(error)))"
    assert "bad_device.py:" in (message := site.run(code))
    assert "(<module>)" in message


def test_no_plugin_displaces_the_backend_of_the_distribution_with_its_name(site: Site) -> None:
    site.add(
        "aaa",
        "from hal_core import *\n@hookimpl\ndef hal_backends():\n    return [BackendSpec(name='good', target='x:y')]",
    )
    assert site.run(FINE) == ["good:0"]


FORK = """
import json, os, sys, threading, torch, hal_core as hal
from hal_core.registry import registry
q = torch.randn(1, 2, 3, 4)
hal.attention(q, q, q)
with registry._lock, registry.entry("good").lock:  # as another thread would hold them while it opens a device
    read, write = os.pipe()
    def child():
        pid = os.fork()
        if pid == 0:
            hal.attention(q, q, q)
            os.write(write, b"ran")
            os._exit(0)
        os.waitpid(pid, 0)
    thread = threading.Thread(target=child)
    thread.start()
    thread.join(60)
os.set_blocking(read, False)
print(json.dumps(os.read(read, 10).decode()))
"""


def test_a_forked_child_works_though_other_threads_held_the_locks(site: Site) -> None:
    assert site.run(FORK) == "ran"


def test_a_device_that_opens_slowly_does_not_hold_up_another(site: Site) -> None:
    slow = (
        "import time\nopened = Backend.open\nBackend.open = lambda self, device: time.sleep(3) or opened(self, device)"
    )
    site.add("slow", None, slow, time=1.0)
    code = """
import json, threading, time, torch, hal_core as hal
from hal_core.registry import registry
q = torch.randn(1, 2, 3, 4)
hal.attention(q, q, q, backend="good")
registry.entry("slow").sessions.clear()
order = []
def slow():
    hal.session("slow")
    order.append("slow")
thread = threading.Thread(target=slow)
thread.start()
time.sleep(0.2)
hal.attention(q[:, :1], q[:, :1], q[:, :1], backend="good")
order.append("good")
thread.join()
print(json.dumps(order))
"""
    assert site.run(code) == ["good", "slow"]


def test_a_device_id_is_no_prefix_of_another(site: Site) -> None:
    code = """
import json, hal_core as hal
try:
    hal.device('good:10')
except hal.HalError as error:
    print(json.dumps(str(error)))
"""
    message: Any = site.run(code)
    assert "good has good:0" in message

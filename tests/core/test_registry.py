"""One broken plugin never breaks another, and is never forgotten: real entry points, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed import Site

COUNTED = """
open(__file__ + ".count", "a").write("x")
raise ImportError("libtoy.so.7: cannot open shared object file")
"""

#: Broken plugins: (hook module, addition to the device's module, where it breaks, last line of what went wrong).
BROKEN: dict[str, tuple[str | None, str, str, str]] = {
    "bad_import": ("import a_library_that_is_not_there", "", "import", "No module named 'a_library_that_is_not_there'"),
    "bad_exit": ("raise SystemExit('no licence found')", "", "import", "no licence found"),
    "bad_syntax": ("def hal_backends(:", "", "import", "SyntaxError: invalid syntax"),
    "bad_hook": (
        "from hal_core import hookimpl\n@hookimpl\ndef hal_backends():\n    raise KeyError('drivers')",
        "",
        "hook",
        "KeyError: 'drivers'",
    ),
    "bad_arguments": (
        "from hal_core import hookimpl\n@hookimpl\ndef hal_backends(colour):\n    return []",
        "",
        "hook",
        "colour",
    ),
    "bad_return": (
        "from hal_core import hookimpl\n@hookimpl\ndef hal_backends():\n    return 'cuda'",
        "",
        "hook",
        "return a list of BackendSpec",
    ),
    "bad_api": (
        "from hal_core import *\n@hookimpl\ndef hal_backends():\n"
        "    return [BackendSpec(name='bad_api', target='bad_api_device:Backend', api=(2, 0))]",
        "",
        "api",
        "written for plugin contract 2.0, this core has 1.1",
    ),
    "bad_minor": (
        "from hal_core import *\n@hookimpl\ndef hal_backends():\n"
        "    return [BackendSpec(name='bad_minor', target='bad_minor_device:Backend', api=(1, 99))]",
        "",
        "api",
        "written for plugin contract 1.99, this core has 1.1",
    ),
    "bad_target": (None, COUNTED, "target", "libtoy.so.7: cannot open shared object file"),
    "bad_init": (None, "Backend.__init__ = lambda self: 1 / 0", "target", "division by zero"),
    "bad_devices": (None, "Backend.devices = lambda self: 1 / 0", "devices", "division by zero"),
    "bad_ids": (None, "Backend.name = 'other'", "devices", "device ids ['other:0'] were given"),
    "bad_open": (None, "Backend.open = lambda self, device: {}['firmware']", "open", "KeyError: 'firmware'"),
    "bad_check": (None, "Backend.check = lambda self, request, device: 1 / 0", "check", "division by zero"),
    "bad_estimate": (None, "Backend.estimate = lambda self, request, device: None", "check", "NoneType"),
}
TWIN = "from hal_core import *\n@hookimpl\ndef hal_backends():\n    return [BackendSpec(name='twin', target='x:y')]"

ATTEND = """
import json, torch, hal_core as hal
q = torch.randn(1, 2, 3, 4)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
def run(**wish):
    try:
        with hal.meter() as m:
            return [str(bool((hal.attention(q, q, q, **wish) - want).norm() < 1e-5)), *m.records]
    except hal.HalError as error:
        return [type(error).__name__, str(error)]
"""


DECIDE = """
import json, hal_core as hal
from hal_core.registry import registry
from hal_core.options import merged_policy
from hal_core.selection import decide
def run(**wish):
    wishes = (wish.get(name) for name in ("backend", "objective", "allow_simulated", "transfer"))
    return decide(hal.AttentionRequest(1, 2, 2, 3, 3, 4, 4, "float32"), merged_policy(*wishes))
def kept():
    return [p.failure for p in registry.plugin_list() if p.failure and p.failure.stage != "disabled"]
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def crowd(site: Site) -> Site:
    """Two good plugins among every broken one. The broken devices claim to be faster."""
    site.add("good", time=1e-9)
    site.add("good_too", time=1e-8)
    for name, (hook, device, *_) in BROKEN.items():
        site.add(name, hook, device, time=1e-12)
    site.add("twin_one", TWIN)
    site.add("twin_two", TWIN)
    return site


def doctor(site: Site, **variables: str) -> dict[str, dict[str, str]]:
    """Everything that `hal doctor --json` reports as failed, by name."""
    report = site.run("import hal_core.cli as c; c.main(['doctor', '--json'])", **variables)
    failed = {p["name"]: p["failure"] for p in report["plugins"] if p["failure"]}
    for backend in report["backends"]:
        failed |= {backend["name"]: backend["failure"]} if backend["failure"] else {}
        failed |= {device.partition(":")[0]: failure for device, failure in backend["broken"].items()}
    return failed


def test_broken_plugins_leave_the_good_ones_working(crowd: Site) -> None:
    got = crowd.run(
        ATTEND + "print(json.dumps([run(), run(), run(backend='good_too'), [d.id for d in hal.devices()]]))"
    )
    assert got[0] == ["True", "good:0"]
    assert got[1] == ["True", "good:0"]
    assert got[2] == ["True", "good_too:0"]
    assert {"good:0", "good_too:0"} <= set(got[3])


def test_the_doctor_names_every_broken_plugin_with_its_last_line_and_a_fix(crowd: Site) -> None:
    failed = doctor(crowd)
    for name, (*_, stage, line) in BROKEN.items():
        assert failed[name]["stage"] == stage, name
        assert line in failed[name]["message"], name
        assert failed[name]["fix"], name
    for name in ("twin", "twin_one", "twin_two"):
        assert "hal-twin_one 1.0" in failed.get(name, failed["twin"])["message"]
        assert "hal-twin_two 1.0" in failed.get(name, failed["twin"])["message"]
    assert not {"good", "good_too"} & set(failed)
    assert "Traceback" in failed["bad_hook"]["traceback"]


def test_the_doctor_says_it_all_as_text_too(crowd: Site) -> None:
    done = crowd.python("-m", "hal_core", "doctor")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for name, (*_, line) in BROKEN.items():
        assert name in text
        assert " ".join(line.split()) in text, name
    assert "hal-twin_one 1.0 and by hal-twin_two 1.0" in text
    assert "good:0" in text


@pytest.mark.parametrize("name", [*BROKEN, "twin"])
def test_strict_raises_what_is_otherwise_kept(site: Site, name: str) -> None:
    if name == "twin":
        site.add("twin_one", TWIN)
        site.add("twin_two", TWIN)
    else:
        site.add(name, *BROKEN[name][:2])
    done = site.python("-m", "hal_core", "doctor", HAL_STRICT="1")
    assert done.returncode == 2
    assert "PluginError" in done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_a_broken_backend_names_the_reason_every_time(crowd: Site) -> None:
    names = ["bad_target", "bad_open", "bad_check", "bad_api", "bad_import", "twin", "bad_init"]
    got = crowd.run(ATTEND + f"print(json.dumps({{n: [run(backend=n), run(backend=n)] for n in {names}}}))")
    for name in names:
        line = "is offered by" if name == "twin" else BROKEN[name][3]
        for kind, message in got[name]:
            assert kind in ("DeviceUnavailableError", "UnknownBackendError", "UnsupportedError"), (name, kind)
            assert line in message, (name, message)


def test_a_target_that_cannot_be_imported_is_tried_once(site: Site) -> None:
    site.add("good", time=1e-9)
    site.add("bad_target", *BROKEN["bad_target"][:2], time=1e-12)
    site.run(ATTEND + "[run() for _ in range(3)]; [run(backend='bad_target') for _ in range(3)]; print(0)")
    assert (site.folder / "bad_target_device.py.count").read_text() == "x"


def test_a_device_that_does_not_open_is_opened_once(site: Site) -> None:
    site.add("good", time=1e-9)
    opens = "Backend.open = lambda self, device: open('opened', 'a').write('x') and {}['firmware']"
    site.add("bad_open", None, opens, time=1e-12)
    site.run(ATTEND + "[run() for _ in range(3)]; [run(backend='bad_open') for _ in range(3)]; print(0)")
    assert (site.folder / "opened").read_text() == "x"


def test_a_check_that_raises_refuses_this_request_and_is_asked_again_at_the_next(site: Site) -> None:
    site.add("good", time=1e-9)
    checks = "Backend.check = lambda self, request, device: open('checked', 'a').write('x') and 1 / 0"
    site.add("bad_check", None, checks, time=1e-12)
    got = site.run(ATTEND + "print(json.dumps([run(), run(), run(backend='bad_check')]))")
    assert got[:2] == [["True", "good:0"]] * 2
    assert len((site.folder / "checked").read_text()) >= 3


def test_a_broken_entry_point_does_not_take_its_distribution_s_others_along(site: Site) -> None:
    site.add("a_good")
    site.add("z_bad", "raise ValueError('half an upgrade')", distribution="a_good")
    got = site.run("import json, hal_core as h; print(json.dumps([d.id for d in h.devices()]))")
    assert got == ["a_good:0"]


def test_what_a_broken_plugin_offered_before_it_broke_is_taken_back(site: Site) -> None:
    site.add(
        "half",
        """
        from hal_core import *
        @hookimpl
        def hal_backends():
            return [BackendSpec(name="half", target="half_device:Backend")]
        @hookimpl
        def hal_kernels():
            yield KernelSpec(name="k", signature="", reference="a:b", sampler="a:b", tolerance={})
            raise ValueError("no more")
    """,
    )
    got = site.run(
        """
        import json
        from hal_core.registry import registry
        print(json.dumps([[d.id for d in registry.devices()], list(registry.kernel_specs())]))
    """
    )
    assert got == [[], ["matmul", "linear"]]  # the core's own


IMPORTED = (
    "import json, sys, hal_core as h; ids = [d.id for d in h.devices()]; print(json.dumps([ids, list(sys.modules)]))"
)


@pytest.mark.parametrize(
    "variables",
    [{"HAL_PLUGINS": "good"}, {"HAL_PLUGINS": "good, other", "HAL_DISABLE": "other"}, {"HAL_DISABLE": "other,cpu,nn"}],
)
def test_a_plugin_that_is_switched_off_is_not_even_imported(site: Site, variables: dict[str, str]) -> None:
    site.add("good")
    site.add("other")
    ids, modules = site.run(IMPORTED, **variables)
    assert ids == ["good:0"]
    assert "good_hook" in modules
    assert not [m for m in modules if m.startswith("other")]
    assert doctor(site, **variables)["other"]["stage"] == "disabled"


def test_an_empty_allow_list_allows_nothing(site: Site) -> None:
    site.add("good")
    ids, modules = site.run(IMPORTED, HAL_PLUGINS="")
    assert ids == []
    assert "good_hook" not in modules


def test_discovery_imports_light_modules_and_nothing_else(crowd: Site) -> None:
    ids, modules = crowd.run(
        "import json, sys, hal_core as h; from hal_core.registry import registry;"
        "names = [e.spec.name for e in registry.entries()]; print(json.dumps([names, list(sys.modules)]))"
    )
    assert {"good", "good_too", "bad_open"} <= set(ids)
    heavy = {"torch", "numpy", "triton", "cupy", "vulkan", "pyopencl", "rich"}
    assert not heavy & set(modules)
    assert not [m for m in modules if m.endswith("_device")]
    assert "hal_core.testing.reference" not in modules


def test_importing_the_core_discovers_nothing(crowd: Site) -> None:
    modules = crowd.run("import json, sys, hal_core; print(json.dumps(list(sys.modules)))")
    assert not [m for m in modules if m.endswith("_hook")]
    assert "torch" not in modules


def test_threads_that_ask_while_plugins_load_see_all_of_them(site: Site) -> None:
    for n in range(6):
        site.add(
            f"slow{n}",
            "import time; time.sleep(0.05)\n"
            + f"""
from hal_core import BackendSpec, hookimpl
@hookimpl
def hal_backends():
    return [BackendSpec(name="slow{n}", target="slow{n}_device:Backend")]
""",
        )
    got = site.run(
        """
        import json, time, hal_core as hal
        from concurrent.futures import ThreadPoolExecutor
        def ask(n):
            time.sleep(n * 0.02)
            return len(hal.devices())
        with ThreadPoolExecutor(8) as threads:
            print(json.dumps(list(threads.map(ask, range(8)))))
    """,
        HAL_PLUGINS=",".join(f"slow{n}" for n in range(6)),
    )
    assert got == [6] * 8


def test_a_plugin_may_ask_for_devices_while_it_is_imported(site: Site) -> None:
    site.add(
        "asks",
        "import hal_core\nhal_core.devices()\n"
        + "from hal_core import *\n@hookimpl\ndef hal_backends():\n    return []",
    )
    site.add("good")
    assert site.run(IMPORTED, HAL_PLUGINS="asks,good")[0] == ["good:0"]


def test_two_plugins_of_one_name_are_both_shown(site: Site) -> None:
    site.add("good")
    other = Site(site.folder / "more")
    other.folder.mkdir()
    other.add("good", distribution="copy")
    report = site.run(
        "import hal_core.cli as c; c.main(['doctor', '--json'])",
        PYTHONPATH=f"{site.folder}:{other.folder}",
        HAL_PLUGINS="good,hal-copy:good",
    )
    messages = [p["failure"]["message"] for p in report["plugins"] if p["failure"] and p["name"] == "good"]
    assert len(messages) == 1
    assert "hal-good 1.0" in messages[0]
    assert "hal-copy 1.0" in messages[0]
    assert any(device["id"] == "good:0" for backend in report["backends"] for device in backend["devices"])


@pytest.mark.parametrize("hook", ["hal_policy", "hal_decision", "hal_commands"])
@pytest.mark.parametrize("error", ["1 / 0", "raise SystemExit(3)"])
def test_a_hook_that_raises_when_it_is_called_is_isolated_and_kept(site: Site, hook: str, error: str) -> None:
    site.add("good")
    site.add("worse", time=1e-3)  # a choice, so that the policy is asked
    body = f"    open('called', 'a').write('x')\n    {error}"
    site.add("raising", f"from hal_core import hookimpl\n@hookimpl\ndef {hook}():\n{body}")
    chosen, codes, failures = site.run(
        DECIDE
        + """
import contextlib, io
from hal_core.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main(["devices"]), main(["devices"])]
print(json.dumps([[run().chosen, run(objective="error").chosen], codes, [(f.name, f.stage) for f in kept()]]))
"""
    )
    assert chosen == ["good:0", "good:0"]
    assert codes == [0, 0]
    assert failures == [["raising", f"hook {hook}"]]
    assert (site.folder / "called").read_text() == "x"


def test_a_policy_decides_among_candidates(site: Site) -> None:
    site.add("good")
    site.add("worse", time=1e-3)
    policy = "from hal_core import *\n@hookimpl\ndef hal_policy(candidates):\n    return candidates[-1].device.id"
    site.add("policy", policy)
    got = site.run(DECIDE + "print(json.dumps([run().chosen, run().reason]))")
    assert got[0] == "worse:0"
    assert "policy" in got[1]


def test_a_policy_may_leave_the_choice_to_the_next(site: Site) -> None:
    site.add("good")
    site.add("worse", time=1e-3)
    site.add("a_policy", "from hal_core import *\n@hookimpl\ndef hal_policy():\n    return None")
    site.add("b_policy", "from hal_core import *\n@hookimpl\ndef hal_policy():\n    return 'worse:0'")
    assert site.run(DECIDE + "print(json.dumps(run().chosen))") == "worse:0"


def test_a_policy_that_names_no_candidate_is_recorded_and_not_followed(site: Site) -> None:
    site.add("good")
    site.add("worse", time=1e-3)
    site.add("wild", "from hal_core import *\n@hookimpl\ndef hal_policy():\n    return 'warp:0'")
    got = site.run(DECIDE + "print(json.dumps([run().chosen, [f.message for f in kept()]]))")
    assert got[0] == "good:0"
    assert "warp:0" in got[1][0]


def test_observers_see_every_decision(site: Site) -> None:
    site.add("good")
    body = "    open('seen', 'a').write(decision.chosen + ' ')"
    watch = f"from hal_core import *\n@hookimpl\ndef hal_decision(decision):\n{body}"
    site.add("watch", watch)
    site.run(DECIDE + "run(); run(); print(0)")
    assert (site.folder / "seen").read_text() == "good:0 good:0 "

"""What the access policy allows, denies, limits and admits, and what `hal access check` says of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

SECRET = hashlib.sha256(b"open sesame").hexdigest()
POLICY = f"""
[default]
devices = ["open:*"]
[callers.trainer]
secret = "{SECRET}"
devices = ["*"]
kernels = ["*"]
register = true
"""
#: A session whose function a test may replace, in the place of the device's own.
REPLACEABLE = """
def attend(query, key, value, mask, request):
    return (query @ key.mT * request.effective_scale).softmax(-1) @ value, None

def _open(self, device):
    return hal.SimpleSession(lambda *given: attend(*given))

Backend.open = _open
Backend.kernel_names = lambda self, device: frozenset({"matmul"})
"""
RUN = """
import json, hal_core as hal
from hal_core.plugin_api import decide, merged_policy
def request(length=64):
    return hal.AttentionRequest(1, 1, 1, length, length, 64, 64, "float32", "cpu")
def outcome(f):
    try:
        found = f()
        return getattr(found, "chosen", "done")
    except hal.HalError as error:
        return type(error).__name__
def chosen(name=None, length=64):
    return decide(request(length), merged_policy(name, allow_simulated=True)).chosen
"""


def allow(site: Any, text: str) -> dict[str, str]:
    path = Path(site.folder) / "access.toml"
    path.write_text(text)
    path.chmod(0o600)
    return {"HAL_ACCESS": str(path)}


def test_none_of_500_attempts_around_the_policy_gets_through(site: Any) -> None:
    site.add("open", time=1e-6)
    site.add("secret", device=REPLACEABLE, time=1e-9)
    script = Path(__file__).with_name("access_attempts.py")
    found = site.run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", **allow(site, POLICY))
    assert found["attempts"] == 500
    assert found["breaches"] == []
    assert found["used"], "the allowed caller must have used the device meanwhile"
    assert sum(found["outcomes"].values()) == 500
    assert found["outcomes"]["AccessDeniedError"] > 100


def test_a_caller_with_a_secret_is_admitted_by_it_alone(site: Any) -> None:
    site.add("secret")
    code = """
    def called(*given):
        with hal.caller(*given):
            return outcome(lambda: hal.session("secret"))
    print(json.dumps([called("trainer", "open sesame"), outcome(lambda: called("trainer")), called("guest")]))
    """
    assert site.run(RUN + code.replace("\n    ", "\n"), **allow(site, POLICY)) == [
        "done",
        "AccessDeniedError",
        "AccessDeniedError",
    ]


def test_plugins_that_are_not_listed_are_not_imported(site: Any) -> None:
    site.add("open")
    site.add("other", "raise SystemExit('this was imported')")
    policy = allow(site, 'plugins = ["open"]\n[default]\ndevices = ["*"]\n')
    code = """
from hal_core.plugin_api import registry
print(json.dumps([[p.name, p.failure and p.failure.message] for p in registry.plugin_list() if p.name in "open other"]))
"""
    assert site.run(RUN + code, **policy) == [["open", None], ["other", "switched off by the access policy"]]
    damaged = allow(site, "plugins = 5")
    assert site.run(RUN + code, **damaged)[0] == ["open", "switched off by the access policy"]


def test_a_required_plugin_that_is_absent_or_switched_off_denies_everything(site: Any) -> None:
    site.add("open")
    code = "print(json.dumps([chosen(), outcome(lambda: hal.session('open'))]))"
    text = 'required = ["telemetry"]\n[default]\ndevices = ["*"]\n'
    assert site.run(RUN + code, **allow(site, text)) == ["open:0", "done"]
    denied = [None, "AccessDeniedError"]
    assert site.run(RUN + code, HAL_DISABLE="telemetry", **allow(site, text)) == denied
    assert site.run(RUN + code, **allow(site, text.replace("telemetry", "guard"))) == denied


def test_memory_time_and_simulated_devices_are_limited_for_a_caller(site: Any) -> None:
    site.add(
        "open",
        device="""
        def estimate(self, request, device):
            seconds = request.len_q / 1000
            return hal.Estimate(time=hal.Quantity(seconds, seconds, "declared", "assumed"), memory=request.len_q * 1000)

        Backend.estimate = estimate
        """,
    )
    site.add(
        "toy",
        device="""
        import attrs
        real = Backend.devices
        Backend.devices = lambda self: [attrs.evolve(real(self)[0], fidelity="simulated")]
        """,
        time=1.0,
    )
    policy = """
[default]
devices = ["*"]
[callers.slow]
devices = ["open:0"]
seconds = 0.1
[callers.small]
devices = ["open:0"]
memory = 100_000
[callers.real]
devices = ["*"]
simulated = false
"""
    code = """
def called(name, *given):
    with hal.caller(name):
        return chosen(*given)
def why(name):
    with hal.caller(name):
        return [str(r.code) for r in decide(request(200), merged_policy("open")).candidates[0].refusals]
with hal.caller("small"):
    limit = outcome(lambda: decide(request(200), merged_policy("open")).winner)
with hal.caller("real"):
    opened = outcome(lambda: hal.session("toy"))
print(json.dumps([called("slow", None, 100), called("slow", None, 101), why("slow"), called("small", None, 100),
    called("small", None, 101), why("small"), limit, called("real", "toy"), opened, called("", "toy"),
    called("", None, 10_000)]))
"""
    assert site.run(RUN + code, **allow(site, policy)) == [
        *["open:0", None, ["access"], "open:0", None, ["memory"], "MemoryLimitError"],
        *[None, "AccessDeniedError", "toy:0", "toy:0"],
    ]


@pytest.mark.parametrize(
    "rule",
    [
        "memory = 0",
        "memory = 1.5",
        "seconds = -1",
        "seconds = nan",
        "seconds = true",
        "simulated = 1",
        "secret = 5",
        "devices = [1]",
        "speed = 3",
    ],
)
def test_a_rule_of_a_wrong_kind_denies_everything_and_is_named(tmp_path: Path, rule: str) -> None:
    from hal_core.plugin_api import AccessPolicy

    path = tmp_path / "access.toml"
    path.write_text(f'[default]\ndevices = ["*"]\n{rule}\n' if "devices" not in rule else f"[default]\n{rule}\n")
    path.chmod(0o600)
    problem = AccessPolicy(str(path)).problem
    assert rule.partition(" ")[0] in problem
    assert "everything is denied" in problem
    path.write_text(f"{rule}\n")
    assert "everything is denied" in AccessPolicy(str(path)).problem


def test_the_machine_s_policy_is_not_replaced_by_the_environment(tmp_path: Path, monkeypatch: Any) -> None:
    from hal_core import access

    machine, own = tmp_path / "machine.toml", tmp_path / "own.toml"
    own.write_text('[default]\ndevices = ["*"]\n')
    monkeypatch.setattr(access, "DEFAULT_FILE", str(machine))
    monkeypatch.setenv("HAL_ACCESS", str(own))
    assert access.read_policy().path == str(own)
    machine.write_text("[default]\ndevices = []\n")
    assert access.read_policy().path == str(machine)


def test_denials_are_counted_and_audited(site: Any, tmp_path: Path) -> None:
    site.add("secret")
    code = """
import hal_telemetry
hal_telemetry.enable(audit="audit")
print(json.dumps([outcome(lambda: hal.session("secret")), outcome(lambda: hal.caller("trainer", "guess")),
    [line for line in hal_telemetry.metrics_text().splitlines() if line.startswith("hal_access_denied_total")],
    open(next(p for p in __import__("glob").glob("audit/*.jsonl"))).read()]))
"""
    session, caller, metrics, log = site.run(RUN + code, **allow(site, POLICY))
    assert (session, caller) == ("AccessDeniedError", "AccessDeniedError")
    assert metrics == ['hal_access_denied_total{kind="devices"} 1.0', 'hal_access_denied_total{kind="callers"} 1.0']
    assert '"event":"denied","caller":"","kind":"devices","asked":"secret:0"' in log


def check(policy: str, folder: Path) -> Any:
    import hal_telemetry

    path = folder / "access.toml"
    path.write_text(policy)
    path.chmod(0o600)
    return hal_telemetry.check_policy(path)


def test_a_check_shows_who_may_use_what_and_advises(tmp_path: Path) -> None:
    report = check(
        '[default]\ndevices = ["cpu:0"]\nmemory = 1000\n[callers.a]\ndevices = ["*"]\n'
        '[callers.b]\nkernels = ["matmul"]\n',
        tmp_path,
    )
    assert report.problem == ""
    assert report.mistakes == []
    assert ("everybody else", "cpu:0", "yes", "1,000", "") in report.rows
    assert ("everybody else", "kpu:0", "no", "1,000", "") in report.rows
    assert ("a", "kpu:0", "yes", "", "") in report.rows
    assert any("any code may call itself 'a'" in line and "kpu:0" in line for line in report.advice)
    assert any("a thread inherits no caller, so 'b' may use cpu:0" in line for line in report.advice)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ('[default]\ndevices = ["cpuu:*"]', "devices 'cpuu:*' is no name here"),
        ('[default]\ndevices = ["*"]\nkernels = ["matmull"]', "kernels 'matmull' is no name here"),
        ('plugins = ["cpux"]\n[default]\ndevices = ["*"]', "plugins 'cpux' is no plugin here"),
        ('plugins = ["cpu"]\nrequired = ["kpu"]\n[default]\ndevices = ["*"]', "not among plugins, so everything"),
        ('[callers.a]\ndevices = ["kpu:0"]\nsimulated = false', "nobody can satisfy it"),
        ('[callers.a]\ndevices = ["*"]\nsecret = "xyz"', "nobody has such a secret"),
        ('[default]\ndevices = ["*"]\nsecret = "' + SECRET + '"', "[default] has a secret"),
        ('[default]\ndevices = ["*"]\n[audit]\nfolder = "/dev/null/audit"', "'/dev/null/audit' cannot be written"),
    ],
)
def test_a_check_finds_names_of_nothing_and_rules_that_nobody_satisfies(tmp_path: Path, policy: str, said: str) -> None:
    assert any(said in line for line in check(policy, tmp_path).mistakes)


def test_a_check_says_what_is_wrong_with_a_damaged_policy(tmp_path: Path) -> None:
    assert "device = ['*']" in check("[default]\ndevice = ['*']", tmp_path).problem

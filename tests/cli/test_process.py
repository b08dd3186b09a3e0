"""The `hal` command in a process of its own, with plugins of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from installed import Site


def test_the_command_runs_and_imports_torch_only_when_it_must(site: Site) -> None:
    site.add("good")
    done = site.python("-m", "hal_core", "devices", "--json")
    assert [device["id"] for device in json.loads(done.stdout)] == ["good:0"]
    code = "import sys; from hal_cli import main; main(['{0}']); sys.exit('torch' in sys.modules)"
    for command in ("devices", "explain"):
        assert site.python("-c", code.format(command)).returncode == 0


PLUGINS = [f"{point.dist.name}:{point.name}" for point in entry_points(group="hal.plugins") if point.dist]


@pytest.mark.parametrize("plugin", sorted(PLUGINS))
def test_an_installed_plugin_needs_no_torch_to_list_and_explain(plugin: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hal_cli import main\n"
        "for words in (['devices'], ['devices', '--json'], ['explain', '--allow-simulated']): main(words)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HAL_PLUGINS": plugin, "HAL_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_imports_neither_torch_nor_a_backend(site: Site) -> None:
    site.add("good")
    code = (
        "import sys; from hal_cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'good_device'} & set(sys.modules)) or 0)"
    )
    done = site.python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_hal_cli_the_core_says_what_to_install(site: Site) -> None:
    code = "import sys, runpy; sys.modules['hal_cli'] = None; runpy.run_module('hal_core', run_name='__main__')"
    done = site.python("-c", code)
    assert done.returncode == 1
    assert done.stderr == "the hal command is not installed: pip install 'hal-core[cli]'\n"


def test_the_old_names_give_the_new_objects_with_a_warning(site: Site) -> None:
    done = site.python(
        "-W",
        "always",
        "-c",
        "import hal_cli, hal_cli.bench, hal_core.plugin_api as api\n"
        "from hal_core.cli import main\n"
        "from hal_core.bench import BenchSetup, bench\n"
        "from hal_core.console import progress, show_table\n"
        "assert main is hal_cli.main and BenchSetup is api.BenchSetup and bench is hal_cli.bench.bench\n"
        "show_table('A title', ['column'], [['cell']], ['a note'])\n"
        "with progress('working') as report: report('half way', 0.5)\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["A", "title", "column", "─" * 6, "cell", "a", "note"]
    for new in (
        "hal_cli.command_line.main",
        "testing.bench_setup.BenchSetup",
        "hal_cli.bench.bench",
        "hal_cli.console.show_table",
    ):
        warning = rf"^<string>:[234]: DeprecationWarning: .* use .*{new}$"
        assert re.search(warning, done.stderr, re.MULTILINE), done.stderr


RESULT = """
from hal_core.plugin_api import CommandResult, Table, hookimpl

def run(args):
    args.progress("half way", 0.5)
    rows = [["x", str(args.number)]]
    return CommandResult({"number": args.number}, [Table("A title", ["name", "number"], rows)], ["a sentence"], 3)

@hookimpl
def hal_commands(subparsers):
    command = subparsers.add_parser("tool", help="a tool")
    command.add_argument("number", type=int)
    command.set_defaults(run=run)
"""


def test_a_plugin_s_command_returns_data_and_has_json_without_asking(site: Site) -> None:
    site.add("tool", RESULT)
    shown, data = (site.python("-m", "hal_core", "tool", "7", *more) for more in ([], ["--json"]))
    assert (shown.returncode, data.returncode) == (3, 3)
    assert (shown.stderr, data.stderr) == ("", ""), "short work writes no progress"
    assert [line.split() for line in shown.stdout.splitlines() if "─" not in line] == [
        ["A", "title"],
        ["name", "number"],
        ["x", "7"],
        [],
        ["a", "sentence"],
    ]
    assert json.loads(data.stdout) == {"number": 7}


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


def test_doctor_calls_a_plugin_failed_whose_backend_cannot_be_used(site: Site) -> None:
    site.add("fine")
    site.add("bad", None, "raise OSError('no driver')")
    shown = site.python("-m", "hal_core", "doctor").stdout
    (bad,) = [line for line in shown.splitlines() if "hal-bad 1.0" in line and "failed (target)" in line]
    assert "no driver" in bad
    assert "loaded" not in bad
    assert any("hal-fine 1.0" in line and "loaded" in line for line in shown.splitlines())


def test_a_reader_that_goes_away_is_no_error(site: Site) -> None:
    for n in range(30):
        site.add(f"device{n}")
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from hal_cli import main;"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = site.python("-c", code)
    assert done.returncode in (0, 120), done.stderr
    assert "Traceback" not in done.stderr

"""The `hal` command in a process of its own, with plugins of its own."""

from __future__ import annotations

import json

from installed import Site


def test_the_command_runs_and_imports_torch_only_when_it_must(site: Site) -> None:
    site.add("good")
    done = site.python("-m", "hal_core", "devices", "--json")
    assert [device["id"] for device in json.loads(done.stdout)] == ["good:0"]
    code = "import sys; from hal_cli import main; main(['{0}']); sys.exit('torch' in sys.modules)"
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
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from hal_cli import main;"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = site.python("-c", code)
    assert done.returncode in (0, 120), done.stderr
    assert "Traceback" not in done.stderr

"""`hal top`, `hal audit verify`, `hal access check`, and the example program."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hal_telemetry
import pytest
import torch
from hal_cli import main
from hal_telemetry.audit import AuditLog

import hal_core as hal

ROOT = Path(__file__).resolve().parents[2]


def test_top_shows_what_a_running_program_does(
    fake: Any, qkv: list[torch.Tensor], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # at 80 wide figures wrap the headings
    fake("shown")
    port = hal_telemetry.enable(0)
    with hal.caller("chat"):
        hal.attention(*qkv, backend="shown")
    with pytest.raises(hal.UnsupportedError):
        hal.attention(*qkv, backend="shown", max_error=1e-30)
    assert main(["top", f"127.0.0.1:{port}", "--once"]) == 0
    shown = capsys.readouterr().out
    for text in ("shown:0", "chat", "max_error", "measured / estimated", "batch 1, heads 2"):
        assert text in shown
    assert main(["top", f"http://127.0.0.1:{port}/", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(row["device"], row["calls"]) for row in data["series"]] == [("shown:0", 1)]
    assert main(["top", f"127.0.0.1:{port}", "--trace", str(tmp_path / "run.json")]) == 0
    assert "1 calls in" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]


def test_top_draws_again_on_a_terminal_until_it_is_stopped(fake: Any, qkv: list[torch.Tensor]) -> None:
    """The command in a process of its own on a pseudo-terminal: the screen follows this process's calls."""
    pty = pytest.importorskip("pty")
    fake("shown")
    port = hal_telemetry.enable(0)
    hal.attention(*qkv, backend="shown")
    ours, theirs = pty.openpty()
    program = "import sys; from hal_cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, "top", f"127.0.0.1:{port}", "--interval", "0.1"]
    terminal = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal) as top:
        os.close(theirs)
        seen = ""

        def wait_for(*texts: str) -> None:
            nonlocal seen
            end = time.monotonic() + 120
            while not all(text in seen for text in texts):
                assert time.monotonic() < end, seen[-2000:]
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 1 << 16).decode(errors="replace")

        try:
            wait_for("\x1b[?1049h", "shown:0", "Newest calls", "measured / estimated")  # the other screen was entered
            assert "late:0" not in seen
            fake("late")
            hal.attention(*qkv, backend="late")
            wait_for("late:0")
            top.send_signal(signal.SIGINT)
            wait_for("\x1b[?1049l")  # and left, the cursor with it
            assert top.wait(60) != 0
        finally:
            top.kill()
            os.close(ours)


def test_top_says_where_nothing_answers(capsys: Any) -> None:
    assert main(["top", "127.0.0.1:9"]) == 2
    assert "start the program with HAL_METRICS=9464" in capsys.readouterr().err
    assert main(["top", "file:///etc/hostname"]) == 2
    assert "pass host:port" in capsys.readouterr().err
    assert main(["top", "--interval", "0"]) == 2


def test_audit_verify_ends_with_1_where_a_record_was_changed(tmp_path: Path, capsys: Any) -> None:
    log = AuditLog(tmp_path)
    for name in ("a", "b", "c"):
        log.append(name)
    log.close()
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert "Nothing was changed, removed, swapped or cut off." in capsys.readouterr().out
    [path] = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text().replace('"event":"b"', '"event":"x"'))
    assert main(["audit", "verify", str(tmp_path)]) == 1
    assert "record 2 was changed" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "empty").mkdir()
    assert main(["audit", "verify", str(tmp_path / "empty")]) == 2
    assert "holds no audit log" in capsys.readouterr().err
    assert main(["audit", "verify", str(tmp_path / "nowhere")]) == 2


def test_access_check_prints_the_table_and_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    assert main(["access", "check"]) == 0
    assert "There is no access policy" in capsys.readouterr().out
    path = tmp_path / "access.toml"
    path.write_text('[default]\ndevices = ["cpu:*"]\n')
    path.chmod(0o600)
    assert main(["access", "check", str(path)]) == 0
    assert "everybody else" in capsys.readouterr().out
    path.write_text('[default]\ndevices = ["cpux:*"]\n')
    assert main(["access", "check", str(path)]) == 1
    assert "'cpux:*' is no name here" in " ".join(capsys.readouterr().out.split())
    path.write_text("[default]\nspeed = 3\n")
    assert main(["access", "check", str(path)]) == 1
    assert "speed = 3" in capsys.readouterr().out
    assert main(["access", "check", str(tmp_path / "none.toml")]) == 2


def test_the_example_is_watched(tmp_path: Path) -> None:
    script = ROOT / "examples" / "telemetry" / "watch.py"
    done = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 'hal_call_seconds_count{caller="chat",device="cpu:0"} 20.0' in done.stdout
    assert "0 findings" in done.stdout
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]

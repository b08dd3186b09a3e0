"""A log whose records were changed, removed, swapped or cut off is found out, with the place."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hal_telemetry
import pytest
import torch
from hal_telemetry.audit import AuditLog, Finding, verify

import hal_core as hal

RECORDS = 30
Lines = dict[Path, list[bytes]]


def written(folder: Path, key: bytes = b"") -> Lines:
    """A log of RECORDS records in several files, as lines."""
    log = AuditLog(folder, key=key, most_bytes=2600)
    for n in range(RECORDS):
        log.append("decision", caller=f"caller {n % 3}", chosen="cpu:0", refused=[["kpu:0", "fidelity", "fidelity"]])
    log.close()
    return {path: path.read_bytes().splitlines(keepends=True) for path in sorted(folder.glob("*.jsonl"))}


def place(lines: Lines, n: int) -> tuple[Path, int]:
    """The file of record n, counted from 0, and its index there."""
    for path, found in lines.items():
        if n < len(found):
            return path, n
        n -= len(found)
    raise AssertionError(n)


def found_in(folder: Path, lines: Lines, key: bytes = b"") -> list[Finding]:
    for path, each in lines.items():
        path.write_bytes(b"".join(each))
    return [finding for finding in verify(folder, key)[1] if finding.certain]


def changed(line: bytes) -> bytes:
    return line.replace(b"cpu:0", b"gpu:0")


def changed_with_its_hash(line: bytes) -> bytes:
    record = json.loads(changed(line))
    del record["hash"]
    record["hash"] = hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def test_an_untouched_log_of_several_files_is_clean(tmp_path: Path) -> None:
    lines = written(tmp_path)
    counts, findings = verify(tmp_path)
    assert len(lines) > 2
    assert list(counts.values()) == [RECORDS]
    assert findings == []
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


@pytest.mark.parametrize("key", [b"", b"a key"])
def test_every_changed_record_is_found_at_its_line(tmp_path: Path, key: bytes) -> None:
    lines = written(tmp_path, key)
    for n in range(RECORDS):
        path, at = place(lines, n)
        for change in (changed, lambda line: b"{" + line, lambda line: line[:40] + b"\n"):
            bad = lines | {path: [change(line) if i == at else line for i, line in enumerate(lines[path])]}
            findings = found_in(tmp_path, bad, key)
            assert (findings[0].file, findings[0].line) == (path.name, at + 1)
        # Whoever computes the hash anew is found by the record that follows, or by the seal; with a key at once.
        bad = lines | {path: [changed_with_its_hash(x) if i == at else x for i, x in enumerate(lines[path])]}
        findings = found_in(tmp_path, bad, key)
        seen = n if key or n == RECORDS - 1 else n + 1
        assert (findings[0].file, findings[0].line - 1) == (place(lines, seen)[0].name, place(lines, seen)[1])


def test_every_removed_record_is_found_where_it_was(tmp_path: Path) -> None:
    lines = written(tmp_path)
    for n in range(RECORDS):
        path, at = place(lines, n)
        [first, *_] = found_in(tmp_path, lines | {path: [x for i, x in enumerate(lines[path]) if i != at]})
        if n == RECORDS - 1:
            assert first.what == f"the end was cut off: records {RECORDS} to {RECORDS} are missing"
        else:
            assert first.what == f"record {n + 2} follows record {n}: records {n + 1} to {n + 1} are missing"


def test_every_pair_of_swapped_neighbours_is_found(tmp_path: Path) -> None:
    lines = written(tmp_path)
    for n in range(RECORDS - 1):
        (path, at), (other, beside) = place(lines, n), place(lines, n + 1)
        bad = {each: list(found) for each, found in lines.items()}
        bad[path][at], bad[other][beside] = bad[other][beside], bad[path][at]
        [first, *_] = found_in(tmp_path, bad)
        assert (first.file, first.line) == (path.name, at + 1)


def test_every_cut_is_found_and_an_inserted_copy_too(tmp_path: Path) -> None:
    lines = written(tmp_path)
    *_, last = lines
    for left in range(len(lines[last])):
        [first, *_] = found_in(tmp_path, lines | {last: lines[last][:left]})
        assert "are missing" in first.what
    for n in range(RECORDS):
        path, at = place(lines, n)
        copied = [*lines[path][: at + 1], lines[path][at], *lines[path][at + 1 :]]
        [first, *_] = found_in(tmp_path, lines | {path: copied})
        assert (first.file, first.line) == (path.name, at + 2)


def test_missing_files_and_a_changed_seal_are_found(tmp_path: Path) -> None:
    lines = written(tmp_path)
    for path in lines:
        text = path.read_bytes()
        path.unlink()
        assert any(path.name == finding.file and "missing" in finding.what for finding in verify(tmp_path)[1])
        path.write_bytes(text)
    [head] = tmp_path.glob("*.head")
    text = head.read_bytes()
    head.write_bytes(text.replace(b'"records": 30', b'"records": 29'))
    assert "it was changed" in verify(tmp_path)[1][0].what
    head.unlink()
    assert "the end cannot be checked" in verify(tmp_path)[1][0].what
    head.write_bytes(text)
    assert verify(tmp_path)[1] == []
    assert "another key" in verify(tmp_path, b"another")[1][-1].what


def test_a_process_that_ends_while_it_writes_is_no_forgery(tmp_path: Path) -> None:
    lines = written(tmp_path)
    *_, last = lines
    last.write_bytes(last.read_bytes() + b'{"n": 31, "ti')
    [finding] = verify(tmp_path)[1]
    assert not finding.certain


def test_what_was_asked_chosen_and_refused_is_recorded_with_its_caller(tmp_path: Path, qkv: list[torch.Tensor]) -> None:
    hal_telemetry.enable(audit=tmp_path, audit_calls=True)
    with hal.caller("chat"):
        hal.attention(*qkv, backend="cpu:0")
        with pytest.raises(hal.UnsupportedError):
            hal.attention(*qkv, backend="cpu:0", max_error=1e-30)
    [path] = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    ran, call, *refused = records
    assert (ran["event"], ran["caller"], ran["chosen"], ran["named"]) == ("decision", "chat", "cpu:0", ["cpu:0"])
    assert ran["asked"].startswith("batch 1, heads 2")
    assert (call["event"], call["chosen"]) == ("call", "cpu:0")
    assert refused[-1]["chosen"] is None
    assert ["cpu:0", "max_error", "max_error"] in refused[-1]["refused"]
    assert verify(tmp_path)[1] == []


def test_a_child_process_writes_a_chain_of_its_own(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.append("parent")
    if (child := os.fork()) == 0:
        try:
            log.append("child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    log.append("parent")
    counts, findings = verify(tmp_path)
    assert sorted(counts.values()) == [1, 2]
    assert findings == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, qkv: list[torch.Tensor]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(hal.ContractError, match="pass a folder that can be written"):
        hal_telemetry.enable(audit=tmp_path / "file" / "audit")
    with pytest.raises(hal.ContractError, match="cannot be kept"):
        hal_telemetry.enable(audit=tmp_path / "audit", audit_key=tmp_path / "no key")
    hal.attention(*qkv, backend="cpu:0")


@pytest.mark.parametrize("refuse", [True, False])
def test_a_record_that_cannot_be_written_stops_calls_or_warns(
    tmp_path: Path, qkv: list[torch.Tensor], monkeypatch: Any, refuse: bool
) -> None:
    hal_telemetry.enable(audit=tmp_path, refuse=refuse)

    def full(*given: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    if refuse:
        with pytest.raises(hal.HalError, match=r"No space left on device.*everything is denied"):
            hal.attention(*qkv, backend="cpu:0")
        with pytest.raises(hal.HalError, match="everything is denied"):
            hal.session("cpu:0")
    else:
        with pytest.warns(RuntimeWarning, match=r"No space left on device.*go on without"):
            hal.attention(*qkv, backend="cpu:0")
    assert 'hal_audit_records_total{outcome="failed"}' in hal_telemetry.metrics_text()
    monkeypatch.undo()
    hal_telemetry.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hal.attention(*qkv, backend="cpu:0")


def test_a_half_written_record_is_taken_out_again(tmp_path: Path, monkeypatch: Any) -> None:
    log = AuditLog(tmp_path)
    log.append("first")
    real: Callable[..., int] = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:20]))
    with pytest.raises(OSError, match="20 of"):
        log.append("second")
    monkeypatch.undo()
    log.append("third")
    counts, findings = verify(tmp_path)
    assert list(counts.values()) == [2]
    assert findings == []


def test_the_policy_s_audit_log_begins_with_the_process_and_fails_closed(site: Any, tmp_path: Path) -> None:
    site.add("good")
    code = """
    import json, hal_core as hal
    from hal_core.plugin_api import decide, merged_policy
    try:
        decide(hal.AttentionRequest(1, 1, 1, 4, 4, 4, 4, "float32", "cpu"), merged_policy("good")).winner
        print(json.dumps("ran"))
    except hal.HalError as error:
        print(json.dumps(str(error)))
    """

    def run(audit: str, **variables: str) -> Any:
        path = tmp_path / "access.toml"
        path.write_text(f'required = ["telemetry"]\n[default]\ndevices = ["*"]\n[audit]\n{audit}\n')
        path.chmod(0o600)
        return site.run(code, HAL_ACCESS=str(path), **variables)

    assert run(f'folder = "{tmp_path}/audit"') == "ran"
    assert list(verify(tmp_path / "audit")[0].values()) == [1]
    assert "everything is denied" in run('folder = "/proc/nowhere"')
    assert run('folder = "/proc/nowhere"\nfailure = "warn"') == "ran"
    assert "everything is denied" in run('folder = "audit"\nfailure = "sometimes"')
    assert "everything is denied" in run('folder = "audit"\nname = "x"')
    assert "requires telemetry" in run(f'folder = "{tmp_path}/audit"', HAL_DISABLE="telemetry")

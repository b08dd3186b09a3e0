"""An audit log: JSON lines, each with the hash of the one before, so that a change is found with its place.

A chain is what one process wrote: files NAME-0000.jsonl, NAME-0001.jsonl, ..., and NAME.head, which holds the number
and hash of the newest record. Without a key whoever may write the folder can compute hashes anew; with one
(HMAC-SHA256) only who has the key.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from hmac import new as hmac
from pathlib import Path
from typing import Any, NamedTuple

START = "0" * 64  # what the first record of a chain follows
_HEAD_BYTES = 256
_FILE = re.compile(r"(?P<chain>hal-audit-.+)(?:-(?P<number>\d{4,})\.jsonl|\.head)")


class Finding(NamedTuple):
    """Something wrong with a log.

    Attributes:
        file: its name. line: in the file, from 1; 0 for the whole file. what: one sentence.
        certain: False where a process that ended while it wrote leaves the same.
    """

    file: str
    line: int
    what: str
    certain: bool = True


def _digest(record: dict[str, Any], key: bytes) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return hmac(key, text, sha256).hexdigest() if key else sha256(text).hexdigest()


class AuditLog:
    """Appends records to a chain of its own in a folder. Thread-safe; a child process begins its own chain.

    Args:
        folder: made where it does not exist, for its owner alone. key: for HMAC; b"" for plain hashes.
        most_bytes: of a file, after which the next one begins. Files are never deleted.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, *, key: bytes = b"", most_bytes: int = 64 << 20) -> None:
        self.folder, self._key, self._most = Path(folder), key, most_bytes
        self._file = self._head = -1
        self._begin()

    def _begin(self) -> None:
        """A new chain, for this process."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock, self._process = threading.Lock(), os.getpid()
        self.chain = (
            f"hal-audit-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.time_ns() % 10**9:09}-{os.getpid()}"
        )
        self.records, self.hash, self._number = 0, START, -1
        self._head = self._create(f"{self.chain}.head")
        self._next_file()
        self._seal()

    def _create(self, name: str) -> int:
        return os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _next_file(self) -> None:
        if self._file >= 0 and self._number >= 0:
            os.close(self._file)
        self._number, self._size = self._number + 1, 0
        self._file = self._create(f"{self.chain}-{self._number:04}.jsonl")

    def append(self, event: str, **facts: Any) -> None:
        """Write one record.

        Args:
            event: "decision", "denied", "call" or a program's own. facts: plain data, under names of the program's.

        Raises:
            OSError: it could not be written; the chain goes on with the next record.
        """
        if os.getpid() != self._process:
            self._begin()
        with self._lock:
            now = time.time()
            stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1e6):06}Z"
            record = {"n": self.records + 1, "time": stamp, "event": event, **facts, "previous": self.hash}
            record["hash"] = _digest(record, self._key)
            line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
            if self._size and self._size + len(line) > self._most:
                self._next_file()
            written = os.write(self._file, line)
            if written != len(line):  # a full disk takes a part: it must not stand before the next record
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
                raise OSError(f"{written} of {len(line)} bytes could be written")
            self._size += len(line)
            self.records, self.hash = self.records + 1, record["hash"]
            self._seal()

    def _seal(self) -> None:
        head = {"records": self.records, "hash": self.hash, "files": self._number + 1}
        head["seal"] = _digest(head, self._key)
        os.pwrite(self._head, json.dumps(head).encode().ljust(_HEAD_BYTES) + b"\n", 0)

    def close(self) -> None:
        """Close the files. What was written is complete at any time."""
        if os.getpid() == self._process:
            with self._lock:
                for descriptor in (self._file, self._head):
                    os.close(descriptor)
                self._process = -1


def verify(folder: str | Path, key: bytes = b"") -> tuple[dict[str, int], list[Finding]]:
    """Read every chain of a folder again.

    Args:
        folder: of an AuditLog. key: that it was written with.

    Returns:
        (records by chain, findings): no finding where nothing was changed, removed, swapped or cut off.

    Raises:
        OSError: the folder cannot be read.
    """
    chains: dict[str, dict[int, str]] = {}
    for name in sorted(os.listdir(folder)):
        if match := _FILE.fullmatch(name):
            chains.setdefault(match["chain"], {})[int(match["number"] or -1)] = name
    counts, findings = dict[str, int](), list[Finding]()
    for chain, files in chains.items():
        counts[chain] = 0
        findings += _chain(Path(folder), chain, files, key, counts)
    return counts, findings


def _chain(folder: Path, chain: str, files: dict[int, str], key: bytes, counts: dict[str, int]) -> Iterator[Finding]:
    last, number, place, damaged = START, 0, ("", 0), False
    for index in range(max(files) + 1):
        if index not in files:
            yield Finding(f"{chain}-{index:04}.jsonl", 0, "the file is missing")
            continue
        lines = (folder / files[index]).read_bytes().split(b"\n")
        for at, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
            place, counts[chain] = (files[index], at), counts[chain] + 1
            try:
                record = json.loads(line)
                stated, n, previous = record.pop("hash"), record["n"], record["previous"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield Finding(*place, "the line is no record", not (at == len(lines) and lines[-1]))
                damaged = True
                continue
            if stated != _digest(record, key):
                yield Finding(*place, f"record {n} was changed: its hash is another")
            elif n != number + 1 and not damaged:
                missing = f"records {number + 1} to {n - 1} are missing" if n > number else "it is out of order"
                yield Finding(*place, f"record {n} follows record {number}: {missing}")
            elif previous != last and not damaged:
                yield Finding(*place, f"record {n} does not continue record {number}: one of the two was changed")
            last, number, damaged = stated, n, False
    yield from _head(folder, chain, files, key, (number, last, place))


def _head(
    folder: Path, chain: str, files: dict[int, str], key: bytes, end: tuple[int, str, tuple[str, int]]
) -> Iterator[Finding]:
    number, last, place = end
    try:
        head = json.loads((folder / files[-1]).read_bytes())
        if head.pop("seal") != _digest(head, key):
            raise ValueError
        sealed, wanted, count = int(head["records"]), head["hash"], int(head["files"])
    except KeyError:
        yield Finding(f"{chain}.head", 0, "the file is missing or incomplete: the end cannot be checked")
    except (ValueError, TypeError, AttributeError):
        yield Finding(f"{chain}.head", 1, "it was changed, or written with another key")
    else:
        if count > max(files) + 1:
            yield Finding(f"{chain}-{max(files) + 1:04}.jsonl", 0, f"the last of {count} files is missing")
        if number < sealed:
            yield Finding(*place, f"the end was cut off: records {number + 1} to {sealed} are missing")
        elif number > sealed:
            what = f"record {number} came after the newest sealed one, {sealed}"
            yield Finding(*place, what, certain=number > sealed + 1)
        elif last != wanted:
            yield Finding(*place, f"record {number} is not the one that was sealed: it was changed")

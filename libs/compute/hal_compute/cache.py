"""Files of compiled programs. A cache saves work the next time; where it cannot be kept safely, only that is lost.

Drivers execute what these files hold, so a file is read only from a folder that nobody else can write to, only where it
is a regular file of this user, and only where its digest matches.
"""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from hal_core.plugin_api import cache_dir

_DIGEST_BYTES = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_refused: set[Path] = set()  # folders that were warned about


def private_folder(name: str) -> Path | None:
    """The folder `name` of HAL_CACHE, created with mode 0700.

    None where it cannot be created, or where somebody else owns it or HAL_CACHE, or may write to one of them: a warning
    says so once.
    """
    root = cache_dir()
    folder = root / name
    try:
        for path in (root, folder):
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _why_unsafe(path):
                _warn(path, reason)
                return None
    except OSError:  # not writable: nothing is cached
        return None
    return folder


def _why_unsafe(folder: Path) -> str:
    """Why a folder is not trusted; "" where it is."""
    found = os.stat(folder)
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}"
    return (
        f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})" if found.st_mode & _OTHERS_WRITE else ""
    )


def _warn(folder: Path, reason: str) -> None:
    if folder not in _refused:
        _refused.add(folder)
        warnings.warn(
            f"compiled programs are not cached: {folder} {reason}; run chmod 700 on it, or set HAL_CACHE to a folder "
            "of your own",
            RuntimeWarning,
            stacklevel=4,
        )


def read(path: Path | None) -> bytes | None:
    """What `keep` wrote; None where there is no such file, or it is damaged, not regular, or another user's."""
    if path is None:
        return None
    try:
        # A link is not followed, and a FIFO does not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            owned = found.st_uid in (os.geteuid(), 0) and not found.st_mode & _OTHERS_WRITE
            data = file.read() if stat.S_ISREG(found.st_mode) and owned else b""
    except OSError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if sha256(content).digest() == digest else None


def keep(path: Path | None, data: bytes) -> None:
    """Write a file, its digest first, whole or not at all. A folder that cannot be written to costs the cache alone."""
    if path is None:
        return
    partial = None
    try:
        # The name is random and the file is created exclusively, so no link is followed.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            partial = file.name
            file.write(sha256(data).digest() + data)
        os.replace(partial, path)
    except OSError:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)

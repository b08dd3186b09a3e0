"""Files that spare work the next time, and cost nothing but that work where they cannot be kept."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


def keep(path: Path, data: bytes) -> None:
    """Write a cache's file, whole or not at all. A folder that cannot be written costs the cache alone."""
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()

"""Files that a command writes after long work: whether they can be written is checked before it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hal_core.plugin_api import HalError


def check_writable(path: Path, option: str) -> None:
    """Raise HalError where a file could not be written: its name is a folder's, or its folder is missing or closed.

    Args:
        path: the file. option: the option that named it, for the message.
    """
    if path.is_dir():
        raise HalError(f"{option} {path} is a folder: give a file name")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise HalError(
            f"{option} {path} cannot be written ({error.strerror}): give a file in another folder"
        ) from error

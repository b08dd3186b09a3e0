"""Reads TOML files that somebody else wrote: with limits, and with errors that name the file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from hal_core.plugin_api import ContractError

#: Bytes of the largest file that is read; a profile has about 10,000.
MAX_BYTES = 1 << 20
#: Deepest nesting of arrays, inline tables and dotted keys; a profile has 2.
MAX_DEPTH = 16

# Strings and comments, which may hold brackets and dots that do not nest. The time is linear: no two alternatives of a
# repetition match the same character, and a string without an end runs to the end of its line or of the text.
_OPAQUE = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5}|\Z)'
    r"|'''(?:[^']|'(?!''))*+(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]|\\[^\n])*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+",
    re.DOTALL,
)
_KEY_PART = r"[\w-]+[ \t]*\.[ \t]*"
_LONG_KEY = re.compile(rf"(?<![\w-])(?:{_KEY_PART}){{{MAX_DEPTH}}}")


class ProfileError(ContractError):
    """A profile that cannot be used. The message names the file, the key, and what is wanted instead."""


def read_text(path: str | Path) -> str:
    """The text of a file of at most `MAX_BYTES` bytes, with newlines as in `Path.read_text`.

    Raises:
        ProfileError: there is no such file, it is not a regular file, it is too large, or it is not UTF-8 text.
    """
    wanted = "pass a profile, a TOML file"
    try:
        file = Path(path)
        regular = file.is_file() or not file.exists()
        content = b""
        if regular:  # opening a FIFO would wait for a writer
            with file.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}: {wanted}") from None
    except ValueError:
        raise ProfileError(f"{str(path)!r}: not the name of a file: {wanted}") from None
    if not regular:
        raise ProfileError(f"{path}: not a regular file: {wanted}")
    if len(content) > MAX_BYTES:
        raise ProfileError(f"{path}: larger than {MAX_BYTES:,} bytes, the limit for a profile: {wanted}")
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: not UTF-8 text: {wanted}") from None


def parse_text(text: str, where: str) -> dict[str, Any]:
    """Parse TOML. `where` names the file in messages.

    Raises:
        ProfileError: it is not TOML, or nested deeper than `MAX_DEPTH`.
    """
    if _too_deep(text):
        raise ProfileError(f"{where}: nested deeper than {MAX_DEPTH} levels, the limit for a profile: flatten it")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, and integers with too many digits
        raise ProfileError(f"{where}: not TOML ({error}): correct the line") from None


def _too_deep(text: str) -> bool:
    """True if arrays, inline tables or dotted keys nest deeper than `MAX_DEPTH`.

    tomllib recurses on brackets, and needs quadratic time for dotted keys, so both are counted before it runs.
    """
    plain = _OPAQUE.sub("s", text)
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", plain):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return _LONG_KEY.search(plain) is not None

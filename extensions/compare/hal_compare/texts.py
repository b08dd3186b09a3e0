"""Reading the texts that a model is compared on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import attrs

from hal_core import HalError

SAMPLE = Path(__file__).with_name("sample.txt")


@attrs.frozen
class TextFile:
    """The texts of one file.

    Attributes:
        name: the path as given. texts: without surrounding white space, line breaks inside turned to spaces.
        sha256: of the file's bytes.
    """

    name: str
    texts: tuple[str, ...]
    sha256: str


def read(paths: Sequence[Path]) -> list[TextFile]:
    """Read text files. Texts are divided by blank lines; a file without blank lines has one text a line.

    Args:
        paths: files, or folders whose *.txt files are read; none stands for a sample that comes with this package.

    Raises:
        HalError: a file that is missing, empty or not UTF-8, a folder without *.txt; fewer than two texts in all.
    """
    files = [_read(file) for path in paths or [SAMPLE] for file in _files(path)]
    if sum(len(file.texts) for file in files) < 2:
        raise HalError(f"{files[0].name} has one text: give two or more, divided by blank lines, or one a line")
    return files


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob("*.txt"))):
        raise HalError(f"the folder {path} has no *.txt: give UTF-8 text files")
    return found


def _read(path: Path) -> TextFile:
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HalError(
            f"{path} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}): convert it, "
            f"for example with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise HalError(f"{path} cannot be read ({error.strerror}): give a UTF-8 text file") from error
    parts = re.split(r"\n\s*\n", content.strip())
    if len(parts) == 1:
        parts = content.strip().splitlines()
    texts = tuple(text for part in parts if (text := " ".join(part.split())))
    if not texts:
        raise HalError(f"{path} is empty: give a UTF-8 file with texts divided by blank lines, or one a line")
    return TextFile(path.name if path == SAMPLE else str(path), texts, hashlib.sha256(raw).hexdigest())

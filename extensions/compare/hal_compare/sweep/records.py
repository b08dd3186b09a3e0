"""Results on disk: a file each, written whole or not at all, from which an interrupted sweep goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs

from hal_core.plugin_api import write_whole

from .cells import Cell, Key

#: Of a record's file; another one is measured anew.
FORMAT = 1


class Records:
    """The records in a folder.

    Args:
        folder: of the sweep; records lie in its folder `cells`.

    Attributes:
        used: how many results were there. remarks: why others were not used, each reason once, as sentences.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.used = folder / "cells", 0
        self._stale: dict[str, int] = {}
        self._damaged: list[str] = []

    def read(self, key: Key) -> Cell | None:
        """The result of a key; None where there is none, or one that cannot be used."""
        path = self._folder / key.name
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            self._damaged.append(path.name)
            return None
        try:
            record = json.loads(text)
            if record["format"] == FORMAT and record["sha256"] != _digest(record["key"], record["cell"]):
                raise ValueError("not what was written")
            different = [f"format {record['format']}"] if record["format"] != FORMAT else key.differs(record["key"])
            cell = None if different else Cell.from_dict(record["cell"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._damaged.append(path.name)
            return None
        if different:
            why = ", ".join(different)
            self._stale[why] = self._stale.get(why, 0) + 1
        self.used += cell is not None
        return cell

    def write(self, key: Key, cell: Cell) -> None:
        """Keep a result."""
        plain_key, plain = attrs.asdict(key), cell.to_dict()
        record = {"format": FORMAT, "key": plain_key, "cell": plain, "sha256": _digest(plain_key, plain)}
        write_whole(self._folder / key.name, json.dumps(record, indent=1, allow_nan=True) + "\n")

    @property
    def remarks(self) -> list[str]:
        """Sentences on the records that could not be used."""
        said = [f"{_records(count)} of another {why}: measured anew." for why, count in sorted(self._stale.items())]
        if self._damaged:
            names = ", ".join(self._damaged[:3]) + (", ..." if len(self._damaged) > 3 else "")
            said.append(f"{_records(len(self._damaged))} that cannot be read ({names}): measured anew.")
        return said


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _digest(key: Any, cell: Any) -> str:
    return hashlib.sha256(json.dumps([key, cell], sort_keys=True).encode()).hexdigest()

"""Outcomes of trials, kept in a folder where one is named, so that a measurement that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hal_core import Device, HalError
from hal_core.plugin_api import write_whole

from .. import measure
from ..batches import Tokens
from ..models import Model
from .trial import Outcome


class Outcomes:
    """Outcomes by the figures that were changed.

    Args:
        folder: where each is written when it is there; None to keep none. key: of all else that has a part in them; see
            `key_of`.

    Attributes:
        used: how many were in the folder. made: how many were measured.

    Raises:
        HalError: a folder that cannot be written.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        self._folder, self._key = folder, key
        self.used = self.made = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / "writable", "")
                (folder / "writable").unlink()
            except OSError as error:
                raise HalError(f"--out {folder} cannot be written ({error.strerror}): give another folder") from error

    def get(self, figures: Mapping[str, float], measured: Callable[[], Outcome]) -> Outcome:
        """The outcome with figures changed to given values: that in the folder, or else what is measured now."""
        key = {"key": self._key, "figures": dict(sorted(figures.items()))}
        path = None
        if self._folder is not None:
            path = self._folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
            if (found := _read(path, key)) is not None:
                self.used += 1
                return found
        outcome = measured()
        self.made += 1
        if path is not None:
            write_whole(path, json.dumps(key | {"outcome": outcome._asdict()}, indent=1) + "\n")
        return outcome


def _read(path: Path, key: Mapping[str, Any]) -> Outcome | None:
    """The outcome in a file; None where there is none, or it is of something else or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        outcome = Outcome(**record.pop("outcome"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    numbers = all(number is None or isinstance(number, int | float) for number in outcome)
    return outcome if record == key and numbers and outcome.error is not None else None


def key_of(model: Model, tokens: Tokens, device: Device, arguments: Namespace) -> str:
    """A digest of what was asked for, the model's files, its text, the device, the host and all versions."""
    from ..sweep.run import weights_hash

    parts = [
        weights_hash(model.path),
        [[batch.ids.tolist(), batch.mask.tolist()] for batch in tokens.batches],
        [_of_features(batch.features) for batch in tokens.batches],
        device.id,
        device.fingerprint,
        model.dtype,
        arguments.draws,
        arguments.attention,
        measure.versions(),
        measure.machine(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_features(features: Mapping[str, Any] | None) -> list[str]:
    return [hashlib.sha256(value.numpy().tobytes()).hexdigest() for _, value in sorted((features or {}).items())]

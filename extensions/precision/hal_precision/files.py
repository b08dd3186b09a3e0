"""Tensors in safetensors files, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_whole(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write contiguous tensors that share no memory. Returns the file's bytes. Raises OSError; nothing is left then."""
    from safetensors.torch import save_file

    target = Path(path)
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    try:
        save_file(dict(tensors), part, dict(metadata))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size

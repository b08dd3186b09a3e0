"""What a session's launches share."""

from __future__ import annotations

from typing import NamedTuple

from hal_core.plugin_api import MemoryManager

from ..discovery import Chip
from ..memory import StreamWorkspaces
from ..tiling import CudaTiling


class Context(NamedTuple):
    """The device, its memory, its workspaces and its tiling, as one session has them."""

    chip: Chip
    memory: MemoryManager
    workspaces: StreamWorkspaces
    tiling: CudaTiling

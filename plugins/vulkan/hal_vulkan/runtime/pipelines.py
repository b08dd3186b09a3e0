"""The package's shaders as pipelines: created on demand, kept, and cached on disk per driver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from hal_compute.cache import keep, private_folder

from ._vk import Adapter, Gpu, Pipeline

PUSH_BYTES = 80
#: Shaders that need full subgroups: matrices, and lanes that share a key, lie in whole subgroups.
_WHOLE = ("forward_khr", "forward_nv2", "forward_rows")


class VulkanShaderManager:
    """Pipelines by (shader, kinds of its bindings, specialisation constants)."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._made, self._unsaved = gpu, dict[tuple[object, ...], Pipeline](), False

    def pipeline(self, name: str, kinds: str, constants: Sequence[int]) -> Pipeline:
        """The shader `name` (a .spv file without its suffix) with these constants, created at the first use."""
        key = (name, kinds, *constants)
        if key not in self._made:
            full = name.startswith(_WHOLE)
            self._made[key] = self._gpu.pipeline(_spirv(name), kinds, PUSH_BYTES, constants, full_subgroups=full)
            self._unsaved = True
        return self._made[key]

    @property
    def made(self) -> list[tuple[object, ...]]:
        """The pipelines that exist, by (shader, kinds of its bindings, specialisation constants)."""
        return list(self._made)

    def save(self, path: Path | None) -> None:
        """Write the driver's pipeline cache if there are new pipelines. None: there is no safe folder for it."""
        if not self._unsaved:
            return
        keep(path, self._gpu.cache_data())
        self._unsaved = False


def cache_path(adapter: Adapter) -> Path | None:
    """The file of the pipeline cache of this driver and device, see `private_folder`. A new driver has another UUID."""
    folder = private_folder("vulkan")
    return None if folder is None else folder / f"{adapter.uuid}.pipelines"


@lru_cache(maxsize=64)
def _spirv(name: str) -> bytes:
    return (resources.files("hal_vulkan") / "kernels" / "shaders" / f"{name}.spv").read_bytes()

"""Compute pipelines and the driver's cache of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hal_compute.cache import read

from .adapter import Adapter
from .allocation import Allocating

DESCRIPTORS = {"s": 7, "u": 6}  # VkDescriptorType of a storage and a uniform buffer
COMPUTE_STAGE = 0x20
_FULL_SUBGROUPS = 2  # VkPipelineShaderStageCreateFlags


class Pipeline(NamedTuple):
    handle: Any
    layout: Any
    slots: Any
    kinds: str


class Compiling(Allocating):
    """Creates pipelines through a cache file (None: without). A cache of another driver is ignored."""

    def __init__(self, adapter: Adapter, name: str, cache: Path | None) -> None:
        super().__init__(adapter, name)
        self._cache_path, self.cache_loaded = cache, 0  # bytes of the file that the driver was given
        self._pipelines: list[Pipeline] = []
        self._cache = self._open_cache()

    def _open_cache(self) -> Any:
        data = read(self._cache_path) or b""
        info: dict[str, Any] = {"sType": 17}
        if data[16:32] == self.adapter.cache_uuid:  # in the header; another driver's cache is not used
            info |= {"initialDataSize": len(data), "pInitialData": self._ffi.from_buffer(data)}
            self.cache_loaded = len(data)
        return self._held("PipelineCache", info)

    def cache_data(self) -> bytes:
        """The contents of the pipeline cache."""
        size = self._ffi.new("size_t*")
        self._lib.vkGetPipelineCacheData(self._device, self._cache, size, self._ffi.NULL)
        data = self._ffi.new("char[]", max(size[0], 1))
        self._lib.vkGetPipelineCacheData(self._device, self._cache, size, data)
        return bytes(self._ffi.buffer(data, size[0]))

    def pipeline(
        self, spirv: bytes, kinds: str, push_bytes: int, constants: Sequence[int], *, full_subgroups: bool = False
    ) -> Pipeline:
        """A compute pipeline.

        Args:
            kinds: "s" (storage buffer) or "u" (uniform buffer) for each binding from 0.
            constants: the specialisation constants from 0.
            full_subgroups: whether no invocation of a subgroup may be missing; needs the feature of that name.
        """
        with ExitStack() as always, ExitStack() as undo:
            module = self._module(spirv)
            always.callback(self._lib.vkDestroyShaderModule, self._device, module, self._ffi.NULL)
            slots = self._slots(kinds)
            undo.callback(self._lib.vkDestroyDescriptorSetLayout, self._device, slots, self._ffi.NULL)
            layout = self._layout(slots, push_bytes)
            undo.callback(self._lib.vkDestroyPipelineLayout, self._device, layout, self._ffi.NULL)
            handle = self._compiled(module, layout, constants, _FULL_SUBGROUPS if full_subgroups else 0)
            undo.pop_all()
        self._pipelines.append(Pipeline(handle, layout, slots, kinds))
        return self._pipelines[-1]

    def _module(self, spirv: bytes) -> Any:
        code = self._ffi.new("uint32_t[]", len(spirv) // 4)
        self._ffi.memmove(code, spirv, len(spirv))
        return self._made(
            "VkShaderModule*",
            "vkCreateShaderModule",
            "VkShaderModuleCreateInfo*",
            {"sType": 16, "codeSize": len(spirv), "pCode": code},
        )

    def _slots(self, kinds: str) -> Any:
        slots = self._ffi.new(
            "VkDescriptorSetLayoutBinding[]",
            [
                {"binding": n, "descriptorType": DESCRIPTORS[kind], "descriptorCount": 1, "stageFlags": COMPUTE_STAGE}
                for n, kind in enumerate(kinds)
            ],
        )
        return self._made(
            "VkDescriptorSetLayout*",
            "vkCreateDescriptorSetLayout",
            "VkDescriptorSetLayoutCreateInfo*",
            {"sType": 32, "flags": 1, "bindingCount": len(kinds), "pBindings": slots},
        )

    def _layout(self, slots: Any, push_bytes: int) -> Any:
        sets = self._ffi.new("VkDescriptorSetLayout[]", [slots])
        push = self._ffi.new("VkPushConstantRange*", {"stageFlags": COMPUTE_STAGE, "offset": 0, "size": push_bytes})
        return self._made(
            "VkPipelineLayout*",
            "vkCreatePipelineLayout",
            "VkPipelineLayoutCreateInfo*",
            {
                "sType": 30,
                "setLayoutCount": 1,
                "pSetLayouts": sets,
                "pushConstantRangeCount": 1,
                "pPushConstantRanges": push,
            },
        )

    def _compiled(self, module: Any, layout: Any, constants: Sequence[int], flags: int) -> Any:
        ffi = self._ffi
        data = ffi.new("int32_t[]", list(constants) or [0])
        places = [{"constantID": n, "offset": 4 * n, "size": 4} for n in range(len(constants))]
        entries = ffi.new("VkSpecializationMapEntry[]", places)
        special = ffi.new(
            "VkSpecializationInfo*",
            {
                "mapEntryCount": len(constants),
                "pMapEntries": entries,
                "dataSize": 4 * len(constants),
                "pData": data,
            },
        )
        entry = ffi.new("char[]", b"main")
        info = ffi.new(
            "VkComputePipelineCreateInfo*",
            {
                "sType": 29,
                "layout": layout,
                "stage": {
                    "sType": 18,
                    "flags": flags,
                    "stage": COMPUTE_STAGE,
                    "module": module,
                    "pName": entry,
                    "pSpecializationInfo": special,
                },
            },
        )
        made = ffi.new("VkPipeline*")
        result = self._lib.vkCreateComputePipelines(self._device, self._cache, 1, info, ffi.NULL, made)
        self._check(result, "vkCreateComputePipelines")
        return made[0]

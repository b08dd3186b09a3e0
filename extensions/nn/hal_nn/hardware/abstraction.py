"""`HardwareAbstractionLayer`: a model on the devices there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import hal_core as hal
from hal_core import ContractError, DeviceUnavailableError, HalError

from ..arguments import need_module, need_parameter_dtype, torch_device
from .batch_size import BatchSize, optimal_batch_size
from .devices import detect_available_devices
from .memory_estimate import MemoryEstimate, estimate_memory


class HardwareAbstractionLayer:
    """Puts models on the best of some torch devices, and says what they take there.

    Args:
        target_devices: torch devices, the preferred first; None: all that there are, accelerators before the CPU.

    Attributes:
        device: the one that is used.

    Raises:
        ContractError: no list, an empty one, or a name that torch does not know. DeviceUnavailableError: none of the
            devices is present.
    """

    def __init__(self, target_devices: Sequence[torch.device | str] | None = None) -> None:
        present = [device for devices in detect_available_devices().values() for device in devices]
        if target_devices is None:
            self.devices = present
        else:
            if isinstance(target_devices, str) or not isinstance(target_devices, Sequence):
                raise ContractError(f"target_devices {target_devices!r} was given: pass a list, such as ['cpu']")
            wanted = [torch_device(each) for each in target_devices]
            if not wanted:
                raise ContractError("target_devices is empty: pass torch devices, or None for all that there are")
            wanted = [torch.device(d.type, 0) if d.index is None and d.type != "cpu" else d for d in wanted]
            self.devices = [device for device in wanted if device in present]
            if not self.devices:
                there = ", ".join(map(str, present))
                raise DeviceUnavailableError(f"none of {', '.join(map(str, wanted))} is present: use one of {there}")
        self.device = self.devices[0]

    def optimize_for_hardware(
        self, model: nn.Module, *, dtype: torch.dtype | None = None, compile: bool = False
    ) -> nn.Module:
        """Move a model to the device, in a fitting dtype, with its attention on hal.

        Args:
            model: changed in place. dtype: of its floating parameters; None: bfloat16 on a CUDA device that multiplies
                it, else as they are. compile: compile it too; the first call then takes long.

        Returns:
            The model, compiled where asked for, with `.hal_report`: a dict of "device", "dtype", "compiled",
            "attention" (what its attention runs on, and why where that is not hal) and "hal_devices" (those that read
            the device's tensors).

        Raises:
            ContractError: no module, or a dtype that parameters cannot have.
        """
        need_module("model", model)
        need_parameter_dtype("dtype", dtype)
        if dtype is None and self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            dtype = torch.bfloat16
        model.to(device=self.device, dtype=dtype)
        report: dict[str, Any] = {
            "device": str(self.device),
            "dtype": str(next((p.dtype for p in model.parameters() if p.is_floating_point()), None)),
            "attention": self._attention(model),
            "compiled": compile,
            "hal_devices": [d.id for d in hal.devices() if d.reads_from(self.device.type)],
        }
        result: Any = torch.compile(model) if compile else model
        result.hal_report = report
        return result  # type: ignore[no-any-return]

    @staticmethod
    def _attention(model: Any) -> str:
        """Put a Hugging Face model's attention on hal; what it runs on."""
        if not hasattr(model, "set_attn_implementation"):
            return "torch: not a Hugging Face model; its calls of scaled_dot_product_attention stay torch's"
        try:
            from .. import register_huggingface

            register_huggingface()
            model.set_attn_implementation("hal")
        except (HalError, ValueError) as error:
            return f"torch: {error}".splitlines()[0]
        return "hal"

    def estimate_memory_usage(self, model: nn.Module, batch_size: int = 1, **options: Any) -> MemoryEstimate:
        """Bytes at the peak of a training step, a float with its parts; `options` are `estimate_memory`'s."""
        return estimate_memory(model, batch_size, **options)

    def get_optimal_batch_size(self, model: nn.Module, **options: Any) -> BatchSize:
        """The largest batch whose training step fits, an int with how it was found; `options` are
        `optimal_batch_size`'s.
        """
        return optimal_batch_size(model, **options)

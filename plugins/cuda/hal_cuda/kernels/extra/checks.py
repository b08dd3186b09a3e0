"""What the kernels beside attention ask of their arguments, whichever language they are written in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError, DeviceUnavailableError

from ...discovery import Chip

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: How Triton and the CUDA sources name a dtype.
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_SIZES = (1 << 31) - 1


def refuse(name: str, *checks: tuple[bool, str]) -> None:
    """Raise ContractError with the first sentence whose check holds; `name` is the function's."""
    for wrong, sentence in checks:
        if wrong:
            raise ContractError(f"{name} was given {sentence}")


def check_tensors(name: str, host: bool, floats: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
    """Refuse tensors that do not lie on one GPU, floats of different or unknown dtypes, and gradients.

    Args:
        name: the function, for messages. host: tensors on the host are taken too, as Triton's interpreter does.
        floats: tensors that share one of `FLOATS`. others: tensors of any dtype, on the same device.
    """
    first = floats[0] if floats else others[0]
    for tensor in (*floats, *others):
        refuse(
            name,
            (not isinstance(tensor, Tensor), f"a {type(tensor).__name__}: pass torch tensors"),
            (
                not tensor.is_cuda and not (host and tensor.device.type == "cpu"),
                f"a tensor on {tensor.device}: move it to a CUDA device",
            ),
            (
                tensor.device != first.device,
                f"tensors on {first.device} and {tensor.device}: move them to one device",
            ),
            (
                tensor.requires_grad and torch.is_grad_enabled(),
                "a tensor that requires gradients, and has none: call it under torch.no_grad(), or detach the tensor",
            ),
        )
    for tensor in floats:
        refuse(
            name,
            (
                tensor.dtype not in FLOATS or tensor.dtype != first.dtype,
                f"{listed(t.dtype for t in floats)}: use float32, float16 or bfloat16, the same for all",
            ),
        )


def check_index(name: str, what: str, tensor: Tensor) -> None:
    """Refuse index tensors that are not int32."""
    refuse(name, (tensor.dtype != torch.int32, f"{what} of {str(tensor.dtype).removeprefix('torch.')}: use int32"))


def listed(values: object) -> str:
    """Dtypes or shapes by name, each once."""
    return " and ".join(dict.fromkeys(str(v).removeprefix("torch.") for v in values))  # type: ignore[attr-defined]


def shapes(*tensors: Tensor) -> str:
    """The shapes of tensors for a message."""
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors begin at multiples of 16 bytes; None stands for none."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


@lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip that a tensor's device is; in Triton's interpreter, which computes on the host, one that stands for it.

    Raises:
        DeviceUnavailableError: the GPU is older than compute capability 7.5.
    """
    if device.type == "cpu":
        return Chip(index=0, capability=(9, 0), multiprocessors=16, shared_memory=227 << 10, torch_attention=False)
    chip = Chip.of(torch.cuda.current_device() if device.index is None else device.index)
    if chip.capability < (7, 5):
        raise DeviceUnavailableError(
            f"cuda:{chip.index} has compute capability {chip.capability[0]}.{chip.capability[1]}, and these kernels "
            "need 7.5 or higher"
        )
    return chip

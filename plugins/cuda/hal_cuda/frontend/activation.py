"""Putting own kernels behind PyTorch's attention operators, and taking them away again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from hal_core.plugin_api import UnsupportedError, find_devices

from .operators import Operators
from .routing import Router
from .statistics import Counts, SdpaStatistics

#: The name under which `torch.nn.attention.activate_flash_attention_impl` knows these kernels.
FLASH_ATTENTION_IMPL = "HAL"

_lock = threading.RLock()
_counts = Counts()


class Replacements:
    """Kernels that take the place of operators' own under one dispatch key, for the whole process.

    Args:
        key: the dispatch key, "CUDA".
        table: replacements by operator name. A replacement that returns None leaves the call to the original kernel.
    """

    def __init__(self, key: str, table: dict[str, Callable[..., Any]]) -> None:
        self._key, self._library = key, torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # PyTorch warns that a kernel is replaced, which is what was asked for
            warnings.simplefilter("ignore", UserWarning)
            for name, replacement in table.items():
                if hasattr(torch.ops.aten, name):
                    self._library.impl(name, self._kernel(name, replacement), key, with_keyset=True)

    def remove(self) -> None:
        """Give the operators their former kernels back. May be called twice."""
        if self._library.m is not None:
            self._library._destroy()

    def _kernel(self, name: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
        held = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", self._key)
        original = torch.library.get_kernel(f"aten::{name}", self._key) if held else None

        def kernel(keys: Any, *given: Any, **options: Any) -> Any:
            result = replacement(*given, **options)
            if result is not None:
                return result
            if original is None:
                raise UnsupportedError(
                    f"{name} was called with what hal_cuda's kernels do not take, and PyTorch has no kernel of its own "
                    f"for {self._key} tensors: hal_cuda.sdpa_statistics().reasons says why"
                )
            return original.call_boxed(keys, *given, **options)

        return kernel


class Activation:
    """What `activate_sdpa` returns: leave it, or use it as a context manager, at whose end the activation ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """End this activation; others stay. May be called twice."""
        with _lock:
            _state.holders.pop(self, None)
            _state.settle()


class _State:
    """Who wants own kernels, and the replacements while anybody does. holders: activations, the latest last, with
    whether own kernels serve always."""

    def __init__(self) -> None:
        self.holders: dict[Activation, bool] = {}
        self.installed: tuple[bool, Replacements] | None = None

    def settle(self) -> None:
        """Install or remove, so that the latest activation is in force. Under the lock."""
        wanted = next(reversed(self.holders.values()), None)
        if self.installed is not None and self.installed[0] != wanted:
            self.installed[1].remove()
            self.installed = None
        if self.installed is None and wanted is not None:
            operators = Operators(Router(_device, wanted), _counts)
            self.installed = wanted, Replacements("CUDA", operators.table())


_state = _State()


def activate_sdpa(*, always: bool = False) -> Activation:
    """Run PyTorch's fused attention operators on CUDA tensors by this package's kernels, in the whole process.

    Programs stay as they are: `torch.nn.functional.scaled_dot_product_attention` and
    `torch.nn.attention.varlen.varlen_attn` keep PyTorch's own checks, choice of a backend, autograd, autocast and
    compilation; the CUDA kernels behind the FlashAttention, cuDNN and memory-efficient operators are exchanged. A call
    that own kernels do not take, or for which the original kernel is estimated to be faster, runs on the original, and
    `sdpa_statistics` counts it with its reason. A call that PyTorch sends to its composed path
    (`SDPBackend.MATH`) does not reach these operators.

    May be called from any thread and any number of times; activations count. `deactivate_sdpa` ends all of them.

    Args:
        always: own kernels also where the original is estimated to be faster, for tests and measurements.

    Returns:
        An activation: `with hal_cuda.activate_sdpa(): ...` ends with its block, without ending others.

    Raises:
        DeviceUnavailableError: there is no GPU that these kernels run on, with the reason.
    """
    find_devices("cuda")
    activation = Activation()
    with _lock:
        _state.holders[activation] = always
        try:
            _state.settle()
        except BaseException:
            activation.remove()
            raise
    return activation


def deactivate_sdpa() -> bool:
    """End every activation: the operators have their former kernels again.

    Returns:
        Whether own kernels were active. Without any nothing happens.
    """
    with _lock:
        active = bool(_state.holders)
        _state.holders.clear()
        _state.settle()
    return active


def sdpa_statistics(*, reset: bool = False) -> SdpaStatistics:
    """Calls of PyTorch's attention operators under `activate_sdpa`: those that ran on own kernels, and the others.

    Args:
        reset: begin to count anew.
    """
    return _counts.read(reset=reset)


def _device(tensor: Tensor) -> str:
    return f"cuda:{tensor.device.index or 0}"


def _register() -> None:
    """Make these kernels known to `torch.nn.attention.activate_flash_attention_impl`, which activates them."""
    from torch.nn import attention

    register = getattr(attention, "register_flash_attention_impl", None)
    if register is not None:
        register(FLASH_ATTENTION_IMPL, register_fn=activate_sdpa)


_register()

__all__ = ["Activation", "Replacements", "activate_sdpa", "deactivate_sdpa", "sdpa_statistics"]

"""Watches which storage torch functions give to a session's code, and who asked for it.

A TorchFunctionMode and not a TorchDispatchMode: the rule is about what torch returns to the caller. A dispatch mode
also sees every temporary tensor inside a composite torch function; those belong to the library, and the check of peak
memory counts them.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

SMALL = 64 << 10  # bytes that a session may allocate as it likes
#: Attention operators of torch that cannot be told where to write: none of them has an `out` argument.
OPERATORS = frozenset(
    {
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
    }
)

_KIT = Path(__file__).parent
_CORE, _TORCH, _STDLIB = (str(p) for p in (_KIT.parent, Path(torch.__file__).parent, sysconfig.get_path("stdlib")))
_DEVICES = {str(_KIT / name) for name in ("dense_backend.py", "faulty_backends.py")}  # plugins as far as the kit goes


class Allocation(NamedTuple):
    """Storage that a torch function returned. `where` is "file:line" in the plugin; `storage` keeps it alive."""

    function: str
    nbytes: int
    where: str
    storage: Any

    def __str__(self) -> str:
        return f"{self.nbytes:,} bytes from torch's {self.function} at {self.where}"


class StorageWatch(TorchFunctionMode):
    """Collects storage above `SMALL` that torch functions return to code of a plugin.

    Left out: storage of an argument (a view, or a result in place), everything inside a method of the session's memory
    manager, calls with a frame under a folder named `simulator`, and what the attention operators of torch in
    `OPERATORS` return. A session cannot give those operators memory to write to: where it calls one for a part of the
    result (one sequence of several), what the operator returns is the library's. The check of peak memory counts it.

    Args:
        memory: the session's memory manager; None to collect what comes from there too.
        least: storage of so many bytes or fewer is left out.
    """

    def __init__(self, memory: Any, least: int = SMALL) -> None:
        super().__init__()
        self._memory, self._least = memory, least
        self._found: list[Allocation] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, Tensor)
                and (storage := _storage(tensor)) is not None
                and storage.nbytes() > self._least
            ):
                self._note(func, storage, tree_leaves((args, kwargs)))
        return result

    def _note(self, func: Any, storage: Any, given: list[Any]) -> None:
        name = getattr(func, "__name__", str(func))
        if name.partition(".")[0] in OPERATORS or storage.data_ptr() in _addresses(given):
            return
        where = self._plugin_line(sys._getframe(2))
        if where is not None:
            self._found.append(Allocation(name, storage.nbytes(), where, storage))

    def _plugin_line(self, frame: FrameType | None) -> str | None:
        """The innermost line of the plugin; None where the storage is exempt, or where no plugin asked for it."""
        found = None
        while frame is not None:
            code = frame.f_code
            file = code.co_filename
            if file.startswith(str(_KIT)) and file not in _DEVICES:
                break
            if "/simulator/" in file.replace("\\", "/"):
                return None
            if (
                self._memory is not None
                and code.co_argcount
                and frame.f_locals.get(code.co_varnames[0]) is self._memory
            ):
                return None
            if found is None and _of_plugin(file):
                found = f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return found

    def violations(self, *known: Any) -> list[Allocation]:
        """What was found and is not the storage of a tensor in `known`: the call's inputs and results."""
        addresses = _addresses(tree_leaves(known))
        return [found for found in self._found if found.storage.data_ptr() not in addresses]


def _of_plugin(file: str) -> bool:
    if file in _DEVICES:
        return True
    library = file.startswith(_STDLIB) and "site-packages" not in file
    return not (library or file.startswith((_CORE, _TORCH, "<")))


def _storage(tensor: Tensor) -> Any:
    """The tensor's storage; None where it has no memory of its own (meta, sparse, functional tensors)."""
    try:
        storage = tensor.untyped_storage()
        return storage if storage.device.type != "meta" and storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None


def _addresses(values: Iterable[Any]) -> set[int]:
    return set(_each_address(values))


def _each_address(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, Tensor) and (storage := _storage(value)) is not None:
            yield storage.data_ptr()

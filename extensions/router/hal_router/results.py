"""Results kept between equal calls, for programs that ask the same twice."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

from hal_core import ContractError


class Cache:
    """Results by the contents of their arguments, the least recently used dropped first.

    Attributes:
        bytes, most: held and at most. hits, misses: calls.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.hits, self.misses = most, 0, 0, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Any, result: Any, size: int) -> None:
        with self._lock:
            if size > self.most or key in self._kept:
                return
            self._kept[key] = (result, size)
            self.bytes += size
            while self.bytes > self.most:
                self.bytes -= self._kept.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.bytes = 0


def cached(function: Callable[..., Any], max_bytes: int = 64 << 20) -> Callable[..., Any]:
    """`function`, whose results are kept for calls with arguments of equal contents.

    Arguments are compared by a SHA-256 of every byte of every tensor, so a call costs reading its inputs (on an
    accelerator, copying them to the host). Calls that need gradients, draw dropout without `rng`, or have arguments
    that cannot be compared are not cached. Results are copies: changing one in place changes no later one.

    Args:
        function: for example `hal.attention`: tensors and plain values -> a tensor or a tuple of tensors.
        max_bytes: of the results that are kept.

    Returns:
        A function of the same arguments with the attribute `cache`: `bytes`, `hits`, `misses`, `clear()`.

    Raises:
        ContractError: `max_bytes` is no whole number above 0.
    """
    if type(max_bytes) is not int or max_bytes <= 0:
        raise ContractError(f"max_bytes {max_bytes!r} was given: pass a whole number of bytes above 0")
    cache = Cache(max_bytes)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        key = _key(arguments, keywords)
        if key is None:
            return function(*arguments, **keywords)
        found = cache.get(key)
        if found is None:
            found = function(*arguments, **keywords)
            tensors = found if isinstance(found, tuple) else (found,)
            held = sum(t.nbytes + 256 for t in tensors if t is not None)
            cache.put(key, _copied(found), held)
            return found
        return _copied(found)

    call.cache = cache  # type: ignore[attr-defined]
    return call


def _copied(result: Any) -> Any:
    if isinstance(result, tuple):
        copies: list[Any] = [None if each is None else each.clone() for each in result]
        return type(result)(*copies) if hasattr(result, "_fields") else tuple(copies)
    return result.clone()


def _key(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What two calls share only if their results are equal; None where that cannot be said."""
    import torch

    if (keywords.get("dropout_p") or (len(arguments) > 4 and arguments[4])) and keywords.get("rng") is None:
        return None
    from hal_core import options

    parts: list[Any] = [options.policy_var.get().key, options.settings.policy.key, torch.is_grad_enabled()]
    for name, value in [*enumerate(arguments), *sorted(keywords.items())]:
        if isinstance(value, torch.Tensor):
            if type(value) is not torch.Tensor or value.requires_grad or value.is_meta:
                return None
            parts.append(
                (name, str(value.dtype), str(value.device), tuple(value.shape), value.stride(), _digest(value))
            )
        elif value is None or isinstance(value, bool | int | float | str):
            parts.append((name, type(value).__name__, value))
        elif isinstance(value, tuple) and all(x is None or isinstance(x, int) for x in value):
            parts.append((name, value))
        else:
            return None
    return tuple(parts)


def _digest(tensor: Any) -> bytes:
    import ctypes
    from hashlib import sha256

    import torch

    plain = tensor.detach().contiguous().cpu().view(torch.uint8) if tensor.dim() else tensor.detach().cpu().reshape(1)
    plain = plain.view(torch.uint8)
    if not plain.numel():
        return b""
    return sha256((ctypes.c_char * plain.numel()).from_address(plain.data_ptr())).digest()

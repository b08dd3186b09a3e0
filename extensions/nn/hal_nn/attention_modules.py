"""Attention modules on [batch, length, embed_dim], by where they may run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError, Device, DeviceUnavailableError, Fidelity, UnsupportedError

from .arguments import need_parameter_dtype, need_rows, need_share
from .multihead import PhotonicMultiHeadAttention
from .placement import mark

PHOTONIC = "photonic"  # the family of photonic devices
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _present(family: str | None = None) -> list[Device]:
    return [device for device in hal.devices() if family is None or device.family == family]


def _photonic_device() -> str:
    found = _present(PHOTONIC)
    if not found:
        raise DeviceUnavailableError(
            "a photonic device was asked for, and none is here: pip install hal-photonics, or pass device='auto'"
        )
    return found[0].id


class PhotonicFlashAttention(PhotonicMultiHeadAttention):
    """Multi-head attention on [batch, length, embed_dim]: self-attention, or cross-attention with a key.

    One set of weights, whichever device runs; state dict as nn.MultiheadAttention's.

    Args:
        embed_dim, num_heads, dropout, bias: as nn.MultiheadAttention's.
        photonic_threshold: key length from which a photonic device runs a call. None: the length decides nothing.
        device: "auto" leaves the device to `hal.use` and hal's selection; "photonic" is the first photonic device; else
            a backend or device of hal ("cpu", "cuda:0").
        dtype: of the parameters.

    Raises:
        ContractError: embed_dim that num_heads does not divide. DeviceUnavailableError: no photonic device is here.
        UnknownBackendError: no such device.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        photonic_threshold: int | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_heads(embed_dim, num_heads)
        need_share("dropout", dropout)
        need_parameter_dtype("dtype", dtype)
        if photonic_threshold is not None and (type(photonic_threshold) is not int or photonic_threshold < 0):
            raise ContractError(
                f"photonic_threshold {photonic_threshold!r} was given: pass a key length of 0 or more, or None"
            )
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=True, dtype=dtype)
        self.photonic_threshold = photonic_threshold
        if device != "auto":
            name = _photonic_device() if device == PHOTONIC and not _is_backend(PHOTONIC) else device
            hal.session(name)
            mark(self, name)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of query to key, itself where there is none.

        Args:
            query: [batch, len_q, embed_dim]. key, value: [batch, len_k, embed_dim]; the key where there is no value.
            attention_mask: [batch, len_k] of whole numbers or booleans, 0 hides a key, as tokenizers give it; or a
                boolean (True: may read) or float (added) mask, [len_q, len_k] or broadcasting to [batch, heads, len_q,
                len_k].
            need_weights: give the weights too. is_causal: top-left causal, beside the mask.

        Returns:
            [batch, len_q, embed_dim]; with need_weights a pair with the weights [batch, heads, len_q, len_k].
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, given in (("query", query), ("key", key), ("value", value)):
            need_rows(name, given, self.embed_dim)
        if key.shape != value.shape or key.shape[0] != query.shape[0]:
            raise ContractError(
                f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} were given: key and "
                "value have one shape, and all one batch"
            )
        shape = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        mask = readable_mask(attention_mask, shape, query.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self._projected(query, key, value))
        if need_weights and is_causal:
            causal = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
            mask = causal if mask is None else mask & causal if mask.dtype == torch.bool else _added(mask, causal)
            is_causal = False
        out, weights = self._attention(q, k, v, mask, is_causal, need_weights)
        result = self.out_proj(out.transpose(1, 2).flatten(-2))
        return result if weights is None else (result, weights)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        if self.photonic_threshold is not None and key.shape[2] >= self.photonic_threshold:
            options.setdefault("backend", _photonic_device())
        return super().attend(query, key, value, mask, **options)


class PhotonicAttention(PhotonicFlashAttention):
    """`PhotonicFlashAttention` on a photonic device, always: the first one here, or the one that is named.

    Raises:
        DeviceUnavailableError: none is here. ContractError: the named device is not photonic.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: str | None = None,
        **more: Any,
    ) -> None:
        name = _photonic_device() if device is None else device
        if all(name not in (found.id, found.id.partition(":")[0]) for found in _present(PHOTONIC)):
            known = ", ".join(found.id for found in _present(PHOTONIC)) or "none is here"
            raise ContractError(f"device {name!r} was given to PhotonicAttention: name a photonic device ({known})")
        super().__init__(embed_dim, num_heads, dropout, bias, device=name, **more)


class FlashAttention3(PhotonicFlashAttention):
    """`PhotonicFlashAttention` on electronic devices only.

    Raises:
        UnsupportedError: by a call whose selection, `hal.use` for example, took a photonic device.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, device: str = "auto", **more: Any
    ) -> None:
        if more.get("photonic_threshold") is not None or any(
            device in (PHOTONIC, found.id, found.id.partition(":")[0]) for found in _present(PHOTONIC)
        ):
            raise ContractError(
                "a photonic device or photonic_threshold was given to FlashAttention3, which runs on electronic "
                "devices: use PhotonicFlashAttention"
            )
        super().__init__(embed_dim, num_heads, dropout, bias, device=device, **more)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        result = super().attend(query, key, value, mask, **options)
        decision = self.last_decision
        if decision is not None and decision.winner.device.family == PHOTONIC:
            raise UnsupportedError(
                f"the selection in force took {decision.chosen}, and FlashAttention3 runs on electronic devices: name "
                "one by hal.use, or use PhotonicFlashAttention. The result was dropped.",
                decision,
            )
        return result


class HybridFlashAttention(PhotonicFlashAttention):
    """`PhotonicFlashAttention` that prefers devices in an order, and falls to the next one when it decides.

    Devices of the list that are not here, or cannot run a call, are passed over before anything is launched; when one
    is here again, the next call takes it. A failure after the launch is an error, never a retry.

    Args:
        devices: backends or devices of hal, the preferred first; photonic ones, then the hardware, where it is None.

    Attributes:
        device_counts: calls by the device that ran them. degraded: calls that the first of the list did not run.
        recovered: calls that it ran again after one that it did not.

    Raises:
        ContractError: no list of names. DeviceUnavailableError: by a call, where none of the list is here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        devices: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if devices is not None and (
            isinstance(devices, str)
            or not isinstance(devices, Sequence)
            or not devices
            or not all(isinstance(name, str) for name in devices)
        ):
            raise ContractError(f"devices {devices!r} was given: pass a list of backends or devices, preferred first")
        super().__init__(embed_dim, num_heads, dropout, bias, dtype=dtype)
        if devices is None:
            hardware = [device for device in _present() if device.fidelity is Fidelity.HARDWARE]
            devices = [device.id for device in (*_present(PHOTONIC)[:1], *hardware)]
        self.devices = tuple(devices)
        self.device_counts, self.degraded, self.recovered = Counter[str](), 0, 0
        self._fell = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        here = {name for device in _present() for name in (device.id, device.id.partition(":")[0])}
        usable = [name for name in self.devices if name in here]
        if not usable:
            raise DeviceUnavailableError(
                f"devices {list(self.devices)} were given, and none is here: name one of {sorted(here)}"
            )
        with hal.prefer(usable):
            result = super().attend(query, key, value, mask, **options)
        chosen = self.last_device_used
        if chosen is not None:
            first = chosen in (self.devices[0], self.devices[0] + ":0") or chosen.partition(":")[0] == self.devices[0]
            self.device_counts[chosen] += 1
            self.degraded += not first
            self.recovered += first and self._fell
            self._fell = not first
        return result


def _check_heads(embed_dim: int, num_heads: int) -> None:
    whole = type(embed_dim) is int and type(num_heads) is int and embed_dim > 0 and num_heads > 0
    if not whole or embed_dim % num_heads:
        raise ContractError(
            f"embed_dim {embed_dim!r} and num_heads {num_heads!r} were given: pass whole numbers of which the second "
            "divides the first"
        )


def _is_backend(name: str) -> bool:
    return any(device.id.partition(":")[0] == name for device in hal.devices())


def _added(mask: Tensor, readable: Tensor) -> Tensor:
    return mask.masked_fill(~readable, float("-inf"))


def readable_mask(mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor | None:
    """An attention mask as hal takes it: [batch, len_k] of whole numbers or booleans becomes [batch, 1, 1, len_k].

    Args:
        mask: see `PhotonicFlashAttention.forward`. shape: batch, heads, len_q, len_k. dtype: of the query.

    Raises:
        ContractError: another kind of mask, or a shape that does not broadcast.
    """
    if mask is None:
        return None
    wanted = (
        f"pass [batch, len_k] = {[shape[0], shape[3]]} of 0 and 1, or a boolean (True: may read) or float mask that "
        f"broadcasts to {list(shape)}"
    )
    if not isinstance(mask, Tensor):
        raise ContractError(f"attention_mask is a {type(mask).__name__}: {wanted}")
    padding, rows = (mask.dim() == 2 and mask.shape == (size, shape[3]) for size in (shape[0], shape[2]))
    if mask.dim() == 2 and mask.dtype in _WHOLE and padding:
        return mask[:, None, None] != 0
    if padding and rows and shape[0] > 1:
        raise ContractError(
            f"attention_mask {list(mask.shape)} {mask.dtype} was given to a batch of {shape[0]} with {shape[2]} rows, "
            "and may be over either: pass [batch, 1, 1, len_k] or [1, 1, len_q, len_k]"
        )
    if padding and not rows:
        mask = mask[:, None, None]
    fits = 2 <= mask.dim() <= 4 and all(
        given in (1, size) for given, size in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ContractError(f"attention_mask {list(mask.shape)} {mask.dtype} was given: {wanted}")
    return mask if mask.dtype == torch.bool else mask.to(dtype)

"""nn.MultiheadAttention on any device: its signature, state dict, masks, errors and results."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .record import SEEN, DeviceRecord

_functional: Any = F  # its checks of nn.MultiheadAttention's arguments have no public names


class _Hooks(OrderedDict[int, Any]):
    """Forward hooks that count as one more than there are.

    nn.TransformerEncoderLayer replaces its attention by a fused operator of torch in inference, unless a module inside
    has hooks, which it counts by len(). Calling a module asks only whether there are any.
    """

    def __len__(self) -> int:
        return super().__len__() + 1

    def __bool__(self) -> bool:
        return super().__len__() > 0


class PhotonicMultiHeadAttention(DeviceRecord, nn.MultiheadAttention):
    """A drop-in for nn.MultiheadAttention whose attention runs on hal's devices.

    Arguments, state dict, masks, and results are nn.MultiheadAttention's, with these differences: a row whose keys are
    all masked gives the projection of 0 instead of NaN; attention weights that are asked for are computed by torch from
    the projected query and key, except under dropout, where the device gives them as its attention to unit vectors.

    `hal_nn.set_device`, `hal.use` and the other ways of selecting a device hold. Inside nn.TransformerEncoderLayer the
    fused inference path of torch is not taken.

    Attributes:
        last_decision, last_device_used, last_latency_ms, last_energy_mj: of the newest call, see `DeviceRecord`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._forward_hooks = _Hooks(self._forward_hooks)

    def forward(  # type: ignore[override, unused-ignore]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward.

        Args:
            query, key, value: [length, batch, embed_dim], [batch, length, embed_dim] with batch_first, or [length,
                embed_dim]; key and value with kdim and vdim.
            key_padding_mask: [batch, len_k] or [len_k]; True hides a key, a float is added to its scores.
            attn_mask: [len_q, len_k] or [batch * heads, len_q, len_k]; True hides, a float is added.
            is_causal: attn_mask, which must be given, is the causal one.

        Returns:
            (result, weights): the result in the query's form; weights [batch, len_q, len_k], or with heads after the
            batch where they are not averaged, or None.

        Raises:
            AssertionError, RuntimeError: malformed input, as nn.MultiheadAttention says it. HalError: no device can.
        """
        if query.is_nested:
            average = average_attn_weights
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, average)
        mask, causal, batched = None, False, True
        # Python that runs between torch's operators finds cold caches: the usual call takes the shortest way.
        if attn_mask is not None or key_padding_mask is not None or is_causal or not query.dim() == 3 == key.dim():
            batched = _functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
            mask, causal = self._mask(query, key, key_padding_mask, attn_mask, is_causal, need_weights)
        elif value.dim() != 3:
            _functional._mha_shape_check(query, key, value, None, None, self.num_heads)  # raises
        if not batched:
            same = key is query, value is key
            query = query.unsqueeze(0)
            key = query if same[0] else key.unsqueeze(0)
            value = key if same[1] else value.unsqueeze(0)
        # Whether the length comes first: it is then moved behind the heads without a copy.
        first = batched and not self.batch_first
        own = self._parameters
        weight, bias = _parameter(self, own, "in_proj_weight"), _parameter(self, own, "in_proj_bias")
        if query is key and key is value and weight is not None and own.get("bias_k") is None:
            q, k, v = self._self_heads(query, weight, bias, first)
        else:
            self._check(query, key, value)
            q, k, v = self._heads(query, key, value, first)
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if need_weights or causal or (self.training and self.dropout):
            out, weights = self._attention(q, k, v, mask, causal, need_weights)
        else:
            out, weights = self.attend(q, k, v, mask), None
        out = out.permute(2, 0, 1, 3) if first else out.transpose(1, 2)
        last: Any = self._modules["out_proj"]
        own = last._parameters
        out = F.linear(out.flatten(2), _parameter(last, own, "weight"), _parameter(last, own, "bias"))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _self_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, first: bool) -> tuple[Tensor, ...]:
        """Query, key and value [batch, heads, length, head_dim] of self-attention, projected by one product."""
        shape = x.shape
        if shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {shape[-1]}")
        if bias is not None and bias.dtype != weight.dtype:  # which torch's matrix product with a bias refuses
            bias = bias.to(weight.dtype)
        parts = F.linear(x, weight, bias).reshape(shape[0], shape[1], 3, self.num_heads, self.head_dim)
        return parts.permute(2, 1, 3, 0, 4).unbind(0) if first else parts.permute(2, 0, 3, 1, 4).unbind(0)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, first: bool) -> tuple[Tensor, ...]:
        """Query, key and value as heads, with the learned key and value at the end."""
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            length = 0 if first else 1
            ends = [
                bias.expand(*((-1, k.shape[1]) if first else (k.shape[0], -1)), -1)
                for bias in (self.bias_k, self.bias_v)
            ]
            k, v = (torch.cat((t, end), length) for t, end in zip((k, v), ends, strict=True))
        shape = (self.num_heads, self.head_dim)
        order = (1, 2, 0, 3) if first else (0, 2, 1, 3)
        return tuple(t.unflatten(-1, shape).permute(order) for t in (q, k, v))

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """What torch.nn.functional.multi_head_attention_forward asserts of the operands."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if not self._qkv_same_embed_dim:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
                )
        elif key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
                return q, k, v
            q, k, v = _functional._in_projection_packed(query, key, value, self.in_proj_weight, bias)
            return q, k, v
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
        return q, k, v

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor | None, bool]:
        """(mask as hal takes it, whether causal): True in a boolean mask means that a key may be read there."""
        if is_causal and mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if mask is None and padding is None:
            return None, False
        boolean = all(t is None or t.dtype == torch.bool for t in (mask, padding))
        if not boolean:
            padding = _functional._canonical_mask(
                padding, "key_padding_mask", _functional._none_or_dtype(mask), "attn_mask", target_type=query.dtype
            )
            mask = _functional._canonical_mask(mask, "attn_mask", None, "", target_type=query.dtype, check_other=False)
        if is_causal and padding is None and not need_weights:
            return None, True
        batched = query.dim() == 3
        at = 1 if batched and self.batch_first else 0
        batch, len_q, len_k = query.shape[1 - at] if batched else 1, query.shape[at], key.shape[at]
        added = (self.bias_k is not None) + bool(self.add_zero_attn)  # keys that nothing hides
        if mask is not None:
            size = (len_q, len_k) if mask.dim() == 2 else (batch * self.num_heads, len_q, len_k)
            if mask.shape != size:
                raise RuntimeError(f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {size}.")
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))
        if padding is not None:
            padding = padding if batched else padding.unsqueeze(0)
            for place, wanted in enumerate((batch, len_k)):
                if padding.shape[place] != wanted:
                    raise AssertionError(
                        f"Expected key_padded_mask.shape[{place}] to be {wanted}, but got {padding.shape[place]}"
                    )
            padding = padding[:, None, None]
        hidden = padding if mask is None else mask
        if mask is not None and padding is not None:
            hidden = mask | padding if boolean else mask + padding
        assert hidden is not None
        hidden = F.pad(hidden, (0, added)) if added else hidden
        return ~hidden if boolean else hidden, False

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(result, weights per head or None)."""
        options: dict[str, Any] = {"is_causal": True} if causal else {}
        if self.training and self.dropout:
            options["dropout_p"] = self.dropout
            if need_weights:  # its pattern is the device's: unit vectors as values give the weights that it used
                size = key.shape[2]
                units = torch.eye(size, dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
                both = self.attend(query, key, torch.cat((value, units), -1), mask, **options)
                out, weights = both.split((self.head_dim, size), -1)
                return out, weights
        out = self.attend(query, key, value, mask, **options)
        return out, _weights(query, key, mask) if need_weights else None

    def _nested(
        self, query: Any, key: Any, value: Any, padding: Any, need_weights: bool, mask: Any, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a nested tensor [batch, ragged length, embed_dim], as nn.TransformerEncoder passes it.

        Weights are padded to the longest length, 0 in its rows and columns past an entry's own, as torch's fast path
        gives them.
        """
        if query is not key or key is not value or padding is not None or mask is not None:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor outside of its fast path: nested query, key and "
                "value must be one tensor, without masks"
            )
        if query.layout is torch.jagged:
            rows = torch.nested.to_padded_tensor(query, 0.0)
            lengths = query.offsets().diff()
        else:
            rows, lengths = query.to_padded_tensor(0.0), query._nested_tensor_size()[:, 0].to(query.device)
        kept = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
        x = rows if self.batch_first else rows.transpose(0, 1)
        out, weights = self(x, x, x, key_padding_mask=~kept, need_weights=need_weights, average_attn_weights=average)
        if weights is not None:
            weights = weights * (kept[:, :, None] if average else kept[:, None, :, None])
        out = out if self.batch_first else out.transpose(0, 1)
        if query.layout is torch.jagged:
            return torch.nested.nested_tensor_from_jagged(out[kept], query.offsets()), weights
        return torch._nested_tensor_from_mask(out, kept, mask_check=False), weights


def _parameter(module: nn.Module, own: dict[str, Any], name: str) -> Any:
    """A parameter of the module, whose `_parameters` are `own`: read there, which an attribute takes longer for, unless
    pruning or a parametrization computes it.
    """
    return own[name] if name in own else getattr(module, name)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query @ key^T / sqrt(head_dim) + mask), [batch, heads, len_q, len_k]; 0 in rows without a key."""
    batch, heads, rows, size = query.shape
    keys = key.shape[2]
    operands = query.reshape(batch * heads, rows, size), key.reshape(batch * heads, keys, size).transpose(1, 2)
    start = query.new_empty((1, 1, 1))  # ignored: one operator for the product and its scale
    scores = torch.baddbmm(start, *operands, beta=0, alpha=1 / math.sqrt(size)).view(batch, heads, rows, keys)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch._safe_softmax(scores, -1)


def adopt(module: nn.MultiheadAttention) -> Any:
    """Make an nn.MultiheadAttention a `PhotonicMultiHeadAttention`, with its parameters; what `release` takes."""
    hooks = module._forward_hooks
    module.__class__ = PhotonicMultiHeadAttention
    module._forward_hooks = _Hooks(hooks)
    return hooks


def release(module: nn.MultiheadAttention, hooks: Any) -> None:
    """Take back what `adopt` did."""
    module.__class__ = nn.MultiheadAttention
    hooks.clear()
    hooks.update(module._forward_hooks)
    module._forward_hooks = hooks
    module.__dict__.pop(SEEN, None)

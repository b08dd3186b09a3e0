"""The Hugging Face bridge: `attn_implementation="hal"`, its attention and its mask function registered together.

    import hal_nn.huggingface
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="hal")
    with hal_core.use("cpu:0"):
        model.generate(**inputs)

An argument that changes the result is implemented or refused. One that does not is in `IGNORED_ARGUMENTS`. Any other
argument that is not None is refused by name: a new transformers cannot make this bridge drop something silently.

Models built from one config object share its attention setting; give each its own copy (`copy.deepcopy(config)`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hal_core as hal
from hal_core import HalError, UnsupportedError

try:
    import torch
    from torch import Tensor, nn
    from transformers import AttentionInterface, AttentionMaskInterface

    from . import model_check
    from .masks import (
        Packed,
        attention_mask as attention_mask,
        dense_mask,
        forget_packed,
        packed_at,
        packed_in,
        says_packed,
    )
    from .placement import calls, device_of, set_device as set_device
except ImportError as error:
    raise HalError(
        f"the Hugging Face bridge needs torch and transformers 5 or newer ({error}): pip install 'hal-nn[hf]'"
    ) from error

NAME = model_check.NAME

#: Arguments that models pass on to attention and that do not change its result: what they say is already in query, key,
#: value and mask, or concerns the layers around attention. position_ids do where they start again and there is no mask:
#: they describe packed sequences.
IGNORED_ARGUMENTS = frozenset(
    {
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "input_ids",
        "inputs_embeds",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)

#: Arguments that change the result and are not implemented: the reason, and what to do instead.
REFUSED_ARGUMENTS = {
    "block_indices": "sparse attention by block indices; use attn_implementation='eager'",
    "block_table": "a paged cache; use the dynamic or the static cache",
    "cache": "continuous batching with a paged cache; use generate(), with the dynamic or the static cache",
    "seq_idx": "packed sequences by index; pass cu_seq_lens_q and cu_seq_lens_k, or position_ids alone",
}


def register() -> None:
    """Register attention and mask function under `NAME`, and have every model checked (`model_check`).

    Importing this module does it; twice is harmless.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    model_check.install()


def unregister() -> None:
    """Take back what `register` did; twice is harmless. Models that were built for hal need it registered to run."""
    model_check.uninstall()
    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it.

    Args:
        module: the attention layer; its `is_causal` holds where the argument is None, True where it has none.
        query, key, value: [batch, heads, length, head_dim]; grouped heads are not repeated.
        attention_mask: boolean (True: may read) or additive, broadcastable to [batch, heads, len_q, len_k]. None:
            causal from the top left where the layer is causal and len_q > 1, else full. It already holds a sliding
            window.
        softcap: c in c * tanh(score / c), before the mask.
        sliding_window: keys that a row reads, itself included. With a mask it is in the mask; without, it is applied.
        position_bias: added to the scores, [1 or batch, heads, len_q, len_k].
        s_aux, sinks: one more logit in each row's softmax, without a value: [heads], or [batch, heads, len_q, 1].
        indices: int64 [batch, len_q, keys]: the keys that each row may read, where the mask allows it too.
        cu_seq_lens_q, cu_seq_lens_k: int32 [sequences + 1]: sequences packed along the length of a batch of 1. A mask
            that says the same, as transformers builds from position_ids, gives way to them. Without them they are taken
            from such a mask, or from position_ids that start again; a device that runs no packed sequences gets the
            mask. A mask that says causal with a window, and hides no padding, gives way to the window likewise.

    Returns:
        ([batch, len_q, heads, head_dim], None), contiguous.

    Raises:
        HalError: an argument that would change the result and is not implemented; or what `hal.attention` refuses.
    """
    if output_attentions:
        raise HalError(
            "output_attentions=True was given, and hal never holds the weights: use attn_implementation='eager'"
        )
    if not IGNORED_ARGUMENTS.issuperset(others):
        _refuse_unknown(others)
    if s_aux is not None and sinks is not None:
        raise HalError("s_aux and sinks were both given: pass one of them")
    sink = s_aux if sinks is None else sinks
    len_q = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    dense: Callable[[], Tensor] | None = None  # what a device without packed sequences runs instead
    if position_bias is None and indices is None and len_q == key.shape[2]:
        given = cu_seq_lens_q is not None or cu_seq_lens_k is not None
        positions = others.get("position_ids") if is_causal else None
        if attention_mask is not None:
            packed = packed_in(attention_mask, positions, len_q, given)
        else:
            packed = None if given else packed_at(positions, len_q)
            packed = None if packed is None else packed._replace(window=sliding_window)
        if packed is not None:
            if given:
                _check_limits(packed.cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
            else:
                dense = functools.partial(_dense, attention_mask, packed)
                cu_seq_lens_q = cu_seq_lens_k = packed.cu_seqlens
                max_length_q = max_length_k = packed.longest
            attention_mask, is_causal, sliding_window = None, packed.causal, packed.window
    options: dict[str, Any] = {}
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        options = _packed(attention_mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, position_bias)
        options["causal"] = "bottom_right" if is_causal else "none"
    elif attention_mask is None and is_causal and len_q > 1:
        options["is_causal"] = True
        if key.shape[2] > len_q:  # the part of a static cache that is still empty
            key, value = key[:, :, :len_q], value[:, :, :len_q]
            position_bias = None if position_bias is None else position_bias[..., :len_q]
    if (
        sliding_window is not None
        and attention_mask is None
        and sliding_window < options.get("max_seqlen_k", key.shape[2])
    ):
        options.pop("is_causal", None)
        options |= _window(sliding_window, is_causal)
    if indices is not None:
        attention_mask = _with_indices(attention_mask, indices, key.shape[2], bool(options.pop("is_causal", False)))
        if "causal" in options:
            raise HalError("indices were given together with cu_seq_lens or a window without a mask: pass the mask")
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias.to(query.dtype))
    plain: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        plain["softcap"] = softcap
    if deterministic:
        plain["deterministic"] = True
    if (device := device_of(module)) is not None:
        plain["backend"] = device
    try:
        out = _attend(query, key, value, attention_mask, dropout, sink, options | plain)
    except UnsupportedError:
        if dense is None:
            raise
        out = _attend(query, key, value, dense(), dropout, sink, plain)
    if not torch.compiler.is_compiling():
        calls.count += 1
    return out.transpose(1, 2).contiguous(), None


def _dense(mask: Tensor | None, packed: Packed) -> Tensor:
    """The mask that says the same as packed sequences, or as causal attention with a window."""
    if mask is not None and (packed.cu_seqlens is None or says_packed(mask)):
        forget_packed(mask)  # the other layers need not ask the device again
        return mask
    return dense_mask(packed)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    sink: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if sink is None:
        plain: Tensor = hal.attention(query, key, value, mask, dropout, **options)
        return plain
    out, lse = hal.attention(query, key, value, mask, dropout, return_lse=True, **options)
    return _with_sink(out, lse, sink)


def _check_limits(said: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    """Refuse cu_seq_lens that name other sequences than position_ids do, from which the mask was made."""
    if said is None:
        return
    for name, given in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        if given is not None and not torch.equal(given.to(said), said):
            raise HalError(
                f"{name} {given.tolist()} and position_ids, which start again at {said.tolist()}, were given: pass one "
                f"of them, or the same limits in both"
            )


def _refuse_unknown(others: dict[str, Any]) -> None:
    for name, given in others.items():
        if given is None or name in IGNORED_ARGUMENTS:
            continue
        if name in REFUSED_ARGUMENTS:
            raise HalError(f"the model passed {name} to attention, which hal does not run: {REFUSED_ARGUMENTS[name]}")
        raise HalError(
            f"the model passed the argument {name!r} to attention, and hal does not know whether it changes the "
            f"result: use attn_implementation='eager' or 'sdpa', or do not pass {name}"
        )


def _packed(
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
    bias: Tensor | None,
) -> dict[str, Any]:
    """hal's options for packed sequences."""
    if cu_q is None or cu_k is None:
        raise HalError("one of cu_seq_lens_q and cu_seq_lens_k was given: pass both")
    if mask is not None or bias is not None:
        what = "an attention_mask" if mask is not None else "a position_bias"
        raise HalError(f"{what} was given together with cu_seq_lens: pass one, or packed position_ids alone")
    return {
        "cu_seqlens_q": cu_q.to(torch.int32),
        "cu_seqlens_k": cu_k.to(torch.int32),
        "max_seqlen_q": max_q if max_q is None else int(max_q),
        "max_seqlen_k": max_k if max_k is None else int(max_k),
    }


def _window(sliding_window: int, is_causal: bool) -> dict[str, Any]:
    """hal's options for a window that no mask holds. Decoding aligns it to the last key."""
    if not is_causal:
        raise HalError(
            f"sliding_window {sliding_window} was given to attention that is not causal, without a mask that holds it: "
            f"pass the mask, whose limits are exact"
        )
    return {"causal": "bottom_right", "window": (sliding_window - 1, 0)}


def _with_indices(mask: Tensor | None, indices: Tensor, len_k: int, is_causal: bool) -> Tensor:
    """A mask that leaves each row the keys that the mask, or None, allows and that are among the row's indices."""
    batch, len_q, _ = indices.shape
    chosen = torch.zeros(batch, 1, len_q, len_k, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices[:, None].long(), True)
    if is_causal:
        chosen = chosen.tril()
    if mask is None:
        return chosen
    return chosen & mask if mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """One additive mask out of a mask, or None, and a bias added to the scores."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, float("-inf"))
    return bias + mask


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Attention whose softmax holds one more logit without a value.

    softmax over (scores, sink) is softmax(scores) * exp(lse) / (exp(lse) + exp(sink)), which is sigmoid(lse - sink). A
    row that reads no key has lse -inf and stays 0.

    Args:
        out: [batch, heads, len_q, dim]. lse: [batch, heads, len_q]. sink: [heads] or [batch, heads, len_q, 1].
    """
    logit = sink.view(1, -1, 1) if sink.ndim == 1 else sink.squeeze(-1)
    return out * torch.sigmoid(lse - logit.to(lse.dtype)).unsqueeze(-1).to(out.dtype)


register()

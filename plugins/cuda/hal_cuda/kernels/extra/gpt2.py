"""transformers' GPT-2 on this package's kernels: attention by `hal_core.attention`, the MLP by `fused_gelu_linear`."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hal_core.plugin_api import ContractError, DeviceUnavailableError, attention

from .checks import refuse

_ATTENTION, _PATCH, _LINEAR = "hal_cuda", "_hal_cuda_before", "_hal_cuda_linear"
_TANH = {"gelu": False, "gelu_new": True, "gelu_fast": True, "gelu_pytorch_tanh": True}


def patch_gpt2_model(
    model: nn.Module, backend: str = "cuda", patch_attention: bool = True, patch_mlp: bool = True
) -> nn.Module:
    """Run a GPT-2 of transformers on this package's kernels, in place. Weights stay as they are.

    Patching a patched model replaces what was patched before. Training works: attention and MLP have gradients.

    Args:
        model: a transformers model of GPT-2 on a CUDA device, whole.
        backend: which `fused_gelu_linear` the MLP takes, "cuda" (CuPy) or "triton".
        patch_attention, patch_mlp: what to patch.

    Returns:
        model.

    Raises:
        ContractError: not a GPT-2, a model outside a GPU, an activation that is no GELU, or another backend.
        DeviceUnavailableError: there is no GPU. Nothing was patched.
    """
    attentions, layers = _parts(model)
    config: Any = model.config
    refuse("patch_gpt2_model", (backend not in ("cuda", "triton"), f"backend {backend!r}: use 'cuda' or 'triton'"))
    _check_place(model, backend)
    if patch_mlp:
        name = config.activation_function
        refuse(
            "patch_gpt2_model",
            (
                name not in _TANH,
                f"a model with activation {name!r}, and the fused MLP has {', '.join(_TANH)}: pass patch_mlp=False",
            ),
        )
        linear = _linear(backend)
    unpatch_gpt2_model(model)
    if patch_attention and attentions:
        _register()
        model.__dict__[_PATCH] = config._attn_implementation
        config._attn_implementation = _ATTENTION
    if patch_mlp:
        for layer in layers:
            layer.__dict__[_LINEAR] = linear, _TANH[config.activation_function]
            layer.__dict__["forward"] = MethodType(_mlp, layer)
    return model


def unpatch_gpt2_model(model: nn.Module) -> nn.Module:
    """Undo `patch_gpt2_model`; a model that is not patched stays as it is. Returns model."""
    before = model.__dict__.pop(_PATCH, None)
    config: Any = getattr(model, "config", None)
    if before is not None and config._attn_implementation == _ATTENTION:
        config._attn_implementation = before
    for module in model.modules():
        if module.__dict__.pop(_LINEAR, None) is not None:
            module.__dict__.pop("forward", None)
    return model


def _parts(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The attention layers and the MLPs of a GPT-2."""
    try:
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
    except ImportError as error:
        raise ContractError(
            "patch_gpt2_model needs transformers, whose models it patches: pip install transformers"
        ) from error
    attentions = [module for module in model.modules() if isinstance(module, GPT2Attention)]
    layers = [module for module in model.modules() if isinstance(module, GPT2MLP)]
    refuse(
        "patch_gpt2_model",
        (
            not layers or not hasattr(model, "config"),
            f"a {type(model).__name__} without GPT-2 blocks: pass a GPT-2 model of transformers",
        ),
    )
    return attentions, layers


def _check_place(model: nn.Module, backend: str) -> None:
    """Refuse a model that does not lie on GPUs, unless Triton computes on the host."""
    places = {parameter.device for parameter in model.parameters()}
    if all(place.type == "cuda" for place in places):
        return
    if backend == "triton":
        from ...runtime import binaries

        if binaries.INTERPRETED:
            return
    if not torch.cuda.is_available():
        from ...discovery import find

        reason = find().reason or "torch finds no CUDA device"
        raise DeviceUnavailableError(f"patch_gpt2_model needs a GPU: {reason}. Nothing was patched.")
    where = ", ".join(sorted(map(str, places)))
    refuse("patch_gpt2_model", (True, f"a model on {where}: move it to a GPU first, model.to('cuda')"))


def _linear(backend: str) -> Any:
    """The MLP's first product. Raises DeviceUnavailableError where CuPy or NVRTC is missing."""
    if backend == "cuda":
        from ..cupy.gelu_linear import fused_gelu_linear
        from ..cupy.module import cupy

        cupy()
        return fused_gelu_linear
    from .gelu_linear import triton_fused_gelu_linear

    return triton_fused_gelu_linear


def _register() -> None:
    """Make the attention known to transformers under `hal_cuda`; twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' GPT-2 calls it; what else it passes does not change the result.

    attention_mask: None for causal attention where the layer is causal and has several queries, else for full
        attention.
    """
    refuse(
        "GPT-2's attention",
        (
            bool(others.get("output_attentions")),
            "output_attentions=True, and the weights are never held: unpatch first",
        ),
    )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:  # the part of a static cache that is still empty
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    place: dict[str, Any] = {"backend": str(query.device)} if query.is_cuda else {}
    out: Any = attention(query, key, value, attention_mask, dropout, causal, scale=scaling, **place)
    return out.transpose(1, 2).contiguous(), None


def _mlp(layer: Any, hidden_states: Tensor) -> Tensor:
    """GPT2MLP's forward. Its Conv1D stores weights as [in, out]."""
    linear, tanh = layer.__dict__[_LINEAR]
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    weight, bias = layer.c_fc.weight.mT, layer.c_fc.bias
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
    inner = linear(x, weight, bias, tanh)
    out: Tensor = layer.dropout(layer.c_proj(inner.view(*hidden_states.shape[:-1], -1)))
    return out

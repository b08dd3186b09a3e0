"""Small configurations of 25 models with random weights, from transformers and, where it can be imported, timm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = _TEXT | _NO_DROPOUT
_LLAMA = _TEXT | {"num_key_value_heads": 2}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    **_NO_DROPOUT,
}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 64,
}
_GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_DISTIL = {
    "vocab_size": 99,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2], "layer_type": "basic"}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    **_NO_DROPOUT,
}

#: Name to (model type, transformers class, configuration, what it reads).
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("bert", "BertModel", _ENCODER, "text"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", _GPT2, "text"),
    "llama": ("llama", "LlamaForCausalLM", _LLAMA, "text"),
    "vit": ("vit", "ViTModel", _VISION, "image"),
    "resnet18": ("resnet", "ResNetForImageClassification", _RESNET, "picture"),
    "t5": ("t5", "T5ForConditionalGeneration", _T5, "pair"),
    "distilbert": ("distilbert", "DistilBertModel", _DISTIL, "text"),
    "roberta": ("roberta", "RobertaModel", _ENCODER | {"pad_token_id": 1}, "text"),
    "albert": ("albert", "AlbertModel", _ENCODER | {"embedding_size": 16}, "text"),
    "electra": ("electra", "ElectraModel", _ENCODER | {"embedding_size": 16}, "text"),
    "mpnet": ("mpnet", "MPNetModel", _ENCODER, "text"),
    "deberta": (
        "deberta-v2",
        "DebertaV2Model",
        _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "text",
    ),
    "opt": ("opt", "OPTForCausalLM", _TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, "text"),
    "neox": ("gpt_neox", "GPTNeoXForCausalLM", _ENCODER | {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "text"),
    "mistral": ("mistral", "MistralForCausalLM", _LLAMA | {"sliding_window": 5}, "text"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _LLAMA, "text"),
    "gemma": ("gemma", "GemmaForCausalLM", _LLAMA | {"head_dim": 8}, "text"),
    "phi": ("phi", "PhiForCausalLM", _TEXT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}, "text"),
    "bart": ("bart", "BartModel", _BART, "pair"),
    "deit": ("deit", "DeiTModel", _VISION, "image"),
    "beit": ("beit", "BeitModel", _VISION | {"drop_path_rate": 0.0, "use_relative_position_bias": True}, "image"),
    "swin": ("swin", "SwinModel", _SWIN, "image"),
    "convnext": ("convnext", "ConvNextModel", _STAGES, "image"),
    "poolformer": ("poolformer", "PoolFormerModel", _STAGES | {"drop_path_rate": 0.0}, "picture"),
    "regnet": ("regnet", "RegNetModel", _STAGES | {"embedding_size": 8, "groups_width": 4}, "picture"),
}
#: timm's, beyond the 25, where it can be imported: name to its settings.
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {"num_classes": 10},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10},
    "mobilenetv3_small_050": {"num_classes": 10},
    "efficientnet_b0": {"num_classes": 10, "drop_rate": 0.0},
    "convnext_atto": {"num_classes": 10},
    "mixer_s32_224": {"img_size": 64, "num_classes": 10},
}
NAMES = [*TRANSFORMERS, *(f"timm:{name}" for name in TIMM)]
#: Norms cancel parts of their gradients so far that float32 rounding alone moves those by 1e-4: compared in float64.
IN_FLOAT64 = ("timm:mobilenetv3_small_050", "timm:efficientnet_b0", "timm:mixer_s32_224")
FULLY_ON_KPU = ("bert", "gpt2", "llama", "vit", "resnet18", "t5")


def build(name: str, seed: int, batch: int = 2, length: int = 12) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in eval mode and the keyword inputs it takes, all drawn from the seed."""
    torch.manual_seed(seed)
    model, inputs = (
        _timm(name.removeprefix("timm:")) if name.startswith("timm:") else _transformers(name, batch, length)
    )
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:  # statistics of real inputs: with those of a new model the signal dies on its way
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(**inputs)
        for norm in norms:
            norm.momentum = 0.1
    if name in IN_FLOAT64:
        model, inputs = model.double(), {key: value.double() for key, value in inputs.items()}
    return model.eval(), inputs


def _timm(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = timm_module().create_model(name, pretrained=False, **TIMM[name])
    for parameter in model.parameters():  # heads of zeros would hide everything before them
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    size = TIMM[name].get("img_size", 64)
    return model, {"x": torch.randn(8, 3, size, size)}


def _transformers(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    kind, architecture, settings, reads = TRANSFORMERS[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, architecture)(config)
    words = torch.randint(2, 99, (batch, length))
    inputs: dict[str, Callable[[], dict[str, Tensor]]] = {
        "text": lambda: {"input_ids": words, "attention_mask": _padding(words)},
        "pair": lambda: {"input_ids": words, "decoder_input_ids": torch.randint(2, 99, (batch, 7))},
        "image": lambda: {"pixel_values": torch.randn(batch, 3, 32, 32)},
        "picture": lambda: {"pixel_values": torch.randn(8, 3, 64, 64)},
    }
    return model, inputs[reads]()


def _padding(words: Tensor) -> Tensor:
    """The last sentence ends three words early."""
    mask = torch.ones_like(words)
    mask[-1, -3:] = 0
    return mask


def timm_module() -> Any:
    """timm, or a skip that says why it cannot be imported here."""
    for name in (
        "nms",
        "qnms",
    ):  # torchvision's compiled part does not load beside torch's CPU build; timm needs none of it
        with contextlib.suppress(RuntimeError):  # it is there
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported here: {str(error).splitlines()[0]}")
    return timm


def floats(outputs: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if hasattr(outputs, "to_tuple"):
        outputs = outputs.to_tuple()
    return [tensor for item in outputs for tensor in floats(item)] if isinstance(outputs, (tuple, list)) else []

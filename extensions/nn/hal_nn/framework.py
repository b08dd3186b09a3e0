"""Attention by configuration: `create_attention(AttentionConfig(...))`, with patterns that may be registered."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from hal_core import ContractError, HalError

from . import patterns
from .attention_config import AttentionConfig, AttentionPatterns

Factory = Callable[[AttentionConfig], nn.Module]
_factories: dict[str, Factory] = {}


def register_attention(name: str, factory: Factory | None = None) -> Any:
    """Have `create_attention` build configurations whose pattern is `name` by `factory`.

    Args:
        name: of the pattern. factory: takes the `AttentionConfig`, gives a module. None: a decorator is returned.

    Raises:
        ContractError: the name is taken.
    """
    if factory is None:
        return lambda decorated: register_attention(name, decorated)
    if name in known_patterns():
        raise ContractError(f"pattern {name!r} is registered already: use another name, or unregister_attention first")
    _factories[name] = factory
    return factory


def unregister_attention(name: str) -> None:
    """Forget a pattern of `register_attention`; one that is not known is ignored."""
    _factories.pop(name, None)


def known_patterns() -> list[str]:
    """Names that a configuration's pattern may have."""
    return [*(pattern.value for pattern in AttentionPatterns), *_factories]


def create_attention(config: AttentionConfig) -> nn.Module:
    """The module of a configuration: [batch, length, embed_dim] -> the same; see `PatternAttention.forward`.

    Raises:
        ContractError: a malformed configuration or an unknown pattern. HalError: the pattern needs a package that is
            not installed.
    """
    config.check()
    if config.name in _factories:
        return _factories[config.name](config)
    if config.name == AttentionPatterns.RING.value:
        return _ring(config)
    made = patterns.MODULES.get(config.name)
    if made is None:
        raise ContractError(f"pattern {config.pattern!r} was given: use one of {', '.join(known_patterns())}")
    return made(config)


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

"""What the code of a module says about attention: read off its source, without running it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from .record import DeviceRecord

#: Layers, by the end of their names, that are called attention and are another operation: they weigh sampled points,
#: the states of earlier layers or channels, by no product of queries and keys.
OTHER_OPERATIONS = ("DeformableAttention", "BlockAttentionResidual", "PatchTSMixerGatedAttention")

#: Layers, by the end of their names, that reduce a sequence to one vector by an attention of their own behind the last
#: layer.
POOLING_HEADS = ("PoolingHead",)

_OWN_ATTENTION = re.compile(r"softmax|scaled_dot_product_attention|multi_head_attention_forward", re.IGNORECASE)
_PRODUCT = re.compile(r"matmul|bmm|einsum|\w @ |scaled_dot_product_attention", re.IGNORECASE)
_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|attention_interface")
_sources: dict[type[Any], str] = {}


def forward_source(kind: type[Any]) -> str:
    """The source of the class that gives `kind` its forward; "" if there is none, as for classes typed at a prompt."""
    if kind not in _sources:
        try:
            _sources[kind] = inspect.getsource(next(one for one in kind.__mro__ if "forward" in vars(one)))
        except (OSError, TypeError, StopIteration):
            _sources[kind] = ""
    return _sources[kind]


def is_pooling_head(kind: type[Any]) -> bool:
    """Whether layers of a class reduce a sequence to one vector."""
    return kind.__name__.endswith(POOLING_HEADS)


def is_called_attention(kind: type[Any]) -> bool:
    """Whether the name of a class says attention."""
    return re.search("attention|attn", kind.__name__, re.IGNORECASE) is not None


def asks_interface(kind: type[Any]) -> bool:
    """Whether layers of a class compute attention by transformers' attention interface."""
    return is_called_attention(kind) and bool(_INTERFACE.search(forward_source(kind)))


def computes_attention(kind: type[Any]) -> bool:
    """Whether layers of a class of transformers compute attention by their own code."""
    if issubclass(kind, DeviceRecord):
        return False
    if issubclass(kind, nn.MultiheadAttention):
        return True
    if not is_called_attention(kind) or kind.__name__.endswith((*OTHER_OPERATIONS, *POOLING_HEADS)):
        return False
    return bool(_OWN_ATTENTION.search(forward_source(kind))) and not asks_interface(kind)


def has_products(kind: type[Any]) -> bool:
    """Whether the code of a class multiplies matrices that are no weights of a linear layer."""
    return bool(_PRODUCT.search(forward_source(kind)))


def may_attend(kind: type[Any]) -> bool:
    """Whether layers of a class, whatever it is called, may compute attention by their own code.

    A class whose source cannot be read may, if it is not torch's.
    """
    if kind.__module__.startswith(("torch.", "hal_nn.")) or issubclass(kind, DeviceRecord):
        return False
    if kind.__module__.startswith("transformers."):
        return computes_attention(kind) and not issubclass(kind, nn.MultiheadAttention)
    source = forward_source(kind)
    return not source or bool(_OWN_ATTENTION.search(source) and _PRODUCT.search(source))

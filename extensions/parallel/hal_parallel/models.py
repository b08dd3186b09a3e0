"""`with hal_parallel.context(mesh):` a Hugging Face model runs on a sequence that is cut over the ranks.

with hal_parallel.context(mesh, layout="zigzag"):
    loss = model(input_ids=ids, labels=ids).loss      # every rank is given the whole batch
    loss.backward()                                   # gradients are to be averaged over the mesh: DDP, FSDP2
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hal_core import ContractError, HalError, UnsupportedError

try:
    from hal_nn.huggingface import IGNORED_ARGUMENTS, NAME
    from hal_nn.placement import calls, device_of
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
except ImportError as error:
    raise HalError(f"a whole model needs hal-nn and transformers ({error}): pip install 'hal-parallel[hf]'") from error

from .api import attention, unshard
from .exchange import Link, exchanged
from .layout import REPLICATED, Piece, TokenLayout, make_layout, shard
from .topology import Topology, topology_of

#: Inputs [batch, tokens, ...], padded by 0.
_TOKENS = ("input_ids", "inputs_embeds", "token_type_ids")
_IGNORED = frozenset({*IGNORED_ARGUMENTS, "shift_labels", "labels"})
#: What a model says to attention, and what it means where it does not.
_ASKED = {"dropout": 0.0, **dict.fromkeys(("scaling", "is_causal", "softcap", "sliding_window"))}
_MISSING = -100  # a label that counts for nothing


class ShardedCache(DynamicCache):
    """Every rank holds its own tokens of the prompt, and every `world`-th of the tokens that follow.

    Args:
        prompt: the prompt's layout. rank: whose part this is.

    Attributes:
        seen: tokens of the whole sequence. coming: those that the call under way adds.
    """

    def __init__(self, prompt: TokenLayout, rank: int) -> None:
        super().__init__()
        self.prompt, self.rank = prompt, rank
        self.seen = self.coming = 0

    @property
    def layout(self) -> TokenLayout:
        """Of the tokens that are held, those of the call under way included."""
        prompt, world, new = self.prompt, self.prompt.world, self.seen + self.coming - self.prompt.length
        pieces = tuple(
            (*held, Piece(prompt.local, prompt.length + rank, -(-(new - rank) // world), world)) if new > rank else held
            for rank, held in enumerate(prompt.pieces)
        )
        return TokenLayout("cache", prompt.length + new, prompt.local + -(-new // world), pieces)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep this rank's part of new keys and values, and give all that it holds."""
        if self.seen == 0:
            return super().update(key_states, value_states, layer_idx)
        layer: Any = self.layers[layer_idx]
        world, slots = self.prompt.world, self.layout.local
        missing = slots - layer.keys.shape[2]
        if missing:
            layer.keys, layer.values = (
                torch.cat((held, held.new_zeros((*held.shape[:2], missing, held.shape[3]))), 2)
                for held in (layer.keys, layer.values)
            )
        for i in range(key_states.shape[2]):
            number = self.seen - self.prompt.length + i
            if number % world == self.rank:
                slot = self.prompt.local + number // world
                layer.keys[:, :, slot], layer.values[:, :, slot] = key_states[:, :, i], value_states[:, :, i]
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the whole sequence."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, *_: Any, **__: Any) -> None:
        raise HalError("a sharded cache was asked to drop tokens (assisted generation does): generate without it")


@dataclass
class _Sequence:
    """The call under way: its layout, or the cache that it goes on with, and what hides keys."""

    layout: TokenLayout
    cache: ShardedCache | None
    keys: Tensor | None  # bool [batch, 1, 1, tokens]
    edges: Tensor | None = None  # int32 [sequences + 1] of packed ones


@dataclass
class _Context:
    topology: Topology
    mesh: Any
    layout: str
    strategy: str
    timeout: float | None
    sequence: _Sequence | None = None

    def call(self, original: Any, model: Any, *args: Any, **options: Any) -> Any:
        """A model's call: the outermost has its inputs cut, and its loss summed."""
        if self.sequence is not None:
            return original(model, *args, **options)
        bound = inspect.signature(type(model).forward).bind(model, *args, **options)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        given |= given.pop(_rest(bound.signature), {})
        held = given.get("past_key_values")
        going_on = isinstance(held, ShardedCache) and held.seen > 0
        try:
            return (self._step if going_on else self._whole)(partial(original, model), given, model)
        finally:
            self.sequence = None

    def _run(self, forward: Any, given: dict[str, Any], cache: ShardedCache | None, count: int) -> Any:
        """The model's own call, whose tokens the cache then holds."""
        if cache is None:
            return forward(**given)
        cache.coming = count
        outputs = forward(**given)
        cache.seen, cache.coming = cache.seen + count, 0
        return outputs

    def _whole(self, forward: Any, given: dict[str, Any], model: Any) -> Any:
        tokens = _tokens(given)
        if tokens is None or getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"a {type(model).__name__} was called inside hal_parallel.context, which cuts input_ids or "
                "inputs_embeds of one sequence: call encoder-decoders outside"
            )
        length, rank = tokens.shape[1], self.topology.rank
        layout = make_layout(self.layout, length, self.topology.world)
        cache = self._cache(model, given, layout)
        self.sequence = _Sequence(layout, cache, _key_mask(given.pop("attention_mask", None), length))
        self._positions(given, tokens, layout)
        given |= {name: shard(given[name], layout, rank, 1) for name in _TOKENS if given.get(name) is not None}
        counted = self._labels(given, layout)
        keep = given.pop("logits_to_keep", None)
        last = next(r for r, pieces in enumerate(layout.pieces) for p in pieces if p.last == length - 1)
        if keep == 1:
            slot = int((layout.indices(rank) == length - 1).nonzero()[0, 0]) if rank == last else 0
            given["logits_to_keep"] = torch.tensor([slot], device=tokens.device)
        elif keep is not None and not (isinstance(keep, int) and keep == 0):
            raise UnsupportedError(f"logits_to_keep {keep!r} was given inside hal_parallel.context: use 0 or 1")
        outputs = self._run(forward, given, cache, length)
        logits = getattr(outputs, "logits", None)
        if keep == 1 and logits is not None:
            outputs.logits = self.topology.all_gather(logits, "the last token's logits")[last]
        elif cache is not None and logits is not None:
            outputs.logits = unshard(logits, self.mesh, layout, 1, length)
        if counted and getattr(outputs, "loss", None) is not None:
            outputs.loss = _sum(outputs.loss, self.topology.links)
        return outputs

    def _step(self, forward: Any, given: dict[str, Any], model: Any) -> Any:
        """New tokens, which every rank computes, over the cache of all ranks."""
        cache = given["past_key_values"]
        tokens = _tokens(given)
        count = tokens.shape[1]
        self.sequence = _Sequence(cache.prompt, cache, _key_mask(given.pop("attention_mask", None), cache.seen + count))
        if given.get("position_ids") is None:
            given["position_ids"] = torch.arange(cache.seen, cache.seen + count, device=tokens.device)[None]
        return self._run(forward, given, cache, count)

    def _cache(self, model: Any, given: dict[str, Any], layout: TokenLayout) -> ShardedCache | None:
        """The cache that this call fills, put in place of the one that the model would make."""
        held, wanted = given.get("past_key_values"), given.get("use_cache")
        if held is not None and held.get_seq_length() > 0:
            raise UnsupportedError(
                f"a {type(held).__name__} of {held.get_seq_length()} tokens was given inside hal_parallel.context: "
                "fill the cache inside the same context"
            )
        wanted = held is not None and getattr(model.config, "use_cache", False) if wanted is None else wanted
        if not wanted or given.get("labels") is not None:
            given |= {"use_cache": False, "past_key_values": None} if _takes(model, "use_cache") else {}
            return None
        cache = ShardedCache(layout, self.topology.rank)
        given |= {"past_key_values": cache, "use_cache": True}
        return cache

    def _positions(self, given: dict[str, Any], tokens: Tensor, layout: TokenLayout) -> None:
        """Positions in the whole sequence; those that start again are packed sequences."""
        assert self.sequence is not None
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(layout.length, device=tokens.device)[None]
        elif positions.dim() != 2:
            raise UnsupportedError(f"position_ids {list(positions.shape)} were given: use [batch, tokens]")
        elif positions.shape[0] == 1 and self.sequence.keys is None:
            starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
            if len(starts):
                edges = [0, *starts.tolist(), layout.length]
                self.sequence.edges = torch.tensor(edges, dtype=torch.int32, device=tokens.device)
        given["position_ids"] = shard(positions, layout, self.topology.rank, 1)

    def _labels(self, given: dict[str, Any], layout: TokenLayout) -> bool:
        """Labels of this rank's tokens, shifted over the whole sequence; whether there are any."""
        labels = given.get("labels")
        if labels is None:
            return False
        if labels.dim() != 2 or labels.shape[1] != layout.length:
            raise UnsupportedError(f"labels {list(labels.shape)} were given: use [batch, {layout.length}]")
        following = given.get("shift_labels")
        if following is None:
            following = nn.functional.pad(labels[:, 1:], (0, 1), value=_MISSING)
        if given.get("num_items_in_batch") is None:
            given["num_items_in_batch"] = (following != _MISSING).sum()
        for name, tensor in (("labels", labels), ("shift_labels", following)):
            given[name] = shard(tensor, layout, self.topology.rank, 1, _MISSING)
        return True

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        """Attention as transformers' models call it, over the tokens of all ranks."""
        now, asked = self.sequence, {name: given.pop(name, default) for name, default in _ASKED.items()}
        unknown = [name for name, value in given.items() if value is not None and name not in _IGNORED]
        if now is None or attention_mask is not None or unknown:
            what = f"the argument {unknown[0]!r}" if unknown else "a mask of its own, or a call outside a model's"
            raise UnsupportedError(
                f"the model passed {what} to attention, which hal_parallel.context does not run: call it outside"
            )
        causal = getattr(module, "is_causal", True) if asked["is_causal"] is None else asked["is_causal"]
        back = None if asked["sliding_window"] is None else asked["sliding_window"] - 1
        options: dict[str, Any] = {
            "causal": "bottom_right" if causal else "none",
            "window": None if back is None else (back, 0 if causal else back),
            "softcap": asked["softcap"],
            "scale": asked["scaling"],
            "enable_gqa": query.shape[1] != key.shape[1],
            "backend": device_of(module),
            "timeout": self.timeout,
        }
        if now.cache is not None and now.cache.seen > 0:  # decoding
            replicated = make_layout(REPLICATED, query.shape[2], self.topology.world)
            options |= {"strategy": "pass_query", "layout": (replicated, now.cache.layout)}
        else:
            options |= {"strategy": self.strategy, "layout": now.layout}
            options |= {"cu_seqlens_q": now.edges, "cu_seqlens_k": now.edges}
        out = attention(query, key, value, self.mesh, now.keys, asked["dropout"], **options)
        calls.count += 1
        return out.transpose(1, 2).contiguous(), None


_active: list[_Context] = []


@contextmanager
def context(
    mesh: Any = None, *, layout: str = "zigzag", strategy: str = "auto", timeout: float | None = None
) -> Iterator[None]:
    """Inside, Hugging Face models that were built with attn_implementation="hal" run on sequences cut over the mesh.

    Every rank calls the model with the whole batch. Inputs, positions and labels are cut by the layout, the loss is
    that of the whole sequence, equal on every rank, and logits are this rank's tokens' (with a cache: all tokens'). The
    gradients of a rank are those of its tokens times the number of ranks: average them over the mesh, as DDP and FSDP2
    do. `generate` has the prompt's cache sharded, and deals out the tokens that follow.

    Args:
        mesh, layout, strategy, timeout: as `hal_parallel.attention`'s; the layout by name. Decoding passes queries.

    Raises:
        ContractError: no process group, a layout that is no name, or a context inside another.
    """
    topology = topology_of(mesh, timeout)
    if topology is None:
        raise ContractError("there is no process group for hal_parallel.context: start with torchrun, or leave it out")
    make_layout(layout, 0, topology.world)
    if layout == REPLICATED or _active:
        raise ContractError("a replicated layout, or a context inside another, was given: use one of contiguous ones")
    now, original = _Context(topology, mesh, layout, strategy, timeout), PreTrainedModel.__call__
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [table[NAME] for table in tables]

    def __call__(self: Any, *args: Any, **options: Any) -> Any:  # noqa: N807 - what it replaces has this name
        return now.call(original, self, *args, **options)

    def no_mask(**_: Any) -> None:
        return None

    tables[0][NAME], tables[1][NAME] = now.attend, no_mask
    setattr(PreTrainedModel, "__call__", __call__)  # noqa: B010 - mypy refuses to assign a method
    _active.append(now)
    try:
        yield
    finally:
        _active.pop()
        setattr(PreTrainedModel, "__call__", original)  # noqa: B010
        for table, function in zip(tables, before, strict=True):
            table[NAME] = function


def _key_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """transformers' mask of padding, [batch, tokens], as one of keys; None where nothing is hidden."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != length:
        raise UnsupportedError(
            f"attention_mask {list(mask.shape)} was given inside hal_parallel.context: use [batch, {length}]"
        )
    seen = mask.bool()
    return None if bool(seen.all()) else seen[:, None, None]


def _tokens(given: dict[str, Any]) -> Any:
    """[batch, tokens, ...]: what the model reads; None where it is neither of the two."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def _takes(model: Any, name: str) -> bool:
    signature = inspect.signature(type(model).forward)
    return name in signature.parameters or _rest(signature) != ""


def _rest(signature: inspect.Signature) -> str:
    """The name of a function's other keyword arguments; "" where it takes none."""
    return next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")


def _sum(value: Tensor, links: list[Link]) -> Tensor:
    """The sum over ranks, with the gradient of every rank's result: with it, averaged gradients are exact."""
    for link in links:
        back = partial(torch.mul, other=link.size)
        value = exchanged(value, partial(_total, link), back)
    return value


def _total(link: Link, value: Tensor) -> Tensor:
    return link.all_gather(value, "the loss").sum(0)

"""A call on local shards, checked and described: what every rank works out by itself before the ranks compare."""

import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, ContractError, MaskKind, UnsupportedError
from hal_core.plugin_api import Policy, merged_policy, registry

from .layout import NAMES, REPLICATED, TokenLayout, make_layout
from .visible import Rule

#: Arguments of `hal.attention` that are refused, and what to do instead.
REFUSED = {
    "block_plan": "pass the pattern as a mask shard",
    "tiling": "leave it out: each device cuts its own part",
    "page_table": "gather the pages",
    "cache_seqlens": "cut the keys, or pass a layout of those that there are",
    "key_scale": "dequantise the cache",
    "value_scale": "dequantise the cache",
}
POLICY = ("backend", "objective", "allow_simulated", "transfer")
#: Arguments of `hal.attention` that every rank's calls are given as they are.
_PLACES = ("is_causal", "causal", "diagonal", "window", "max_seqlen_q", "max_seqlen_k")
#: Of a request: what has to be equal on all ranks as it is.
_SAME = ("dtype", "scale", "softcap", "grad_lse", "deterministic", "max_error")
OPTIONS = (*POLICY, *_PLACES, "softcap", "scale", "enable_gqa", "max_error", "deterministic")


class Given(NamedTuple):
    """What a rank computes with: query and mask rows of its own, keys and values of any rank.

    A mask that was checked is 4-D, [1 or batch, 1 or heads, 1 or rows, 1 or all tokens of the keys]; its columns are in
    the order of tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def widened(given: Given) -> Given:
    """The same with a mask of four dimensions."""
    return given if given.mask is None else given._replace(mask=given.mask[(None,) * (4 - given.mask.dim())])


@dataclass(frozen=True)
class Description:
    """A call's static side.

    Attributes:
        request: of a rank's own dense calls, with the local lengths: log-sum-exp, and the most that a call may ask for.
        policy: over all levels, for the device. queries, keys: layouts. rule: what a token reads.
        dropout: probability. grads: of "q", "k", "v", "mask". mask: its shape and dtype as text.
    """

    request: AttentionRequest
    policy: Policy
    queries: TokenLayout
    keys: TokenLayout
    rule: Rule
    dropout: float
    grads: frozenset[str]
    mask: str

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be equal on all ranks."""
        r = self.request
        same = {name: getattr(r, name) for name in _SAME}
        return same | {
            "query": [r.batch, r.heads_q, self.queries.local, r.dim_qk],
            "key": [r.batch, r.heads_kv, self.keys.local, r.dim_qk],
            "value": [r.batch, r.heads_kv, self.keys.local, r.dim_v],
            "mask": self.mask,
            "layout": f"{self.queries.name} and {self.keys.name}",
            "tokens": f"{self.queries.length} and {self.keys.length}",
            "placement": _mark((self.queries.pieces, self.keys.pieces)),
            "causal": f"{self.rule.causal}, diagonal {self.rule.diagonal}, window {self.rule.window}",
            "sequences": f"{len(self.rule.cu_q) - 1}, {_mark((self.rule.cu_q, self.rule.cu_k))}",
            "dropout": self.dropout,
            "gradients": ", ".join(sorted(self.grads)) or "none",
        }


def _mark(value: Any) -> str:
    """A short text that is equal in every process for equal values."""
    return f"{zlib.crc32(repr(value).encode()):08x}"


_requests: dict[Any, AttentionRequest] = {}
registry.on_change.append(_requests.clear)


def describe(
    given: Given, world: int, dropout_p: float, options: dict[str, Any], places: tuple[Any, Any, Any], return_lse: bool
) -> Description:
    """Check a rank's own arguments.

    Args:
        given: its tensors, the mask with as many dimensions as it came with. options: `hal.attention`'s.
        places: (layout, length, (cu_seqlens_q, cu_seqlens_k)) as they came.

    Raises:
        ContractError, UnsupportedError: as `hal_parallel.attention`.
    """
    (query, key, value, mask), (layout, length, sequences) = given, places
    for name in options:
        if options[name] is not None and name in REFUSED:
            raise UnsupportedError(f"{name} was given, which hal_parallel does not run: {REFUSED[name]}")
        if name not in OPTIONS and name not in REFUSED:
            raise ContractError(f"unknown argument {name!r} was given: use {', '.join(sorted(OPTIONS))}")
    options = {name: given for name, given in options.items() if given is not None}
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            what = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
            raise ContractError(f"{name} of {what} was given: pass this rank's [batch, heads, tokens, head_dim]")
    policy = merged_policy(*(options.get(name) for name in POLICY))
    if policy.tiling is not None:
        raise UnsupportedError(f"hal.use(tiling={policy.tiling.name}) is set, which hal_parallel does not run")
    queries, keys = layouts_of(layout, length, query.shape[2], key.shape[2], world)
    names = zip(("q", "k", "v", "mask"), (query, key, value, mask), strict=True)
    enabled = torch.is_grad_enabled()
    grads = frozenset(name for name, t in names if enabled and isinstance(t, Tensor) and t.requires_grad)
    if queries.name == REPLICATED and grads:
        raise UnsupportedError(
            f"gradients of {', '.join(sorted(grads))} with replicated queries were asked for: call under "
            "torch.no_grad(), or shard the queries"
        )
    checked = _check_mask(mask, query, queries, keys)
    request = _checked(given, dropout_p, options, grads, policy)
    rule = Rule(request.causal, request.diagonal, request.window, *_edges(sequences, queries, keys, query, mask))
    request = local_request(request, dropout_p, mask, bool(grads) and (return_lse or dropout_p > 0))
    return Description(request, policy, queries, keys, rule, float(dropout_p), grads, checked)


def _checked(
    given: Given, dropout: float, options: dict[str, Any], grads: frozenset[str], policy: Policy
) -> AttentionRequest:
    """The core's own check of what is not about ranks, once for calls that are alike."""
    query, key, value, mask = given
    fields = [(tuple(t.shape), t.dtype, t.device, t.stride(3) == 1) for t in (query, key, value)]
    of_mask = None if mask is None else (tuple(mask.shape), mask.dtype, mask.device)
    place: Any = (*fields, of_mask, dropout, tuple(sorted(options.items(), key=str)), grads, policy)
    try:
        found = _requests.get(place)
    except TypeError:  # an argument that cannot be hashed is wrong, and the core says how
        place, found = None, None
    if found is None:
        views = [t.detach() for t in (query, key, value)]
        if key.device != query.device:  # keys in host memory stream to the queries
            views[1:] = [t[:, :, :1].to(query.device) for t in views[1:]]
        part = None if mask is None else mask.detach()[..., :1]
        views = [t.requires_grad_(name in grads) for name, t in zip("qkv", views, strict=True)]
        options = {name: options[name] for name in options if not name.startswith("max_seqlen")}
        request = hal.explain(views[0], views[1], views[2], part, dropout_p=dropout, return_lse=True, **options).request
        found = replace(request, len_k=key.shape[2], grads=grads, grad_lse=False)
        if len(_requests) > 512:
            _requests.clear()
        if place is not None:
            _requests[place] = found
    return found


def local_request(request: AttentionRequest, dropout: float, mask: Tensor | None, grad_lse: bool) -> AttentionRequest:
    """The most that one of a rank's dense calls asks of its device."""
    window = None if request.window is None else (0, None)
    banded = request.causal is not Causal.NONE or window is not None
    kind = MaskKind.BOOLEAN if dropout and mask is None else request.mask
    band: dict[str, Any] = {"causal": Causal.TOP_LEFT if banded else Causal.NONE, "diagonal": int(banded)}
    return replace(request, **band, window=window, dropout=0.0, mask=kind, lse=True, grad_lse=grad_lse)


def layouts_of(layout: Any, length: Any, rows: int, keys: int, world: int) -> tuple[TokenLayout, TokenLayout]:
    """The layouts of queries and keys.

    Raises:
        ContractError: an unknown layout, one for another number of ranks, or shards of another length.
    """
    pair, lengths = (given if isinstance(given, tuple) else (given, given) for given in (layout, length))
    if len(pair) != 2 or len(lengths) != 2:
        raise ContractError(f"layout {layout!r} and length {length!r} were given: pass one, or (of queries, of keys)")
    found = []
    for what, given, tokens, local in zip(("query", "key"), pair, lengths, (rows, keys), strict=True):
        if isinstance(given, TokenLayout):
            made = given
        elif given in (*NAMES, *([REPLICATED] if what == "query" else [])):
            whole = local if given == REPLICATED else local * world
            if tokens is not None and (type(tokens) is not int or not 0 <= tokens <= whole):
                raise ContractError(
                    f"length {tokens!r} and a {what} shard of {local} tokens on each of {world} ranks were given: pass "
                    f"the tokens of the whole sequence, 0 to {whole}"
                )
            made = make_layout(given, whole if tokens is None else tokens, world)
        else:
            raise ContractError(f"layout {given!r} of the {what} was given: use {', '.join(NAMES)} or a TokenLayout")
        if made.world != world:
            raise ContractError(f"a layout for {made.world} ranks was given to {world}: make one for this mesh")
        if made.local != local:
            raise ContractError(
                f"a {what} shard of {local} tokens was given, and {made.name} of {made.length} tokens over {world} "
                f"ranks has {made.local} on each: pad the sequence (hal_parallel.shard does), and pass length="
            )
        found.append(made)
    return found[0], found[1]


def _check_mask(mask: Any, query: Tensor, queries: TokenLayout, keys: TokenLayout) -> str:
    """The mask as text for the comparison of ranks: its own rows, all keys."""
    if mask is None:
        return "none"
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        raise ContractError(f"attn_mask {type(mask).__name__} was given: pass a tensor [..., local rows, all keys]")
    rows, columns = mask.shape[-2:]
    if columns not in (1, keys.length) or rows not in (1, queries.local):
        whole = " (that is the mask of the whole sequence)" if rows == queries.length else ""
        raise ContractError(
            f"attn_mask of {rows} rows and {columns} keys was given{whole}: pass this rank's shard of {queries.local} "
            f"rows in the order of its tokens, and all {keys.length} keys in the order of the sequence "
            "(hal_parallel.shard(mask, ...) cuts the rows)"
        )
    batch, heads = (1, 1, *mask.shape[:-2])[-2:]
    if mask.dim() > 4 or heads not in (1, query.shape[1]) or batch not in (1, query.shape[0]):
        raise ContractError(
            f"attn_mask {list(mask.shape)} was given: use [{query.shape[0]} or 1, {query.shape[1]} or 1, rows, keys]"
        )
    return f"{[batch, heads, rows, columns]} {mask.dtype}"


def _edges(
    sequences: tuple[Any, Any], queries: TokenLayout, keys: TokenLayout, query: Tensor, mask: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cumulative lengths of the packed sequences, over the whole of them; of one where none are packed."""
    if sequences == (None, None):
        return (0, queries.length), (0, keys.length)
    found = []
    for name, given, layout in zip(("cu_seqlens_q", "cu_seqlens_k"), sequences, (queries, keys), strict=True):
        fits = isinstance(given, Tensor) and given.dim() == 1 and given.dtype == torch.int32 and given.numel() > 1
        edges = given.tolist() if fits else [None]
        if not fits or edges[0] != 0 or edges[-1] != layout.length or edges != sorted(edges):
            raise ContractError(
                f"{name} {edges if fits else given!r} was given: pass int32 [sequences + 1] of the whole sequence, the "
                f"same on every rank, from 0 to {layout.length}, never falling"
            )
        found.append(tuple(edges))
    if len(found[0]) != len(found[1]) or query.shape[0] != 1 or mask is not None:
        raise ContractError(
            f"packed lengths of {len(found[0]) - 1} and {len(found[1]) - 1} sequences, batch {query.shape[0]}"
            f"{' and a mask' if mask is not None else ''} were given: use as many of keys as of queries, a batch of 1 "
            "and no mask"
        )
    return found[0], found[1]

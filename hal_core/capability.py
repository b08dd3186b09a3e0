"""What a device claims, as data, and the reasons why a request falls outside it."""

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from .device_info import Record
from .request import AttentionRequest, Causal, MaskKind

#: Why a device refuses. Stable names: programs may branch on them. DEVICE is a reason of the device's own, from its
#: check().
Code = enum.StrEnum(
    "Code",
    "DTYPE CACHE_DTYPE HEAD_DIM VALUE_DIM BATCH HEADS LENGTH GROUPED_HEADS STRIDES MASK CAUSAL DIAGONAL WINDOW SOFTCAP "
    "DROPOUT PACKED PAGED USED_LENGTHS BLOCK_PLAN LSE BACKWARD MASK_GRADIENT LSE_GRADIENT DETERMINISTIC MAX_ERROR "
    "MEMORY PLACEMENT TILING OPTION FIDELITY UNAVAILABLE ACCESS DEVICE",
)
#: The codes that are not called after the request's field.
_CODES = {
    "len_q": "length",
    "len_k": "length",
    "page_size": "paged",
    "used": "used_lengths",
    "mask_grad": "mask_gradient",
    "lse_grad": "lse_gradient",
}


def _code(value: str) -> Code:
    return Code(_CODES.get(value, value))


@attrs.frozen(eq=False, repr=False, slots=False)
class Refusal(Record):
    """One reason why a device does not run a request.

    Attributes:
        code: the kind of reason. field: the request's field. wanted, offered: both sides, as text.
        fix: what the caller can do; "" where nothing is known.
    """

    code: Code = attrs.field(converter=_code)
    field: str
    wanted: str
    offered: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.field}  {self.wanted} asked, {self.offered} offered"
        return f"{text}  -> {self.fix}" if self.fix else text


@attrs.frozen(eq=False, repr=False, slots=False)
class Range(Record):
    """Whole numbers from `low` to `high` (None: no bound) in steps of `multiple`."""

    low: int = 0
    high: int | None = None
    multiple: int = 1

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and value == self.next_up(value)

    def next_up(self, value: int) -> int | None:
        """The smallest member that is at least `value`; None where there is none."""
        up = -(-max(value, self.low) // self.multiple) * self.multiple
        return up if self.high is None or up <= self.high else None

    def __str__(self) -> str:
        text = f"{self.low} to {self.high}" if self.high is not None else f"{self.low} and up"
        return f"{text} in steps of {self.multiple}" if self.multiple > 1 else text


def _names(values: Iterable[str]) -> frozenset[str]:
    return frozenset(values)


def _mask_kinds(values: Iterable[MaskKind | str]) -> frozenset[MaskKind]:
    return frozenset(map(MaskKind, values))


def _causal_kinds(values: Iterable[Causal | str]) -> frozenset[Causal]:
    return frozenset(map(Causal, values))


class Choice(frozenset[int]):
    """The listed whole numbers."""

    def next_up(self, value: int) -> int | None:
        """As `Range.next_up`."""
        return min((member for member in self if member >= value), default=None)

    def __str__(self) -> str:
        return _either(list(map(str, sorted(self))))


_NO_SIZES = Choice()


@attrs.frozen(eq=False, repr=False, slots=False)
class Numerics(Record):
    """Error bounds a device holds on standard normal inputs, each ||x - reference|| / ||reference|| in float64.

    Attributes:
        relative: of the output. lse: of the log-sum-exp. gradient: of each gradient.
        noisy: errors are random (an analogue device); the conformance kit then tests them statistically over draws.
    """

    relative: float
    lse: float = 1e-5
    gradient: float | None = None
    noisy: bool = False


#: Features a device may claim. A name that is not here is refused when the capabilities are built.
FEATURES = frozenset(
    {
        "grouped_heads",
        "value_dim",
        "strides",
        "diagonal",
        "window",
        "softcap",
        "dropout",
        "packed",
        "paged",
        "used_lengths",
        "fp8_cache",
        "block_plan",
        "lse",
        "backward",
        "mask_grad",
        "lse_grad",
        "deterministic",
    }
)


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class Capabilities(Record):
    """What a device runs. Anything not listed is refused: an empty set means nothing, not everything.

    Attributes:
        dtypes: dtype names. numerics: error bounds for each of them.
        head_dim: sizes of query and key; dim_v must be equal unless "value_dim" is claimed, then it is held to
            head_dim.
        masks, causal: kinds taken. features: names out of `FEATURES`.
        batch, heads, length: bounds; length holds for queries and keys. A zero length is empty input.
        page_sizes: page sizes of a paged cache. cache_dtypes: dtypes of a scaled cache.
        block_sizes: block sizes of a block plan, for queries and keys.
        tile_sizes: block sizes of a tiling that the caller brings, for queries and keys; 0 among them: row and key
            ranges of any size. Empty: the device's own tiling alone.
        options: what `hal.use(device, options={name: value})` may set, by name: a `Range` or a tuple of values.
    """

    dtypes: frozenset[str] = attrs.field(converter=_names)
    numerics: Mapping[str, Numerics]
    head_dim: Range | Choice
    masks: frozenset[MaskKind] = attrs.field(converter=_mask_kinds, default=frozenset({MaskKind.NONE}))
    causal: frozenset[Causal] = attrs.field(converter=_causal_kinds, default=frozenset({Causal.NONE}))
    features: frozenset[str] = attrs.field(converter=_names, default=frozenset())
    batch: Range = Range(1)
    heads: Range = Range(1)
    length: Range = Range(1)
    page_sizes: Range | Choice = _NO_SIZES
    cache_dtypes: frozenset[str] = attrs.field(converter=_names, default=frozenset())
    block_sizes: Range | Choice = _NO_SIZES
    tile_sizes: Range | Choice = _NO_SIZES
    options: Mapping[str, Range | tuple[Any, ...]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if unknown := self.features - FEATURES:
            raise ValueError(f"unknown features {sorted(unknown)}: use {listing(FEATURES)}")
        if missing := self.dtypes - set(self.numerics):
            raise ValueError(f"no numerics declared for {sorted(missing)}: every dtype needs its error bound")

    def refusals(self, request: AttentionRequest) -> list[Refusal]:
        """Every reason why a request falls outside; empty when it is inside."""
        r, sizes = request, self.head_dim
        has, lacks = self.features.__contains__, (FEATURES - self.features).__contains__
        bound = self.numerics[r.dtype].relative if r.dtype in self.numerics else 0.0
        accurate = [d for d in self.dtypes if r.max_error is not None and self.numerics[d].relative <= r.max_error]
        by_mask = "pass a boolean mask" if MaskKind.BOOLEAN in self.masks else ""
        blocks, cut = (r.block_plan or ())[:2], r.tiling or ()
        rows: tuple[tuple[bool, str, str, str, str], ...] = (  # (refused, field, wanted, offered, fix)
            (r.dtype not in self.dtypes, "dtype", r.dtype, listing(self.dtypes), _cast(r.dtype, self.dtypes)),
            (r.dim_qk not in sizes, "head_dim", str(r.dim_qk), str(sizes), _pad(sizes, r.dim_qk)),
            (
                r.dim_v != r.dim_qk and lacks("value_dim"),
                "value_dim",
                str(r.dim_v),
                str(r.dim_qk),
                f"pad to {max(r.dim_v, r.dim_qk)}",
            ),
            (r.dim_v != r.dim_qk and r.dim_v not in sizes, "value_dim", str(r.dim_v), str(sizes), _pad(sizes, r.dim_v)),
            (r.batch not in self.batch, "batch", str(r.batch), str(self.batch), "split the batch"),
            (
                r.heads_q not in self.heads,
                "heads",
                str(r.heads_q),
                str(self.heads),
                "split the heads" if r.heads_q else "",
            ),
            (r.len_q not in self.length, "len_q", str(r.len_q), str(self.length), _pad(self.length, r.len_q)),
            (r.len_k not in self.length, "len_k", str(r.len_k), str(self.length), _pad(self.length, r.len_k)),
            (
                r.heads_q != r.heads_kv and lacks("grouped_heads"),
                "grouped_heads",
                f"{r.heads_q}/{r.heads_kv}",
                "equal head counts",
                "repeat the key and value heads",
            ),
            (
                not r.last_dim_contiguous and lacks("strides"),
                "strides",
                "a strided last dimension",
                "stride 1",
                "call contiguous()",
            ),
            (r.mask not in self.masks, "mask", r.mask, listing(self.masks), _mask_fix(r.mask, self.masks)),
            (r.causal not in self.causal, "causal", r.causal, listing(self.causal), by_mask),
            (r.diagonal != 0 and lacks("diagonal"), "diagonal", str(r.diagonal), "0", by_mask),
            (r.window is not None and lacks("window"), "window", str(r.window), "no window", by_mask),
            (r.softcap is not None and lacks("softcap"), "softcap", str(r.softcap), "no softcap", ""),
            (r.dropout > 0 and lacks("dropout"), "dropout", str(r.dropout), "no dropout", "call eval()"),
            (r.packed and lacks("packed"), "packed", "packed lengths", "padded batches", "pad, with a mask"),
            (
                r.page_size is not None and (lacks("paged") or r.page_size not in self.page_sizes),
                "page_size",
                str(r.page_size),
                f"pages of {self.page_sizes}" if has("paged") else "no pages",
                "gather the pages",
            ),
            (r.used and lacks("used_lengths"), "used", "used lengths", "all keys", "cut the keys, or use pages"),
            (
                r.cache_dtype is not None and (lacks("fp8_cache") or r.cache_dtype not in self.cache_dtypes),
                "cache_dtype",
                str(r.cache_dtype),
                listing({*self.cache_dtypes, r.dtype}),
                f"convert the cache to {r.dtype}",
            ),
            (
                bool(blocks) and (lacks("block_plan") or any(size not in self.block_sizes for size in blocks)),
                "block_plan",
                str(blocks),
                f"blocks of {self.block_sizes}" if has("block_plan") else "dense",
                "expand the plan to a mask",
            ),
            (
                any(size not in self.tile_sizes for size in cut[1:]),
                "tiling",
                " ".join(map(str, cut)),
                f"tiles of {self.tile_sizes}" if self.tile_sizes != _NO_SIZES else "its own tiling alone",
                "leave tiling= out",
            ),
            (r.lse and lacks("lse"), "lse", "log-sum-exp", "the output alone", ""),
            (
                bool(r.grads) and lacks("backward"),
                "backward",
                f"gradients of {', '.join(sorted(r.grads))}",
                "forward alone",
                "call under torch.no_grad()",
            ),
            (
                "mask" in r.grads and lacks("mask_grad"),
                "mask_grad",
                "its gradient",
                "a constant mask",
                "detach the mask",
            ),
            (
                r.grad_lse and lacks("lse_grad"),
                "lse_grad",
                "gradients through the log-sum-exp",
                "none",
                "ask for the log-sum-exp under torch.no_grad()",
            ),
            (
                r.deterministic and lacks("deterministic"),
                "deterministic",
                "fixed order of sums",
                "an order that varies",
                "",
            ),
            (
                r.max_error is not None and bound > r.max_error,
                "max_error",
                str(r.max_error),
                f"{bound:g} in {r.dtype}",
                _cast("", accurate),
            ),
            *(
                (True, "option", f"{name}={value!r}", *self._offered(name))
                for name, value in r.options
                if value not in self.options.get(name, ())
            ),
        )
        return [Refusal(*row[1:2], *row[1:]) for row in rows if row[0]]

    def _offered(self, name: str) -> tuple[str, str]:
        values = self.options.get(name)
        offered = str(values) if isinstance(values, Range) else ", ".join(map(repr, values or ()))
        return (f"{name} of {offered}", "") if values else (f"options {listing(self.options)}", "leave it out")


def listing(words: Iterable[str]) -> str:
    """ "a, b or c", sorted; "none" for nothing."""
    return _either(sorted(words))


def _either(words: list[str]) -> str:
    *most, last = words or ["none"]
    return f"{', '.join(most)} or {last}" if most else last


def _pad(sizes: Range | Choice, value: int) -> str:
    up = sizes.next_up(value)
    return f"pad to {up}" if up is not None else ""


def _cast(dtype: str, offered: Iterable[str]) -> str:
    order = ("float32", "float16", "float64") if dtype == "bfloat16" else ("float32", "bfloat16", "float16", "float64")
    return next((f"cast to {name}" for name in order if name in offered), "")


def _mask_fix(mask: MaskKind, offered: frozenset[MaskKind]) -> str:
    if mask is MaskKind.BOOLEAN and MaskKind.ADDITIVE in offered:
        return "convert it to 0 and -inf"
    return "pass True/False where the mask is 0 or -inf" if MaskKind.BOOLEAN in offered else ""

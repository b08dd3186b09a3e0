"""What a device claims, as data, and the reasons why a request falls outside it."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

import attrs

from .request import AttentionRequest, Causal, MaskKind


class Code(enum.StrEnum):
    """Why a device refuses. Stable names: programs may branch on them."""

    DTYPE = "dtype"
    CACHE_DTYPE = "cache_dtype"
    HEAD_DIM = "head_dim"
    VALUE_DIM = "value_dim"
    BATCH = "batch"
    HEADS = "heads"
    LENGTH = "length"
    GROUPED_HEADS = "grouped_heads"
    STRIDES = "strides"
    MASK = "mask"
    CAUSAL = "causal"
    DIAGONAL = "diagonal"
    WINDOW = "window"
    SOFTCAP = "softcap"
    DROPOUT = "dropout"
    PACKED = "packed"
    PAGED = "paged"
    BLOCK_PLAN = "block_plan"
    LSE = "lse"
    BACKWARD = "backward"
    MASK_GRADIENT = "mask_gradient"
    LSE_GRADIENT = "lse_gradient"
    DETERMINISTIC = "deterministic"
    MAX_ERROR = "max_error"
    MEMORY = "memory"
    PLACEMENT = "placement"
    FIDELITY = "fidelity"
    UNAVAILABLE = "unavailable"
    DEVICE = "device"  # a reason of the device's own, from its check()


@attrs.frozen
class Refusal:
    """One reason why a device does not run a request.

    Attributes:
        code: the kind of reason. field: the request's field. wanted, offered: both sides, as text.
        fix: what the caller can do; "" where nothing is known.
    """

    code: Code = attrs.field(converter=Code)
    field: str
    wanted: str
    offered: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.field}  {self.wanted} asked, {self.offered} offered"
        return f"{text}  -> {self.fix}" if self.fix else text


@attrs.frozen
class Range:
    """Whole numbers from `low` to `high` (None: no bound) in steps of `multiple`."""

    low: int = 0
    high: int | None = None
    multiple: int = 1

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int) or value < self.low or value % self.multiple:
            return False
        return self.high is None or value <= self.high

    def next_up(self, value: int) -> int | None:
        """The smallest member that is at least `value`; None where there is none."""
        up = -(-max(value, self.low) // self.multiple) * self.multiple
        return up if self.high is None or up <= self.high else None

    def __str__(self) -> str:
        text = f"{self.low} to {self.high}" if self.high is not None else f"{self.low} and up"
        return f"{text} in steps of {self.multiple}" if self.multiple > 1 else text


@attrs.frozen
class Choice:
    """The listed whole numbers."""

    values: frozenset[int] = attrs.field(converter=frozenset)

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def next_up(self, value: int) -> int | None:
        return min((v for v in self.values if v >= value), default=None)

    def __str__(self) -> str:
        return listing([str(v) for v in sorted(self.values)])


@attrs.frozen
class Numerics:
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
FEATURES = frozenset({
    "grouped_heads", "value_dim", "strides", "diagonal", "window", "softcap", "dropout", "packed", "paged", "fp8_cache",
    "block_plan", "lse", "backward", "mask_grad", "lse_grad", "deterministic",
})  # fmt: skip


@attrs.frozen(kw_only=True)
class Capabilities:
    """What a device runs. Anything not listed is refused: an empty set means nothing, not everything.

    Attributes:
        dtypes: dtype names. numerics: error bounds for each of them.
        head_dim: sizes of query and key; dim_v must be equal unless "value_dim" is claimed, then it is held to head_dim.
        masks, causal: kinds taken. features: names out of `FEATURES`.
        batch, heads, length: bounds; length holds for queries and keys. A zero length is empty input.
        page_sizes: page sizes of a paged cache. cache_dtypes: dtypes of a scaled cache.
        block_sizes: block sizes of a block plan, for queries and keys.
    """

    dtypes: frozenset[str] = attrs.field(converter=frozenset)
    numerics: Mapping[str, Numerics] = attrs.field()
    head_dim: Range | Choice
    masks: frozenset[MaskKind] = attrs.field(converter=frozenset, default=frozenset({MaskKind.NONE}))
    causal: frozenset[Causal] = attrs.field(converter=frozenset, default=frozenset({Causal.NONE}))
    features: frozenset[str] = attrs.field(converter=frozenset, default=frozenset())
    batch: Range = Range(1)
    heads: Range = Range(1)
    length: Range = Range(1)
    page_sizes: Range | Choice = Choice(())
    cache_dtypes: frozenset[str] = attrs.field(converter=frozenset, default=frozenset())
    block_sizes: Range | Choice = Choice(())

    @features.validator
    def _known(self, _: object, value: frozenset[str]) -> None:
        if unknown := value - FEATURES:
            raise ValueError(f"unknown features {sorted(unknown)}: use {listing(sorted(FEATURES))}")

    @numerics.validator
    def _complete(self, _: object, value: Mapping[str, Numerics]) -> None:
        if missing := self.dtypes - set(value):
            raise ValueError(f"no numerics declared for {sorted(missing)}: every dtype needs its error bound")

    def refusals(self, request: AttentionRequest) -> list[Refusal]:
        """Every reason why `request` falls outside; empty when it is inside."""
        return [*self._sizes(request), *self._kinds(request), *self._features(request), *self._accuracy(request)]

    def _sizes(self, r: AttentionRequest) -> Iterator[Refusal]:
        if r.dtype not in self.dtypes:
            offered = sorted(self.dtypes)
            yield Refusal(Code.DTYPE, "dtype", r.dtype, listing(offered), _cast(r.dtype, offered))
        if r.dim_qk not in self.head_dim:
            yield Refusal(Code.HEAD_DIM, "head_dim", str(r.dim_qk), str(self.head_dim), _pad(self.head_dim, r.dim_qk))
        if r.dim_v != r.dim_qk:
            if "value_dim" not in self.features:
                fix = f"pad to {max(r.dim_v, r.dim_qk)}"
                yield Refusal(Code.VALUE_DIM, "value_dim", str(r.dim_v), f"the head_dim ({r.dim_qk})", fix)
            elif r.dim_v not in self.head_dim:
                yield Refusal(
                    Code.VALUE_DIM, "value_dim", str(r.dim_v), str(self.head_dim), _pad(self.head_dim, r.dim_v)
                )
        if r.batch not in self.batch:
            yield Refusal(Code.BATCH, "batch", str(r.batch), str(self.batch), "split the batch")
        if r.heads_q not in self.heads:
            yield Refusal(Code.HEADS, "heads", str(r.heads_q), str(self.heads), "split the heads")
        for name, value in (("len_q", r.len_q), ("len_k", r.len_k)):
            if value not in self.length:
                yield Refusal(Code.LENGTH, name, str(value), str(self.length), _pad(self.length, value))

    def _kinds(self, r: AttentionRequest) -> Iterator[Refusal]:
        if r.mask not in self.masks:
            yield Refusal(Code.MASK, "mask", r.mask, listing(sorted(self.masks)), _mask_fix(r.mask, self.masks))
        if r.causal not in self.causal:
            fix = "pass a boolean mask" if MaskKind.BOOLEAN in self.masks else ""
            yield Refusal(Code.CAUSAL, "causal", r.causal, listing(sorted(self.causal)), fix)
        if r.page_size is not None and ("paged" not in self.features or r.page_size not in self.page_sizes):
            offered = f"pages of {self.page_sizes}" if "paged" in self.features else "contiguous key and value"
            yield Refusal(Code.PAGED, "page_size", str(r.page_size), offered, "gather the pages")
        if r.cache_dtype is not None and ("fp8_cache" not in self.features or r.cache_dtype not in self.cache_dtypes):
            offered = listing(sorted(self.cache_dtypes)) or f"the query's dtype ({r.dtype})"
            yield Refusal(Code.CACHE_DTYPE, "cache_dtype", r.cache_dtype, offered, f"convert the cache to {r.dtype}")
        if r.block_plan is not None:
            sizes = r.block_plan[:2]
            if "block_plan" not in self.features or any(size not in self.block_sizes for size in sizes):
                offered = f"blocks of {self.block_sizes}" if "block_plan" in self.features else "dense"
                yield Refusal(
                    Code.BLOCK_PLAN, "block_plan", f"{sizes[0]} x {sizes[1]}", offered, "expand the plan to a mask"
                )

    def _features(self, r: AttentionRequest) -> Iterator[Refusal]:
        asked = (
            (r.heads_q != r.heads_kv, "grouped_heads", Code.GROUPED_HEADS, f"{r.heads_q}/{r.heads_kv}",
             "equal head counts", "repeat the key and value heads"),
            (not r.last_dim_contiguous, "strides", Code.STRIDES, "a strided last dimension", "stride 1", "call contiguous()"),
            (r.diagonal != 0, "diagonal", Code.DIAGONAL, str(r.diagonal), "0", "pass a boolean mask"),
            (r.window is not None, "window", Code.WINDOW, str(r.window), "no window", "pass a boolean mask"),
            (r.softcap is not None, "softcap", Code.SOFTCAP, str(r.softcap), "no softcap", ""),
            (r.dropout > 0, "dropout", Code.DROPOUT, str(r.dropout), "no dropout", "call eval()"),
            (r.packed, "packed", Code.PACKED, "packed lengths", "padded batches", "pad, with a boolean mask"),
            (r.lse, "lse", Code.LSE, "log-sum-exp", "the output alone", ""),
            (bool(r.grads), "backward", Code.BACKWARD, "gradients of " + ", ".join(sorted(r.grads)), "forward alone",
             "call under torch.no_grad()"),
            ("mask" in r.grads, "mask_grad", Code.MASK_GRADIENT, "the mask's gradient", "a constant mask", "detach the mask"),
            (r.grad_lse, "lse_grad", Code.LSE_GRADIENT, "gradients through the log-sum-exp", "none", "detach the lse"),
            (r.deterministic, "deterministic", Code.DETERMINISTIC, "deterministic", "order of sums not fixed", ""),
        )  # fmt: skip
        for wanted, feature, code, given, offered, fix in asked:
            if wanted and feature not in self.features:
                yield Refusal(code, feature, given, offered, fix)

    def _accuracy(self, r: AttentionRequest) -> Iterator[Refusal]:
        if r.max_error is not None and r.dtype in self.numerics and self.numerics[r.dtype].relative > r.max_error:
            offered = f"{self.numerics[r.dtype].relative:g} in {r.dtype}"
            better = [d for d in self.dtypes if self.numerics[d].relative <= r.max_error]
            yield Refusal(Code.MAX_ERROR, "max_error", f"{r.max_error:g}", offered, _cast("", sorted(better)))


def listing(words: list[str]) -> str:
    """ "a, b or c"; "none" for an empty list."""
    if not words:
        return "none"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _pad(sizes: Range | Choice, value: int) -> str:
    up = sizes.next_up(value)
    return f"pad to {up}" if up is not None else ""


def _cast(dtype: str, offered: list[str]) -> str:
    order = ["float32", "bfloat16", "float16", "float64"] if dtype != "bfloat16" else ["float32", "float16", "float64"]
    return next((f"cast to {name}" for name in order if name in offered), "")


def _mask_fix(mask: MaskKind, offered: frozenset[MaskKind]) -> str:
    if mask is MaskKind.BOOLEAN and MaskKind.ADDITIVE in offered:
        return "convert it to 0 and -inf"
    return "pass True/False where the mask is 0 or -inf" if MaskKind.BOOLEAN in offered else ""

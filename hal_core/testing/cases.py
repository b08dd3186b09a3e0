"""Cases made from a device's declared capabilities: what it must run, and what it must refuse."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from ..capabilities import Capabilities, Choice, Code, Range
from ..device import Device
from ..request import AttentionRequest, Causal, MaskKind, SequenceTables
from ..tiling import BlockPlan

QKV = frozenset({"q", "k", "v"})
DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Every case stays at or below this length and head size, whatever a device claims beyond.
LONGEST, WIDEST = 600, 512
LAYOUTS = ("contiguous", "heads last", "sliced", "expanded", "strided", "column")
#: Features and the subject whose cases exercise them; "deterministic" has a check of its own.
SUBJECT_OF = {
    "grouped_heads": "grouped_heads", "value_dim": "value_dim", "strides": "strides", "diagonal": "causal", "window": "window",
    "softcap": "softcap", "dropout": "dropout", "packed": "packed", "paged": "paged", "fp8_cache": "fp8_cache",
    "block_plan": "block_plan", "lse": "log_sum_exp", "backward": "gradients", "mask_grad": "mask_gradient",
    "lse_grad": "lse_gradient",
}  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of a case. `grad_out` and `grad_lse` are what flows back."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    plan: BlockPlan | None
    tables: SequenceTables | None
    grad_out: Tensor
    grad_lse: Tensor


@attrs.frozen(kw_only=True)
class Case:
    """One attention call to try.

    Attributes:
        subject: the check it belongs to. claim: what running it shows, for example "mask boolean"; "" for nothing alone.
        request: the call. layout: how its tensors lie in memory, one of `LAYOUTS`.
        mask_shape: "full" [batch, heads, len_q, len_k], "keys" [batch, 1, 1, len_k] or "shared" [1, 1, len_q, len_k].
        sequences: (len_q, len_k) of each sequence of a packed or paged call.
    """

    subject: str
    claim: str
    request: AttentionRequest
    layout: str = "contiguous"
    mask_shape: str = "full"
    sequences: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        r = self.request
        parts = [r.describe(), *[f"scale {r.effective_scale:g}"] * (r.scale is not None), *[f"diagonal {r.diagonal}"] * (r.diagonal != 0)]
        parts += [f"{self.layout} tensors"] * (self.layout != "contiguous")
        parts += [f"mask for {self.mask_shape}"] * (self.mask_shape != "full")
        return ", ".join(parts + [f"sequences {self.sequences}"] * bool(self.sequences))

    def seed(self, seed: int) -> int:
        """A seed of this case's own, the same wherever the case stands in a run."""
        return int.from_bytes(hashlib.sha256(f"{seed} {self.request.to_dict()} {self}".encode()).digest()[:6])

    def draw(self, seed: int) -> Inputs:
        """Fresh tensors: standard normal, masks with about a third hidden and some rows without any key."""
        return _Drawing(self, torch.Generator().manual_seed(self.seed(seed))).inputs()

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """Keyword arguments of `hal_core.attention`, beside query, key and value."""
        r, tables = self.request, inputs.tables or SequenceTables()
        options: dict[str, Any] = {
            "attn_mask": inputs.mask, "scale": r.scale, "causal": r.causal, "diagonal": r.diagonal, "window": r.window,
            "softcap": r.softcap, "dropout_p": r.dropout, "enable_gqa": r.heads_q != r.heads_kv, "block_plan": inputs.plan,
            "return_lse": r.lse, "deterministic": r.deterministic, "max_error": r.max_error,
        }  # fmt: skip
        if r.packed:
            options |= {"max_seqlen_q": r.len_q, "max_seqlen_k": None if r.page_size else r.len_k}
        return options | {name: value for name, value in tables._asdict().items() if value is not None}


class _Drawing:
    """Makes a case's tensors. Numbers are drawn on the host, so that every device sees the same."""

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        self.case, self.r, self.generator = case, case.request, generator
        self.dtype = getattr(torch, self.r.dtype)

    def inputs(self) -> Inputs:
        r, layout, sequences = self.r, self.case.layout, self.case.sequences
        batch = 1 if r.packed else r.batch
        len_q = sum(q for q, _ in sequences) if r.packed else r.len_q
        len_k = sum(k for _, k in sequences) if r.packed else r.len_k
        query = self.laid_out(batch, r.heads_q, len_q, r.dim_qk, layout)
        tables = SequenceTables()
        if r.packed:
            tables = tables._replace(cu_seqlens_q=self.totals([q for q, _ in sequences]))
        if r.page_size is not None:
            key, value, table = self.pages([k for _, k in sequences], r.page_size)
            held = torch.tensor([k for _, k in sequences], dtype=torch.int32, device=r.device)
            tables = tables._replace(page_table=table, cache_seqlens=held)
        else:
            key = self.laid_out(batch, r.heads_kv, len_k, r.dim_qk, layout)
            value = self.laid_out(batch, r.heads_kv, len_k, r.dim_v, layout)
            if r.packed:
                tables = tables._replace(cu_seqlens_k=self.totals([k for _, k in sequences]))
        if r.cache_dtype is not None:
            key, value = (t.to(getattr(torch, r.cache_dtype)) for t in (key, value))
            scales = [(torch.rand(r.batch, r.heads_kv, 1, 1, generator=self.generator) + 0.5).to(r.device) for _ in range(2)]
            tables = tables._replace(key_scale=scales[0], value_scale=scales[1])
        grad_out = self.laid_out(batch, r.heads_q, len_q, r.dim_v, layout if layout != "sliced" else "contiguous")
        lse_dtype = torch.float64 if r.dtype == "float64" else torch.float32
        grad_lse = self.normal(batch, r.heads_q, len_q).to(lse_dtype)
        used = tables if any(t is not None for t in tables) else None
        return Inputs(query, key, value, self.mask(), self.plan(), used, grad_out, grad_lse)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64 if self.r.dtype == "float64" else torch.float32)
        return drawn.to(self.dtype).to(self.r.device)

    def laid_out(self, batch: int, heads: int, length: int, dim: int, layout: str) -> Tensor:
        """[batch, heads, length, dim] that lies in memory as `layout` says."""
        if layout == "heads last":  # as a projection's output is split into heads
            return self.normal(batch, length, heads, dim).transpose(1, 2)
        if layout == "sliced":  # a part of a larger tensor, from an odd offset
            return self.normal(batch, heads, length + 3, dim + 5)[:, :, 2 : length + 2, 3 : dim + 3]
        if layout == "expanded":  # stride 0 over batch and heads
            return self.normal(1, 1, length, dim).expand(batch, heads, length, dim)
        if layout == "strided":
            return self.normal(batch, heads, length, 2 * dim)[..., ::2]
        if layout == "column":
            return self.normal(batch, heads, dim, length).transpose(2, 3)
        return self.normal(batch, heads, length, dim)

    def totals(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.r.device)

    def pages(self, lengths: list[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shuffled pages with two of them unused, and what lies past a sequence's end far from its values."""
        r = self.r
        needed = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(needed) + 2, generator=self.generator).to(torch.int32)
        table = torch.zeros(len(lengths), r.len_k // size, dtype=torch.int32)
        key, value = (torch.full((len(order), r.heads_kv, size, dim), 100.0, dtype=self.dtype) for dim in (r.dim_qk, r.dim_v))
        for s, length in enumerate(lengths):
            start = sum(needed[:s])
            table[s, : needed[s]] = order[start : start + needed[s]]
            for place in range(length):
                page = int(table[s, place // size])
                key[page, :, place % size] = self.normal(r.heads_kv, r.dim_qk).cpu()
                value[page, :, place % size] = self.normal(r.heads_kv, r.dim_v).cpu()
        return key.to(r.device), value.to(r.device), table.to(r.device)

    def mask(self) -> Tensor | None:
        r = self.r
        if r.mask is MaskKind.NONE:
            return None
        shape = {
            "full": (r.batch, r.heads_q, r.len_q, r.len_k), "keys": (r.batch, 1, 1, r.len_k), "shared": (1, 1, r.len_q, r.len_k),
        }[self.case.mask_shape]  # fmt: skip
        visible = torch.rand(shape, generator=self.generator) > 0.35
        if self.case.mask_shape != "keys":
            visible[..., 3::5, :] = False  # rows without any key
        if r.mask is MaskKind.BOOLEAN:
            return visible.to(r.device)
        return self.normal(*shape).masked_fill(~visible.to(r.device), -torch.inf)

    def plan(self) -> BlockPlan | None:
        if self.r.block_plan is None:
            return None
        block_q, block_k, most = self.r.block_plan
        lead = (1, 1) if self.case.mask_shape == "shared" else (self.r.batch, self.r.heads_q)
        rows, columns = -(-self.r.len_q // block_q), -(-self.r.len_k // block_k)
        # Entries past the count are ignored, so they may be anything: here beyond the last block.
        indices = torch.full((*lead, rows, most), columns + 7, dtype=torch.int32)
        counts = torch.randint(0, min(most, columns) + 1, (*lead, rows), generator=self.generator, dtype=torch.int32)
        for place in product(*map(range, counts.shape)):
            listed = torch.randperm(columns, generator=self.generator)[: counts[place]]
            indices[place][: len(listed)] = listed.to(torch.int32)
        return BlockPlan(block_q, block_k, indices.to(self.r.device), counts.to(self.r.device))


def nearest(sizes: Range | Choice, wanted: int) -> int:
    """The smallest member from `wanted` up, else the largest there is."""
    up = sizes.next_up(wanted)
    if up is not None:
        return up
    if isinstance(sizes, Choice):
        return max(sizes.values)
    assert sizes.high is not None
    return sizes.high // sizes.multiple * sizes.multiple


def _members(sizes: Range | Choice, wanted: Sequence[int], most: int) -> list[int]:
    """Both ends, and the members from each wanted size up, none of them 0 or above `most`."""
    low = min(sizes.values, default=0) if isinstance(sizes, Choice) else sizes.low
    ends = [max(low, 1), nearest(sizes, most) if sizes.next_up(1) else 0]
    found = {size for wish in (*ends, *wanted) if (size := sizes.next_up(wish)) is not None}
    return sorted(size for size in found if 0 < size <= most) or sorted(found)[:1]


class Corners:
    """The corners of a device's claims, as changes to one plain request."""

    def __init__(self, capabilities: Capabilities, device: Device, *, quick: bool = False, seed: int = 0) -> None:
        self.capabilities, self.quick, self.random = capabilities, quick, random.Random(seed)
        c = capabilities
        self.dtypes = [name for name in DTYPES if name in c.dtypes] or sorted(c.dtypes)
        self.dims = _members(c.head_dim, (24, 33, 64, 80, 128), WIDEST)
        dim = next((d for d in self.dims if d >= 32), self.dims[-1])
        self.base = AttentionRequest(
            batch=nearest(c.batch, 2), heads_q=nearest(c.heads, 2), heads_kv=nearest(c.heads, 2), len_q=nearest(c.length, 37),
            len_k=nearest(c.length, 53), dim_qk=dim, dim_v=dim, dtype=self.dtypes[0],
            device=str(torch.empty(0, device=device.reads[0]).device),
        )  # fmt: skip

    def fits(self, request: AttentionRequest) -> bool:
        return not self.capabilities.refusals(request)

    def case(self, subject: str, claim: str, changes: dict[str, Any]) -> Case:
        """The plain request with changes; "layout", "mask_shape" and "sequences" are the case's, the rest the request's."""
        own = {name: changes[name] for name in ("layout", "mask_shape", "sequences") if name in changes}
        fields = {name: value for name, value in changes.items() if name not in own}
        sequences = own.get("sequences", ())
        if sequences:
            size = fields.get("page_size") or 1
            fields |= {"batch": len(sequences), "len_q": max(q for q, _ in sequences)}
            fields["len_k"] = -(-max(k for _, k in sequences) // size) * size
        request = replace(self.base, **fields)
        if own.get("layout") in ("strided", "column"):
            longest = max(request.len_q, request.len_k) if own["layout"] == "column" else 2
            request = replace(request, last_dim_contiguous=longest < 2 or max(request.dim_qk, request.dim_v) < 2)
        return Case(subject=subject, claim=claim, request=request, **own)

    def claimed(self) -> list[Case]:
        proposed = [self.case(subject, claim, changes) for subject, claim, changes in self._subjects()]
        kept: dict[str, Case] = {}
        for case in [*proposed, *self._combinations()]:
            if self.fits(case.request):
                kept.setdefault(f"{case.subject} {case}", case)
        return list(kept.values())

    def _kinds(self) -> list[dict[str, Any]]:
        """Mask and causal kinds together: none, each, and pairs."""
        masks: list[dict[str, Any]] = [{}, {"mask": MaskKind.BOOLEAN}, {"mask": MaskKind.ADDITIVE}]
        causals: list[dict[str, Any]] = [{}, {"causal": Causal.TOP_LEFT}, {"causal": Causal.BOTTOM_RIGHT}]
        return [m | c for m, c in product(masks, causals) if not (m and c and self.quick)]

    def _subjects(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(subject, claim, changes): each subject changes one thing, so that a failure names it."""
        kinds, dim = self._kinds(), self.base.dim_qk
        others = [{"len_q": self.base.len_k, "len_k": self.base.len_q}, {}]
        for dtype, size in product(self.dtypes, self.dims):
            yield "dtypes", f"dtype {dtype}", {"dtype": dtype, "dim_qk": size, "dim_v": size}
        for len_q, len_k in self.lengths():
            yield "lengths", "", {"len_q": len_q, "len_k": len_k}
        for layout in LAYOUTS:
            yield "strides", "strides" if layout in ("strided", "column") else "", {"layout": layout}
        for factor in (0.5, 1.5):
            yield "scale", "scale", {"scale": factor * dim**-0.5}
        for kind, shape in product((MaskKind.BOOLEAN, MaskKind.ADDITIVE), ("full", "keys", "shared")):
            yield "masks", f"mask {kind}", {"mask": kind, "mask_shape": shape}
        for kind, lengths, diagonal in product((Causal.TOP_LEFT, Causal.BOTTOM_RIGHT), others, (0, 4, -6)):
            yield "causal", "diagonal" if diagonal else f"causal {kind}", {"causal": kind, "diagonal": diagonal, **lengths}
        for window, causal in product(((7, 0), (0, 0), (None, 3), (5, None), (6, 9), (1000, 1000)), Causal):
            yield "window", "window", {"window": window, "causal": causal}
        yield "window", "window", {"window": (4, 6), "diagonal": 5}
        for softcap in (1.5, 20.0):
            for kind in kinds[:2]:
                yield "softcap", "softcap", {"softcap": softcap, **kind}
        for (heads_q, heads_kv), kind in product(self.grouped(), kinds[:2]):
            yield "grouped_heads", "grouped_heads", {"heads_q": heads_q, "heads_kv": heads_kv, **kind}
        for size in [d for d in self.dims if d != dim]:
            yield "value_dim", "value_dim", {"dim_v": size}
        yield from self._results(kinds)
        yield from self._sequences()
        for p in (0.1, 0.5):  # the weights that were kept are read off an identity matrix as value
            length = nearest(self.capabilities.length, min(53, dim))
            yield "dropout", "dropout", {"dropout": p, "len_k": length}
            yield "dropout", "", {"dropout": p, "len_k": length, "grads": QKV}
        sizes = self.capabilities.block_sizes
        for block, shape in product(_members(sizes, (16,), 128) if sizes != Choice(()) else (), ("full", "shared")):
            most = -(-self.base.len_k // block)
            yield "block_plan", "block_plan", {"block_plan": (block, block, most), "mask_shape": shape}
            yield "block_plan", "", {"block_plan": (block, block, most), "mask_shape": shape, "causal": Causal.TOP_LEFT}

    def _results(self, kinds: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Log-sum-exp and gradients."""
        grouped = [{"heads_q": q, "heads_kv": kv} for q, kv in self.grouped()[:1]]
        for kind, dtype in product([*kinds, {"softcap": 2.0}, *grouped], self.dtypes):
            changes = {"dtype": dtype, **kind}
            yield "log_sum_exp", "lse", {"lse": True, **changes}
            yield "gradients", "backward", {"grads": QKV, **changes}
            yield "lse_gradient", "lse_grad", {"grads": QKV, "lse": True, "grad_lse": True, **changes}
        for grads in ({"q"}, {"v"}, {"k", "v"}):
            yield "gradients", "backward", {"grads": frozenset(grads)}
        for layout in LAYOUTS[1:]:
            yield "gradients", "", {"grads": QKV, "layout": layout}
        for shape, grads in product(("full", "keys", "shared"), (QKV | {"mask"}, frozenset({"mask"}))):
            yield "mask_gradient", "mask_grad", {"grads": grads, "mask": MaskKind.ADDITIVE, "mask_shape": shape}

    def _sequences(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Packed lengths, paged caches, and scaled caches."""
        c = self.capabilities
        packed = tuple((nearest(c.length, q), nearest(c.length, k)) for q, k in ((5, 7), (1, 13), (17, 17), (9, 4)))
        queries = tuple((nearest(c.length, 1), k) for k in (7, 33, 16))
        chunks = tuple((nearest(c.length, 3), k) for k in (5, 20))
        causals: list[dict[str, Any]] = [{}, {"causal": Causal.TOP_LEFT}, {"causal": Causal.BOTTOM_RIGHT}]
        grouped = [{"heads_q": q, "heads_kv": kv} for q, kv in self.grouped()[:1]]
        for kind in (*causals, {"window": (3, 2)}, *grouped, {"grads": QKV}, {"lse": True}, {"grads": QKV, **causals[2]}):
            yield "packed", "" if kind else "packed", {"packed": True, "sequences": packed, **kind}
        pages = _members(c.page_sizes, (16,), 64) if c.page_sizes != Choice(()) else []
        for size, kind in product(pages, (*causals, {"window": (3, 2), **causals[2]}, *grouped, {"lse": True})):
            for sequences in (queries, chunks):
                yield "paged", "paged", {"page_size": size, "sequences": sequences, **kind}
        for dtype, kind in product(sorted(c.cache_dtypes), ({}, *grouped)):
            yield "fp8_cache", "fp8_cache", {"cache_dtype": dtype, **kind}
            for size in pages[:1]:
                yield "fp8_cache", "", {"cache_dtype": dtype, "page_size": size, "sequences": queries, **kind}

    def lengths(self) -> list[tuple[int, int]]:
        """Ragged pairs, both ends of the claim where they are short enough, and empty ones where they are claimed."""
        length, found = self.capabilities.length, []
        wanted = [(1, 1), (1, 67), (67, 1), (64, 64), (129, 127), (33, 257), (LONGEST, 65)]
        wanted += [(length.low, length.low)] + ([(length.high, length.high)] if (length.high or LONGEST + 1) <= LONGEST else [])
        if 0 in length:
            wanted += [(0, 5), (5, 0), (0, 0)]
        for len_q, len_k in wanted:
            found.append((nearest(length, len_q), nearest(length, len_k)))
        return list(dict.fromkeys(found))

    def grouped(self) -> list[tuple[int, int]]:
        heads = self.capabilities.heads
        return [(q, kv) for q, kv in ((4, 2), (4, 1), (6, 2), (8, 4), (2, 1)) if q in heads and kv in heads][:3]

    def _combinations(self) -> list[Case]:
        """Every two claims together in some case (in quick mode every claim in one)."""
        axes: list[list[dict[str, Any]]] = [
            [{"dtype": d} for d in self.dtypes],
            [{"dim_qk": d, "dim_v": d} for d in self.dims] + [{"dim_qk": self.dims[0], "dim_v": self.dims[-1]}],
            [{"len_q": q, "len_k": k} for q, k in self.lengths()],
            [{}] + [{"mask": k, "mask_shape": s} for k in list(MaskKind)[1:] for s in ("full", "keys", "shared")],
            [{"causal": kind} for kind in Causal],
            [{}, {"window": (9, 0)}, {"window": (4, 7)}],
            [{}, {"softcap": 3.0}], [{}, {"scale": 0.2}], [{}, {"diagonal": 5}],
            [{}] + [{"heads_q": q, "heads_kv": kv} for q, kv in self.grouped()],
            [{"layout": layout} for layout in LAYOUTS],
            [{}, {"lse": True}, {"grads": QKV}, {"grads": QKV | {"mask"}}, {"grads": QKV, "lse": True, "grad_lse": True}],
            [{"batch": nearest(self.capabilities.batch, b)} for b in (1, 3)],
        ]  # fmt: skip

        def whole(choice: Sequence[dict[str, Any]]) -> Case:
            changes: dict[str, Any] = {}
            for part in choice:
                changes |= part
            return self.case("combinations", "", changes)

        def alone(value: dict[str, Any]) -> bool:
            needs = {"mask": MaskKind.ADDITIVE} if "mask" in value.get("grads", ()) else {}
            needs |= {"causal": next((c for c in Causal if c in self.capabilities.causal and c), "none")} if "diagonal" in value else {}
            return self.fits(self.case("", "", value | needs).request)

        def valid(choice: Sequence[dict[str, Any]]) -> bool:
            r = whole(choice).request
            if "mask" in r.grads and r.mask is not MaskKind.ADDITIVE:
                return False
            if r.diagonal and r.causal is Causal.NONE and r.window is None:
                return False
            return self.fits(r)

        kept = [values for axis in axes if len(values := [v for v in axis if alone(v)]) > 0]
        return [whole(choice) for choice in cover(kept, valid, 1 if self.quick else 2, self.random)]


def cover(
    axes: Sequence[Sequence[Any]], valid: Callable[[Sequence[Any]], bool], strength: int, chance: random.Random
) -> list[list[Any]]:
    """Choices of one value per axis, in which every `strength` values of different axes meet, where that is valid."""
    left = {
        tuple(zip(places, values, strict=True))
        for places in combinations(range(len(axes)), strength)
        for values in product(*(range(len(axes[p])) for p in places))
    }
    found = []
    while left:
        wanted = min(left)
        best: tuple[int, list[int]] | None = None
        for _ in range(12):  # the greedy step of covering arrays: the best of some random completions
            choice = [chance.randrange(len(axis)) for axis in axes]
            for place, value in wanted:
                choice[place] = value
            if valid([axis[i] for axis, i in zip(axes, choice, strict=True)]):
                gain = sum(all(choice[p] == v for p, v in each) for each in left)
                best = max(best or (0, choice), (gain, choice))
        left.discard(wanted)
        if best is not None:
            found.append([axis[i] for axis, i in zip(axes, best[1], strict=True)])
            left = {each for each in left if not all(best[1][p] == v for p, v in each)}
    return found


def claimed_cases(capabilities: Capabilities, device: Device, *, quick: bool = False, seed: int = 0) -> list[Case]:
    """Cases inside the capabilities. Each subject changes one thing; "combinations" lets every two claims meet.

    Args:
        device: its `reads` says where the tensors are made. quick: fewer cases. seed: chooses the combinations.
    """
    return Corners(capabilities, device, quick=quick, seed=seed).claimed()


def unclaimed_cases(capabilities: Capabilities, device: Device) -> list[tuple[Case, Code]]:
    """Cases just outside the capabilities, each in one respect, and the code that their refusal must have."""
    corners = Corners(capabilities, device, quick=True)
    found = []
    for code, changes in _outside(corners):
        case = corners.case("refusals", str(code), changes)
        found.append((case, code))
    return found


def _outside(corners: Corners) -> Iterator[tuple[Code, dict[str, Any]]]:
    """Every claim that the device leaves out, as a change to its plain request."""
    c, base = corners.capabilities, corners.base
    causal = next((kind for kind in Causal if kind in c.causal and kind is not Causal.NONE), Causal.NONE)
    heads = next(iter(corners.grouped()), (2 * base.heads_q, base.heads_q))
    absent = {
        "grouped_heads": (Code.GROUPED_HEADS, {"heads_q": heads[0], "heads_kv": heads[1]}),
        "strides": (Code.STRIDES, {"layout": "strided"}),
        "diagonal": (Code.DIAGONAL, {"diagonal": 2, "causal": causal}),
        "window": (Code.WINDOW, {"window": (8, 0)}), "softcap": (Code.SOFTCAP, {"softcap": 10.0}),
        "dropout": (Code.DROPOUT, {"dropout": 0.1}),
        "packed": (Code.PACKED, {"packed": True, "sequences": ((base.len_q, base.len_k), (base.len_q, base.len_q))}),
        "lse": (Code.LSE, {"lse": True}), "backward": (Code.BACKWARD, {"grads": QKV}),
        "mask_grad": (Code.MASK_GRADIENT, {"grads": frozenset({"mask"}), "mask": MaskKind.ADDITIVE}),
        "lse_grad": (Code.LSE_GRADIENT, {"grads": QKV, "lse": True, "grad_lse": True}),
        "deterministic": (Code.DETERMINISTIC, {"deterministic": True}),
    }  # fmt: skip
    yield from (corner for feature, corner in absent.items() if feature not in c.features)
    yield from ((Code.DTYPE, {"dtype": name}) for name in DTYPES if name not in c.dtypes)
    yield from ((Code.MASK, {"mask": kind}) for kind in MaskKind if kind not in c.masks)
    yield from ((Code.CAUSAL, {"causal": kind}) for kind in Causal if kind not in c.causal)
    for size in _beyond(c.head_dim, (8, 24, 33, 80, 257)):
        yield Code.HEAD_DIM, {"dim_qk": size, "dim_v": size}
        yield Code.VALUE_DIM, {"dim_v": size}
    if "value_dim" not in c.features:
        yield Code.VALUE_DIM, {"dim_v": 2 * base.dim_v}
    for size in _beyond(c.length, (0, 1, 37)):
        yield Code.LENGTH, {"len_q": size}
        yield Code.LENGTH, {"len_k": size}
    yield from ((Code.BATCH, {"batch": size}) for size in _beyond(c.batch, (3,)))
    yield from ((Code.HEADS, {"heads_q": size, "heads_kv": size}) for size in _beyond(c.heads, (3,)))
    rows = ((1, 20), (1, 9))
    sizes = (3, 16) if "paged" not in c.features else _beyond(c.page_sizes, (3, 16, 48))
    yield from ((Code.PAGED, {"page_size": size, "sequences": rows}) for size in sizes)
    for dtype in sorted({"float8_e4m3fn", "float8_e5m2"} - (c.cache_dtypes if "fp8_cache" in c.features else set())):
        yield Code.CACHE_DTYPE, {"cache_dtype": dtype}
    blocks = (16, 64) if "block_plan" not in c.features else _beyond(c.block_sizes, (3, 16, 48))
    yield from ((Code.BLOCK_PLAN, {"block_plan": (size, size, 1)}) for size in blocks)
    yield Code.MAX_ERROR, {"max_error": c.numerics[base.dtype].relative / 2}


def _beyond(sizes: Range | Choice, wanted: Sequence[int]) -> list[int]:
    """Sizes that are not members: the first above the end where it is near, and those of `wanted`."""
    ends = [sizes.high + sizes.multiple] if isinstance(sizes, Range) and sizes.high is not None else []
    ends += [max(sizes.values) + 1] if isinstance(sizes, Choice) and sizes.values else []
    return [size for size in (*wanted, *ends) if size not in sizes and size <= 4096]

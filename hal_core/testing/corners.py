"""The corners of a device's claims: the cases that it must run, and those that it must refuse.

LONGEST, WIDEST: the longest length and the widest head of most cases, whatever a device claims beyond. LONG: pairs of
lengths with one long side, because some mistakes begin beyond 1,024 keys.
SUBJECT_OF: the subjects of features that are not named after them. "diagonal" belongs to causal and window, and
"deterministic" has a check of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from .. import AttentionRequest, Capabilities, Causal, Choice, Code, Device, MaskKind, Range
from ..toolkit.caches import LARGEST_CODE
from .cases import DTYPES, LAYOUTS, MASK_SHAPES, QKV, Case

LONGEST, WIDEST = 600, 512
LONG = ((5, 1111), (2, 4111), (1111, 5))
SUBJECT_OF = {"lse": "log_sum_exp", "backward": "gradients", "mask_grad": "mask_gradient", "lse_grad": "lse_gradient"}


def nearest(sizes: Range | Choice, wanted: int) -> int:
    """The smallest member from `wanted` up, else the largest there is."""
    if (up := sizes.next_up(wanted)) is not None:
        return up
    return max(sizes) if isinstance(sizes, Choice) else (sizes.high or 0) // sizes.multiple * sizes.multiple


def members(sizes: Range | Choice, wanted: Sequence[int], most: int) -> list[int]:
    """Both ends, and the members from each wanted size up, none of them 0 or above `most`; none for no sizes at all."""
    if sizes == Choice(()):
        return []
    found = {nearest(sizes, most), *(up for size in (1, *wanted) if (up := sizes.next_up(size)) is not None)}
    return sorted(size for size in found if 0 < size <= most) or [min(found)]


def _each(field: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    return [{field: value} for value in values]


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {field: value for part in parts for field, value in part.items()}


class Corners:
    """The corners of a device's claims, as changes to one plain request."""

    def __init__(self, capabilities: Capabilities, device: Device, *, quick: bool = False, seed: int = 0) -> None:
        self.capabilities, self.quick, self.random, c = capabilities, quick, random.Random(seed), capabilities
        self.dtypes = [name for name in DTYPES if name in c.dtypes] or sorted(c.dtypes)
        self.dims = members(c.head_dim, (24, 33, 64, 80, 128), WIDEST)
        dim, heads = next((d for d in self.dims if d >= 32), self.dims[-1]), nearest(c.heads, 2)
        self.base = AttentionRequest(
            batch=nearest(c.batch, 2),
            heads_q=heads,
            heads_kv=heads,
            len_q=nearest(c.length, 37),
            len_k=nearest(c.length, 53),
            dim_qk=dim,
            dim_v=dim,
            dtype=self.dtypes[0],
            device=str(torch.empty(0, device=device.reads[0]).device),
            mask=next(kind for kind in MaskKind if kind in c.masks),
            causal=next(kind for kind in Causal if kind in c.causal),
        )
        pairs = ((4, 2), (4, 1), (6, 2), (8, 4), (2, 1))
        self.grouped = [{"heads_q": q, "heads_kv": kv} for q, kv in pairs if q in c.heads and kv in c.heads][:3]

    def fits(self, request: AttentionRequest) -> bool:
        return not self.capabilities.refusals(request)

    def case(self, subject: str, changes: dict[str, Any]) -> Case:
        """The plain request with changes; "layout", "mask_shape" and "sequences" are the case's, the rest the
        request's.
        """
        own = {name: changes[name] for name in ("layout", "mask_shape", "sequences") if name in changes}
        fields = {name: value for name, value in changes.items() if name not in own}
        if "sequences" in own:
            (longest_q, longest_k), size = map(max, zip(*own["sequences"], strict=True)), fields.get("page_size") or 1
            fields |= {"batch": len(own["sequences"]), "len_q": longest_q, "len_k": -(-longest_k // size) * size}
        request = replace(self.base, **fields)
        if request.mask is not MaskKind.NONE:
            shape = own.get("mask_shape", "full")
            batch, heads = 1 if shape == "shared" else request.batch, request.heads_q if shape == "full" else 1
            request = replace(request, mask_batch=batch, mask_heads=heads)
        if own.get("layout") == "strided":
            request = replace(request, last_dim_contiguous=max(request.dim_qk, request.dim_v) < 2)
        return Case(subject=subject, request=request, **own)

    def claimed(self) -> list[Case]:
        cases = [
            self.case(subject, _merged(parts)) for subject, axes in self._subjects().items() for parts in product(*axes)
        ]
        kept = {f"{case.subject} {case}": case for case in cases if self.fits(case.request)}
        return [*kept.values(), *self._combinations()]

    def _subjects(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Axes of changes by subject. Each subject changes one thing, so that a failure names it."""
        c, base = self.capabilities, self.base
        dtypes, masks, shapes = (
            _each("dtype", self.dtypes),
            _each("mask", list(MaskKind)[1:]),
            _each("mask_shape", MASK_SHAPES),
        )
        causals, some_grouped = _each("causal", Causal), self.grouped[:1]
        kinds = [{}, *masks, *causals[1:], *([] if self.quick else [masks[0] | causals[1], masks[1] | causals[2]])]
        rich = [*kinds, {"softcap": 2.0}, *some_grouped]
        grads, page_sizes = _each("grads", [QKV]), members(c.page_sizes, (16,), 64)
        packed = tuple((nearest(c.length, q), nearest(c.length, k)) for q, k in ((5, 7), (1, 13), (17, 17), (9, 4)))
        decode = tuple((nearest(c.length, 1), k) for k in (7, 33, 16))
        blocks = [(size, size, -(-base.len_k // size)) for size in members(c.block_sizes, (16,), 128)]
        windows: list[Any] = [(7, 0), (0, 0), (None, 3), (5, None), (6, 9), (1000, 1000)]
        parts = [*_each("layout", LAYOUTS[1:]), *_each("grads", map(frozenset, ("q", "v", "kv")))]
        swapped: dict[str, Any] = {"len_q": base.len_k, "len_k": base.len_q}
        return {
            "dtypes": [dtypes, [{"dim_qk": size, "dim_v": size} for size in self.dims]],
            "lengths": [self.lengths() + self.long_lengths()],
            "strides": [_each("layout", LAYOUTS)],
            "scale": [_each("scale", (factor * base.dim_qk**-0.5 for factor in (0.5, 1.5)))],
            "masks": [masks, shapes],
            "causal": [causals[1:], [{}, swapped], _each("diagonal", (0, 4, -6))],
            "window": [_each("window", windows), causals, _each("diagonal", (0, 5))],
            "softcap": [_each("softcap", (1.5, 20.0)), kinds[:2]],
            "grouped_heads": [self.grouped, kinds[:2]],
            "value_dim": [_each("dim_v", [size for size in self.dims if size != base.dim_qk])],
            "log_sum_exp": [[{"lse": True}], rich, dtypes],
            "gradients": [grads, [*rich, *parts], dtypes],
            "mask_gradient": [masks[1:], shapes, _each("grads", (QKV | {"mask"}, frozenset({"mask"})))],
            "lse_gradient": [[{"grads": QKV, "lse": True, "grad_lse": True}], rich, dtypes],
            "dropout": [_each("dropout", (0.1, 0.5)), [{}, *grads]],
            "packed": [
                [{"packed": True, "sequences": packed}],
                [*causals, *some_grouped, {"window": (3, 2)}],
                [{}, {"lse": True}, *grads],
            ],
            "paged": [
                _each("page_size", page_sizes),
                _each("sequences", (decode, ((3, 5), (3, 20)))),
                [*causals, causals[2] | {"window": (3, 2)}, *some_grouped, {"lse": True}],
            ],
            "used_lengths": [
                _each("used", (True,)),
                _each("sequences", (decode, ((3, 5), (3, 20)))),
                [*causals, causals[2] | {"window": (3, 2)}, *some_grouped],
            ],
            "fp8_cache": [
                [self.cached(name) for name in sorted(c.cache_dtypes)],
                [{}, *some_grouped],
                [{}, *({"page_size": size, "sequences": decode} for size in page_sizes[:1])],
            ],
            "block_plan": [_each("block_plan", blocks), shapes[::2], causals[:2]],
        }

    def cached(self, name: str) -> dict[str, Any]:
        """The change to a cache dtype; two int4 share a byte, so its head size is even."""
        dim = self.base.dim_qk
        if name == "int4" and dim % 2:
            dim = next((size for size in self.dims if not size % 2), 2 * dim)
        return {"cache_dtype": name, "dim_qk": dim, "dim_v": dim}

    def lengths(self) -> list[dict[str, Any]]:
        """Ragged pairs, both ends of the claim where they are short enough, and empty ones where they are claimed."""
        length = self.capabilities.length
        ends = [(end, end) for end in (length.low, length.high) if end is not None and end <= LONGEST]
        wanted = [(1, 1), (1, 67), (67, 1), (64, 64), (129, 127), (33, 257), (LONGEST, 65), *ends]
        wanted += [(0, 5), (5, 0)] * (0 in length)
        pairs = dict.fromkeys((nearest(length, len_q), nearest(length, len_k)) for len_q, len_k in wanted)
        return [{"len_q": len_q, "len_k": len_k} for len_q, len_k in pairs]

    def long_lengths(self) -> list[dict[str, Any]]:
        """Lengths of `LONG` that are claimed."""
        length = self.capabilities.length
        pairs = dict.fromkeys((nearest(length, len_q), nearest(length, len_k)) for len_q, len_k in LONG)
        return [{"len_q": len_q, "len_k": len_k} for len_q, len_k in pairs if max(len_q, len_k) <= 8192]

    def _combinations(self) -> list[Case]:
        """Nearly every pair of claims in some case; in quick mode every claim in some case."""
        least, most = self.dims[0], self.dims[-1]
        windows: list[Any] = [None, (9, 0), (4, 7)]
        axes: list[list[dict[str, Any]]] = [
            _each("dtype", self.dtypes),
            self.lengths(),
            [
                {"dim_qk": a, "dim_v": b}
                for a, b in [*zip(self.dims, self.dims, strict=True), (least, most), (most, least)]
            ],
            [{}, *map(_merged, product(_each("mask", list(MaskKind)[1:]), _each("mask_shape", MASK_SHAPES)))],
            _each("causal", Causal),
            _each("window", windows),
            _each("softcap", (None, 3.0)),
            _each("scale", (None, 0.2)),
            _each("diagonal", (0, 5)),
            [{}, *self.grouped],
            _each("layout", LAYOUTS),
            [
                {},
                {"lse": True},
                {"grads": QKV},
                {"grads": QKV | {"mask"}},
                {"grads": QKV, "lse": True, "grad_lse": True},
            ],
            _each("batch", {nearest(self.capabilities.batch, batch) for batch in (1, 3)}),
        ]

        def made(choice: Sequence[dict[str, Any]]) -> Case | None:
            """The case; None where the device refuses it, or where its values make no sense together."""
            case = self.case("combinations", _merged(choice))
            r = case.request
            aimless = r.diagonal != 0 and r.causal is Causal.NONE and r.window is None
            return (
                case
                if self.fits(r) and not aimless and ("mask" not in r.grads or r.mask is MaskKind.ADDITIVE)
                else None
            )

        kept = [[value for value in axis if self.fits(self.case("", value).request)] for axis in axes]
        return cover([axis for axis in kept if axis], made, 1 if self.quick else 2, self.random)


def cover(
    axes: Sequence[Sequence[Any]], made: Callable[[Sequence[Any]], Case | None], strength: int, chance: random.Random
) -> list[Case]:
    """Cases with one value per axis, drawn until nearly every allowed combination of `strength` values is in one."""
    found, met = [], set[Any]()
    for enough in (64, 32, 16, 8, 4, 2, 1):  # greedy: draws that add many new combinations first
        for _ in range(400):
            choice = [(place, chance.randrange(len(axis))) for place, axis in enumerate(axes)]
            new = set(combinations(choice, strength)) - met
            if len(new) >= enough and (case := made([axes[place][value] for place, value in choice])) is not None:
                found.append(case)
                met |= new
    return found


def claimed_cases(capabilities: Capabilities, device: Device, *, quick: bool = False, seed: int = 0) -> list[Case]:
    """Cases inside the capabilities. Each subject changes one thing; "combinations" combines every two claims.

    Args:
        device: its `reads` says where the tensors are made. quick: fewer cases. seed: chooses the combinations.
    """
    return Corners(capabilities, device, quick=quick, seed=seed).claimed()


def unclaimed_cases(capabilities: Capabilities, device: Device) -> list[tuple[Case, Code]]:
    """Cases just outside the capabilities, each in one respect, and the code that their refusal must have."""
    corners = Corners(capabilities, device)
    return [(corners.case("refusals", changes), code) for code, changes in _outside(corners)]


def _outside(corners: Corners) -> Iterator[tuple[Code, dict[str, Any]]]:
    """Every claim that the device leaves out, as a change to its plain request."""
    c, base, sizes = corners.capabilities, corners.base, (3, 8, 16, 24, 33, 48, 80, 257)
    pages = c.page_sizes if "paged" in c.features else Choice(())
    blocks = c.block_sizes if "block_plan" in c.features else Choice(())
    caches = {*LARGEST_CODE} - (c.cache_dtypes if "fp8_cache" in c.features else set())
    absent: dict[str, dict[str, Any]] = {
        "grouped_heads": {"heads_q": 2 * base.heads_q, "heads_kv": base.heads_q} | _merged(corners.grouped[:1]),
        "strides": {"layout": "strided"},
        "diagonal": {"diagonal": 2},
        "value_dim": {"dim_v": 2 * base.dim_v},
        "window": {"window": (8, 0)},
        "softcap": {"softcap": 10.0},
        "dropout": {"dropout": 0.1},
        "lse": {"lse": True},
        "packed": {"packed": True, "sequences": ((base.len_q, base.len_k), (base.len_q, base.len_q))},
        "used_lengths": {"used": True, "sequences": ((base.len_q, base.len_k), (base.len_q, base.len_q))},
        "backward": {"grads": QKV},
        "mask_grad": {"grads": frozenset({"mask"}), "mask": MaskKind.ADDITIVE},
        "lse_grad": {"grads": QKV, "lse": True, "grad_lse": True},
        "deterministic": {"deterministic": True},
    }
    for feature in set(absent) - c.features:
        yield Code(feature.replace("_grad", "_gradient")), absent[feature]
    for code, field, values in (
        (Code.DTYPE, "dtype", set(DTYPES) - c.dtypes),
        (Code.MASK, "mask", set(MaskKind) - c.masks),
        (Code.CAUSAL, "causal", set(Causal) - c.causal),
        (Code.VALUE_DIM, "dim_v", _beyond(c.head_dim, sizes)),
        (Code.BATCH, "batch", _beyond(c.batch, (3,))),
        (Code.LENGTH, "len_q", _beyond(c.length, (0, 1, 37))),
        (Code.LENGTH, "len_k", _beyond(c.length, (0, 1, 37))),
        (Code.MAX_ERROR, "max_error", [c.numerics[base.dtype].relative / 2]),
        (Code.BLOCK_PLAN, "block_plan", [(size, size, 1) for size in _beyond(blocks, (3, 16, 48))]),
    ):
        yield from ((code, {field: value}) for value in sorted(values))
    yield from ((Code.CACHE_DTYPE, corners.cached(name)) for name in sorted(caches))
    yield from ((Code.HEAD_DIM, {"dim_qk": size, "dim_v": size}) for size in _beyond(c.head_dim, sizes))
    yield from ((Code.HEADS, {"heads_q": size, "heads_kv": size}) for size in _beyond(c.heads, (3,)))
    yield from (
        (Code.PAGED, {"page_size": size, "sequences": ((1, 20), (1, 9))}) for size in _beyond(pages, (3, 16, 48))
    )


def _beyond(sizes: Range | Choice, wanted: Sequence[int]) -> list[int]:
    """Sizes that are not members: the first above the end where it is near, and those of `wanted`."""
    end = max(sizes, default=0) if isinstance(sizes, Choice) else sizes.high or 0
    step = 1 if isinstance(sizes, Choice) else sizes.multiple
    return [size for size in sorted({*wanted, end + step}) if size not in sizes and size <= 4096]

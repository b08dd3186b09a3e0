"""Faulty devices beside the public ones of hal_core.testing.faulty_backends: memory, tilings, noise, sessions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from honest_devices import EXPLICIT, NOISY, ExplicitSession, NoisySession
from torch import Tensor

import hal_core as hal
from hal_core.capability import Code
from hal_core.testing.dense_backend import CLAIMS, DenseBackend, DenseSession, TiledSession
from hal_core.testing.faulty_backends import Fault, fault


class Twice(hal.TilePlan):
    def tiles(self) -> Iterator[hal.Tile]:
        yield from super().tiles()
        yield from itertools.islice(super().tiles(), 1)


class WithoutTheFirst(hal.TilePlan):
    def tiles(self) -> Iterator[hal.Tile]:
        yield from itertools.islice(super().tiles(), 1, None)


class CalledFull(hal.TilePlan):
    def tiles(self) -> Iterator[hal.Tile]:
        return (tile._replace(full=True) for tile in super().tiles())


class FaultyTiling(hal.DenseTiling):
    """The dense tiling, whose plans are changed."""

    def __init__(self, change: Callable[[hal.TilePlan], Any], cut_by: str = "torch") -> None:
        super().__init__(cut_by=cut_by)
        self._change = change

    def plan(self, *args: Any, **options: Any) -> Any:
        return self._change(super().plan(*args, **options))

    def choices(self, request: Any, limits: Any) -> list[hal.DenseTiling]:
        return []


class NamedAlike(hal.DenseTiling):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, cut_by="torch")
        self.name = "alike"

    def choices(self, request: Any, limits: Any) -> list[hal.DenseTiling]:
        return [NamedAlike(32), NamedAlike(64)]


class ChangesItsMind(hal.DenseTiling):
    def plan(self, *args: Any, **options: Any) -> hal.TilePlan:
        self.cut_by = self.cut_by + "x"
        return super().plan(*args, **options)


def stored(plan: hal.TilePlan) -> hal.TilePlan:
    return plan._replace(block_q=0, block_k=0, ranges=tuple(plan.rows()))


def with_tiling(tiling: Callable[[], Any]) -> Callable[[], DenseSession]:
    def make() -> DenseSession:
        session = DenseSession()
        session.tiling = tiling()
        return session

    return make


def with_faulty(change: Callable[[hal.TilePlan], Any], cut_by: str = "torch") -> Callable[[], DenseSession]:
    return with_tiling(lambda: FaultyTiling(change, cut_by))


class ReadsTooFewKeys(TiledSession):
    """Leaves the last block of keys of a foreign tiling out."""

    def compute_attention(self, prepared: Any, *rest: Any, **options: Any) -> Any:
        *given, plan = prepared
        if plan is not None and plan.ranges is None:
            rows = ((a, b, spans[:-1] or spans) for a, b, spans in plan.rows())
            plan = plan._replace(block_q=0, block_k=0, ranges=tuple(rows))
        return super().compute_attention((*given, plan), *rest, **options)


class BindsWithoutThePlan(TiledSession):
    """Follows a plan where it is prepared, and ignores it on the fast path."""

    def bind(self, request: hal.AttentionRequest) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            exact = dataclasses.replace(request, len_q=query.shape[2], len_k=key.shape[2])
            out, lse = self.attend(query, key, value, mask, exact, rng)
            return hal.AttentionOutput(out, lse) if request.lse else out

        return run


class RefusesTilesOtherwise(hal.Capabilities):
    def refusals(self, request: hal.AttentionRequest) -> list[hal.Refusal]:
        found = super().refusals(request)
        return [attrs.evolve(r, field="size") if r.code is Code.TILING else r for r in found]


class GivesLess(hal.PooledMemory):
    def allocate(self, shape: Any, dtype: str) -> Any:
        buffer = super().allocate(shape, dtype)
        if len(shape) == 4:
            buffer._tensor = buffer._tensor[..., :-1]
        return buffer


class FreesTwice(hal.PooledMemory):
    def free(self, buffer: Any) -> None:
        if not buffer.freed:
            super().free(buffer)


class NeverReuses(hal.PooledMemory):
    def free(self, buffer: Any) -> None:
        kept, before = buffer.tensor, dict(self._free)
        super().free(buffer)
        self._free = {size: blocks for size, blocks in before.items() if not blocks}
        self._kept = kept


class KeepsThePeak(hal.PooledMemory):
    def trim(self) -> int:
        peak, freed = self._peak, super().trim()
        self._peak = peak
        return freed


class HastyMemory(hal.PooledMemory):
    """Hands a freed block out again at once, whoever still reads it."""

    _last: Tensor | None = None

    def free(self, buffer: Any) -> None:
        self._last = buffer.tensor
        super().free(buffer)

    def allocate(self, shape: Any, dtype: str) -> Any:
        buffer = super().allocate(shape, dtype)
        if self._last is not None and self._last.shape == buffer.shape:
            buffer._tensor = self._last
        return buffer


class SecretCopies(hal.PooledMemory):
    def to_backend(self, tensor: Tensor) -> Any:
        return super().to_backend(tensor.clone())


class LosesCount(hal.PooledMemory):
    def free(self, buffer: Any) -> None:
        buffer.release()


class FailsOpen(hal.Capabilities):
    def refusals(self, request: hal.AttentionRequest) -> list[hal.Refusal]:
        return [refusal for refusal in super().refusals(request) if refusal.code is not Code.PACKED]


class TakesAnyOption(hal.Capabilities):
    def refusals(self, request: hal.AttentionRequest) -> list[hal.Refusal]:
        return [refusal for refusal in super().refusals(request) if refusal.code is not Code.OPTION]


class IgnoresGivenLse(ExplicitSession):
    def given(self, lse: Tensor, scores: Tensor) -> Tensor:
        return torch.logsumexp(scores, -1)


class LouderSession(NoisySession):
    level = 0.03


class HiddenGenerator(NoisySession):
    own = torch.Generator().manual_seed(1)

    def generator(self, seed: int, offset: int) -> torch.Generator:
        return self.own


class Delegates(DenseSession):
    """Calls the public function, as a plugin might that falls back."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, r: Any, rng: Any = None, plan: Any = None
    ) -> Any:
        options = {"causal": r.causal, "enable_gqa": True, "backend": "bound", "scale": r.scale, "softcap": r.softcap}
        return hal.attention(query, key, value, mask, return_lse=True, **options)


class ClosesAll(DenseSession):
    """One state for all sessions: closing one closes it for the others."""

    state: Any = None

    def __init__(self) -> None:
        super().__init__()
        ClosesAll.state = "open"

    def attend(self, *args: Any) -> Any:
        if self.state != "open":
            raise RuntimeError("the device is closed")
        return super().attend(*args)

    def close(self) -> None:
        ClosesAll.state = "closed"


def of(check: str, session: Any = DenseSession, **options: Any) -> Fault:
    return Fault(check, lambda: DenseBackend("faulty", session, **options))


MORE = {
    "tiles that overlap": of("tilings", with_faulty(lambda plan: Twice(*plan))),
    "tiles that leave out": of("tilings", with_faulty(lambda plan: WithoutTheFirst(*plan))),
    "tiles that are not full": of("tilings", with_faulty(lambda plan: CalledFull(*plan))),
    "a tiling cut by nobody": of("tilings", with_faulty(lambda plan: plan, cut_by="")),
    "a plan with a tuple for each tile": of("tilings", with_faulty(stored)),
    "a tiling without its parameters in its name": of("tilings", with_tiling(NamedAlike)),
    "a tiling that changes its mind": of("tilings", with_tiling(ChangesItsMind)),
    "foreign tile sizes that are wrong": of(
        "tilings", ReadsTooFewKeys, claims=attrs.evolve(CLAIMS, tile_sizes=hal.Range(16, 64, 16))
    ),
    "a fast path that ignores the tiling": of(
        "tilings", BindsWithoutThePlan, claims=attrs.evolve(CLAIMS, tile_sizes=hal.Choice({16, 64}))
    ),
    "foreign tiles refused for another reason": of(
        "tilings", claims=RefusesTilesOtherwise(**attrs.asdict(CLAIMS, recurse=False))
    ),
    "memory that gives less than asked": of("memory", lambda: with_memory(GivesLess())),
    "memory freed twice": of("memory", lambda: with_memory(FreesTwice())),
    "memory that is not used again": of("memory", lambda: with_memory(NeverReuses())),
    "a peak that trim leaves": of("memory", lambda: with_memory(KeepsThePeak())),
    "an option taken undeclared": of("options", claims=TakesAnyOption(**attrs.asdict(CLAIMS, recurse=False))),
    "memory handed out twice": of("dlpack", lambda: with_memory(HastyMemory())),
    "copies nobody counts": of("dlpack", lambda: with_memory(SecretCopies())),
    "memory that is never given back": of("dlpack", lambda: with_memory(LosesCount())),
    "fails open": of("refusals", claims=FailsOpen(**attrs.asdict(CLAIMS, recurse=False))),
    "ignores the given log-sum-exp": of("merges", IgnoresGivenLse, claims=EXPLICIT),
    "more noise than declared": of("dtypes", LouderSession, claims=NOISY),
    "hidden generator": of("repeats", HiddenGenerator, claims=NOISY),
    "delegates by the public function": of(
        "runs_where_it_says",
        Delegates,
        claims=attrs.evolve(CLAIMS, features=CLAIMS.features - {"window", "diagonal", "dropout"}),
    ),
    "closes other sessions": of("reopen", ClosesAll),
    "one dropout for all heads": fault(
        "dropout", kept=lambda self, w, r, rng, work: DenseSession.kept(self, w[:1, :1], r, rng, work).expand(w.shape)
    ),
    "half the dropout": fault(
        "dropout",
        kept=lambda self, w, r, *rest: DenseSession.kept(self, w, dataclasses.replace(r, dropout=r.dropout / 2), *rest),
    ),
}


def with_memory(memory: Any) -> DenseSession:
    session = DenseSession()
    session.memory = memory
    return session

"""The kit finds every lie, by the name of the promise that is broken, and finds nothing in honest devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import hal_core as hal
from hal_core.capability import Code
from hal_core.registry import registry
from hal_core.testing import CHECKS, check_backend
from hal_core.testing.faulty_backends import CLAIMS, FAULTS, DenseBackend, DenseSession, Fault, fault
from hal_core.testing.subject import Failure, Subject

SLOW = {"leaks", "estimates"}
#: Checks that a lie may fail besides its own. Lies that are not here must fail their own check alone.
ALSO = {
    "wrong scale": {"combinations"},
    "dropped mask": {
        "combinations",
        "gradients",
        "grouped_heads",
        "log_sum_exp",
        "lse_gradient",
        "mask_gradient",
        "merges",
        "softcap",
    },
    "swapped group heads": {"combinations", "gradients", "log_sum_exp", "lse_gradient", "merges"},
    "wrong causal alignment": {"combinations", "gradients", "log_sum_exp", "lse_gradient", "window"},
    "wrong base of the log-sum-exp": {"combinations", "lse_gradient", "merges"},
    "half a gradient": {"combinations", "dropout", "lse_gradient", "mask_gradient"},
    "claims a dtype it lacks": {"combinations", "gradients", "log_sum_exp", "lse_gradient"},
    "refuses what it claims": {"combinations"},
    "ignores rng": {"dropout"},
    "fails open": {"packed"},
    "closes other sessions": {"runs_where_it_says"},
}
#: Lies that break nearly everything: what matters is that their own check says so.
BROAD = {"NaN in rows without keys", "changes its inputs", "hidden generator", "more noise than declared"}
SAYS = {
    "wrong scale": "result of scale",
    "dropped mask": "dropping the mask",
    "swapped group heads": "key head h % heads_kv",
    "wrong causal alignment": "causal top_left where bottom_right was asked",
    "wrong base of the log-sum-exp": "base-2 logarithm",
    "NaN in rows without keys": "rows that read no key are NaN",
    "stale keys": "changed in place",
    "leaks": "left",
    "changes its inputs": "key was changed in place",
    "claims a dtype it lacks": "float64",
    "half a gradient": "gradient of key",
    "leaves the work to another device": "honest:0 did the work",
    "refuses what it claims": "claimed, and check() refuses",
    "calls torch on the host hardware": "accelerator hardware is claimed",
    "ignores rng": "rng is ignored",
    "wavers where it claims determinism": "determinism is claimed",
    "estimates from thin air": "measured",
    "tiles that overlap": "lie in [2] tiles",
    "tiles that leave out": "lie in [0] tiles",
    "tiles that are not full": "is called full",
    "memory handed out twice": "handed out again",
    "copies nobody counts": "copied the memory, and stats() counts 0",
    "memory that is never given back": "are in use",
    "fails open": "not refused with 'packed'",
    "ignores the given log-sum-exp": "given the whole's",
    "more noise than declared": "out is wrong by",
    "hidden generator": "repeated",
    "closes other sessions": "is closed",
    "delegates by the public function": "bound:0 did the work",
    "one dropout for all heads": "another head",
    "half the dropout": "was dropped",
}


class OverlappingTiles(hal.DenseTiling):
    def plan(self, *args: Any, **options: Any) -> hal.TilePlan:
        plan = super().plan(*args, **options)
        return plan._replace(tiles=(*plan.tiles, *plan.tiles[:1]))


class MissingTiles(hal.DenseTiling):
    def plan(self, *args: Any, **options: Any) -> hal.TilePlan:
        plan = super().plan(*args, **options)
        return plan._replace(tiles=plan.tiles[1:])


class CallsAllFull(hal.DenseTiling):
    def plan(self, *args: Any, **options: Any) -> hal.TilePlan:
        plan = super().plan(*args, **options)
        return plan._replace(tiles=tuple(tile._replace(full=True) for tile in plan.tiles))


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


class ExplicitSession(DenseSession):
    """A backward of its own, from the given (out, lse), as a device that torch cannot differentiate has."""

    def autograd(self, request: hal.AttentionRequest) -> Any:
        return "explicit"

    def compute_attention(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().compute_attention(*args, **options)

    def given(self, lse: Tensor, scores: Tensor) -> Tensor:
        return lse

    def compute_attention_backward(
        self,
        prepared: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: Any = None,
    ) -> hal.Grads:
        query, key, value, r = prepared
        group = r.heads_q // r.heads_kv
        q, go, (k, v) = query.float(), grad_out.float(), (self.grouped(t.float(), group) for t in (key, value))
        scores, visible = q @ k.mT * r.effective_scale, self.visible(r, q.shape[2], k.shape[2])
        if mask is not None:
            visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
            scores = scores if mask.dtype == torch.bool else scores + mask.float()
        scores = scores.masked_fill(~visible, -math.inf)
        lse = self.given(lse, scores).masked_fill(lse == -math.inf, 0)
        weights = torch.exp(scores - lse.unsqueeze(-1))
        through = (go * out.float()).sum(-1, keepdim=True) - (0 if grad_lse is None else grad_lse.unsqueeze(-1))
        flow = weights * (go @ v.mT - through)
        key_grad, value_grad = flow.mT @ q * r.effective_scale, weights.mT @ go
        key_grad, value_grad = (t.unflatten(1, (-1, group)).sum(2) for t in (key_grad, value_grad))
        mask_grad = flow.sum_to_size(mask.shape).to(mask.dtype) if "mask" in r.grads and mask is not None else None
        grads = (flow @ k * r.effective_scale, key_grad, value_grad)
        return hal.Grads(*(g.to(t.dtype) for g, t in zip(grads, (query, key, value), strict=True)), mask_grad)


class IgnoresGivenLse(ExplicitSession):
    def given(self, lse: Tensor, scores: Tensor) -> Tensor:
        return torch.logsumexp(scores, -1)


class NoisySession(DenseSession):
    level = 0.02

    def attend(self, query: Tensor, *rest: Any) -> Any:
        out, lse = super().attend(query, *rest)
        seed, offset = rest[-1]
        noise = torch.randn(out.shape, generator=self.generator(seed, offset))
        return out + self.level * out.detach().float().norm() / max(out.numel(), 1) ** 0.5 * noise.to(out.dtype), lse

    def generator(self, seed: int, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1000 + offset)


class LouderSession(NoisySession):
    level = 0.03


class HiddenGenerator(NoisySession):
    own = torch.Generator().manual_seed(1)

    def generator(self, seed: int, offset: int) -> torch.Generator:
        return self.own


class Delegates(DenseSession):
    """Calls the public function, as a plugin might that falls back."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, r: Any, rng: Any = None) -> Any:
        options = {"causal": r.causal, "enable_gqa": True, "backend": "bound", "scale": r.scale, "softcap": r.softcap}
        return hal.attention(query, key, value, mask, return_lse=True, **options)


class BoundSession(DenseSession):
    """Has a fast path of its own, which neither prepares nor computes."""

    def bind(self, request: hal.AttentionRequest) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            exact = dataclasses.replace(request, len_q=query.shape[2], len_k=key.shape[2])
            out, lse = self.attend(query, key, value, mask, exact, rng)
            return hal.AttentionOutput(out, lse) if request.lse else out

        return run


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
    return Fault(check, lambda: DenseBackend("liar", session, **options))


EXPLICIT = attrs.evolve(CLAIMS, features=CLAIMS.features - {"softcap", "dropout"})
NOISY = attrs.evolve(
    CLAIMS,
    dtypes={"float32"},
    numerics={"float32": hal.Numerics(0.021, noisy=True)},
    features=CLAIMS.features - {"backward", "mask_grad", "lse_grad", "deterministic", "dropout"},
)
MORE = {
    "tiles that overlap": fault("tiles", tiling=property(lambda self: OverlappingTiles(), lambda self, value: None)),
    "tiles that leave out": fault("tiles", tiling=property(lambda self: MissingTiles(), lambda self, value: None)),
    "tiles that are not full": fault("tiles", tiling=property(lambda self: CallsAllFull(), lambda self, value: None)),
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
        "dropout", kept=lambda self, w, r, rng: DenseSession.kept(self, w[:1, :1], r, rng).expand(w.shape)
    ),
    "half the dropout": fault(
        "dropout",
        kept=lambda self, w, r, rng: DenseSession.kept(self, w, dataclasses.replace(r, dropout=r.dropout / 2), rng),
    ),
}


def with_memory(memory: Any) -> DenseSession:
    session = DenseSession()
    session.memory = memory
    return session


@pytest.fixture
def bound() -> Iterator[None]:
    """An honest device with a fast path of its own, registered as "bound"."""
    hal.register(DenseBackend("bound", BoundSession))
    yield
    hal.unregister("bound")


@pytest.mark.parametrize("name", [*FAULTS, *MORE])
@pytest.mark.usefixtures("honest", "bound")
def test_each_lie_is_found_by_name(name: str, seed: int) -> None:
    told = (FAULTS | MORE)[name]
    names = [check for check in CHECKS if check == told.check or check not in SLOW]
    report = check_backend(told.make(), checks=names, quick=True, seed=seed)
    failed = {result.name for result in report.results if not result.passed}
    assert told.check in failed, str(report)
    if name not in BROAD:
        assert failed <= {told.check} | ALSO.get(name, set()), str(report)
    assert SAYS[name] in report[told.check].detail


def test_there_are_enough_public_lies() -> None:
    assert len(FAULTS) >= 10
    assert {lie.check for lie in FAULTS.values()} <= set(CHECKS)


def test_an_honest_device_passes_everything(seed: int) -> None:
    report = check_backend(DenseBackend(), seed=seed)
    assert report.passed, str(report)
    skipped = {result.name for result in report.results if result.status == "skipped"}
    assert skipped == {"packed", "paged", "fp8_cache", "block_plan", "discovery", "kernels"}


OTHERS = {"explicit": (ExplicitSession, EXPLICIT), "noisy": (NoisySession, NOISY), "bound": (BoundSession, CLAIMS)}


@pytest.mark.parametrize(("session", "claims"), OTHERS.values(), ids=OTHERS)
def test_other_honest_devices_pass(session: Any, claims: Any, seed: int) -> None:
    names = [check for check in CHECKS if check not in SLOW]
    report = check_backend(DenseBackend("other", session, claims), checks=names, quick=True, seed=seed)
    assert report.passed, str(report)


@pytest.mark.usefixtures("bound")
def test_a_composite_that_names_its_inner_device_may_use_it(seed: int) -> None:
    class Composite(DenseBackend):
        def devices(self) -> list[hal.Device]:
            return [attrs.evolve(self._device, features=("inner bound:0",))]

    report = check_backend(Composite("composite", Delegates), checks=["runs_where_it_says"], seed=seed)
    assert report.passed, str(report)


def test_a_claim_without_any_request_that_uses_it_fails() -> None:
    claims = attrs.evolve(CLAIMS, heads=hal.Range(1, 1))
    report = check_backend(DenseBackend("single", claims=claims), checks=["grouped_heads"], quick=True)
    assert "grouped_heads is claimed, and the other claims leave no request" in report["grouped_heads"].detail


def test_gradients_without_a_declared_bound_fail() -> None:
    claims = attrs.evolve(CLAIMS, dtypes={"float32"}, numerics={"float32": hal.Numerics(1e-5)})
    report = check_backend(DenseBackend("boundless", claims=claims), checks=["gradients"], quick=True)
    assert "declare no bound" in report["gradients"].detail


def double(x: Tensor) -> Tensor:
    return 2 * x


def numbers(generator: torch.Generator) -> tuple[Tensor, int]:
    return torch.randn(5, 3, generator=generator), 7


@pytest.mark.parametrize(
    ("provided", "factor", "finding"),
    [({"double"}, 2.0, "double"), ({"double"}, 2.1, "is wrong by 0.05"), ({"halve"}, 2.0, "no plugin specifies")],
)
def test_kernels_are_held_to_their_reference(
    provided: set[str], factor: float, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Provider(DenseBackend):
        def kernel_names(self, device: hal.Device) -> frozenset[str]:
            return frozenset(provided)

    targets = {"kernels:double": lambda x, n: double(x), "kernels:numbers": numbers}
    monkeypatch.setattr("hal_core.testing.runtime_checks.resolve", targets.get)
    spec = hal.KernelSpec(
        name="double",
        signature="double(x[M, N], n) -> [M, N]",
        reference="kernels:double",
        sampler="kernels:numbers",
        tolerance={"float32": 1e-6, "bfloat16": 1e-2},
    )
    monkeypatch.setitem(registry._specs, "double", spec)
    kind = type("KernelSession", (DenseSession,), {"kernel": lambda self, name: lambda x, n: factor * x})
    report = check_backend(Provider("provider", kind), checks=["kernels"])
    assert report.passed == (finding == "double"), str(report)
    assert finding in report["kernels"].detail


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_results_of_few_numbers_are_held_over_many_draws(seed: int, factor: float) -> None:
    """Two numbers may nearly cancel, so one draw proves little; wrong by a thousandth is wrong all the same."""

    def off(self: DenseSession, *given: Any) -> Any:
        out, lse = DenseSession.attend(self, *given)
        return out * factor, lse

    hal.register(fault("value_dim", attend=off).make(), name="liar")
    try:
        subject = Subject(registry.find("liar")[0], seed=seed, quick=False)
        sizes = {
            "batch": 1,
            "heads_q": 2,
            "heads_kv": 2,
            "len_q": 1,
            "len_k": 67,
            "dim_qk": 64,
            "dim_v": 1,
            "dtype": "float32",
        }
        case = subject.corners.case("few", sizes)
        if factor == 1:
            assert subject.hold(case).share <= 1
        else:
            with pytest.raises(Failure, match=r"out is wrong by 0\.001"):
                subject.hold(case)
    finally:
        hal.unregister("liar")


def test_gradients_of_few_rows_are_weighed_over_many_draws() -> None:
    """Where a row reads one key, its query's gradient is that of its log-sum-exp alone, next to nothing in some
    draws.
    """
    subject = Subject(registry.find("cpu:0")[0], seed=0, quick=False)
    sizes = {
        "batch": 1,
        "heads_q": 2,
        "heads_kv": 2,
        "len_q": 1,
        "len_k": 67,
        "dim_qk": 512,
        "dim_v": 512,
        "dtype": "float32",
    }
    asked = {"causal": hal.Causal.TOP_LEFT, "grads": frozenset("qkv"), "lse": True, "grad_lse": True}
    case = subject.corners.case("few rows", sizes | asked)
    for seed in range(12):
        subject.seed = 1000 * seed
        assert subject.hold(case).share <= 1


def test_the_public_kit_is_named_in_each_lie() -> None:
    assert all(told.make().devices()[0].id == "liar:0" for told in FAULTS.values())

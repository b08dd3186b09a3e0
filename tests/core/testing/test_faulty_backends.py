"""The kit finds every fault, by the name of the promise that is broken, and finds nothing in honest devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from faulty_devices import MORE, Delegates
from honest_devices import OTHERS, OWN, BoundSession
from torch import Tensor

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import CHECKS, check_backend
from hal_core.testing.dense_backend import CLAIMS, DenseBackend, DenseSession
from hal_core.testing.faulty_backends import FAULTS, fault
from hal_core.testing.findings import Failure
from hal_core.testing.subject import Subject

SLOW = {"leaks", "estimates"}
_GROUPS = {"combinations", "gradients", "log_sum_exp", "lse_gradient"}
#: Checks that a fault may fail besides its own. Faults that are not here must fail their own check alone.
ALSO = {
    "wrong scale": {"combinations", "structure"},
    "dropped mask": {
        *_GROUPS,
        "grouped_heads",
        "isolation",
        "lowest_mask",
        "mask_gradient",
        "merges",
        "peak_memory",
        "softcap",
        "structure",
    },
    "finfo.min taken for -inf": {"memory"},
    "swapped group heads": {*_GROUPS, "isolation", "merges", "structure"},
    "swapped group heads under a loose bound": {"isolation"},
    "wrong causal alignment": {*_GROUPS, "structure", "window"},
    "wrong base of the log-sum-exp": {"combinations", "lowest_mask", "lse_gradient", "merges"},
    "stale keys": {"threads"},
    "stale keys by their first element": {"threads"},
    "an output buffer used again": {"memory", "merges", "repeats", "structure", "threads"},
    "allocates past its memory manager": {"peak_memory"},
    "half a gradient": {"combinations", "dropout", "lowest_mask", "lse_gradient", "mask_gradient"},
    "claims a dtype it lacks": {*_GROUPS, "lowest_mask"},
    "refuses what it claims": {"combinations"},
    "ignores rng": {"dropout"},
    "wavers where it claims determinism": {"isolation"},
    "leaves the work to another device": {"memory", "peak_memory"},
    "memory that is never given back": {"memory", "peak_memory"},
    "fails open": {"memory", "packed", "peak_memory"},
    "ignores the given log-sum-exp": {"peak_memory"},
    "closes other sessions": {"runs_where_it_says", "tilings"},
    "delegates by the public function": {"memory", "peak_memory"},
}
#: Faults that break nearly everything: what matters is that their own check says so.
BROAD = {
    "NaN in rows without keys",
    "changes its inputs",
    "hidden generator",
    "more noise than declared",
    "memory that gives less than asked",
    "memory handed out twice",
    "gives another shape",
    "gives another dtype",
    "gives a result on another device",
    "gives nothing",
}
SAYS = {
    "wrong scale": "result of scale",
    "scale doubled beyond 1,024 keys": "5 x 1111",
    "dropped mask": "dropping the mask",
    "finfo.min taken for -inf": "taken for -inf",
    "NaN that leaks into other batch entries": "holds NaN in another batch entry",
    "swapped group heads": "key head h % heads_kv",
    "swapped group heads under a loose bound": "nearer to that of query head h reading key head h % heads_kv",
    "wrong causal alignment": "causal top_left where bottom_right was asked",
    "wrong base of the log-sum-exp": "base-2 logarithm",
    "NaN in rows without keys": "rows that read no key are NaN",
    "stale keys": "changed in place",
    "stale keys by their first element": "one late element of key",
    "scratch shared between threads": "in 8 threads",
    "an output buffer used again": "a result that was kept changed",
    "leaks": "left",
    "changes its inputs": "key was changed in place",
    "allocates past its memory manager": "faulty_backends.py:",
    "estimates a tenth of its memory": "bytes from torch's empty at",
    "claims a dtype it lacks": "float64",
    "half a gradient": "gradient of key",
    "leaves the work to another device": "honest:0 did the work",
    "refuses what it claims": "claimed, and check() refuses",
    "calls torch on the host hardware": "accelerator hardware is claimed",
    "ignores rng": "rng is ignored",
    "wavers where it claims determinism": "determinism is claimed",
    "gives another shape": "out is [2, 37, 2, 33]",
    "gives another dtype": "torch.float64 on cpu",
    "gives a result on another device": "on meta",
    "gives nothing": "gave None",
    "a tiling that is decoration": "attention over all keys",
    "blocks of a tiling that are ignored": "the plan of a tiling that the caller brings is ignored",
    "a fast path that ignores the tiling": "by hal.attention: the plan of a tiling that the caller brings is ignored",
    "a cost in milliseconds": "cost() says",
    "an option that spoils the result": "option passes=2",
    "estimates from thin air": "measured",
    "tiles that overlap": "lie in [2] tiles",
    "tiles that leave out": "lie in [0] tiles",
    "tiles that are not full": "is called full",
    "a tiling cut by nobody": "set cut_by",
    "a tiling without its parameters in its name": "name the parameters",
    "a tiling that changes its mind": "two different plans",
    "a plan with a tuple for each tile": "equal blocks store nothing",
    "foreign tile sizes that are wrong": "under tiling dense(",
    "foreign tiles refused for another reason": "not as 'tiling'",
    "memory handed out twice": "handed out again",
    "memory that gives less than asked": "were asked for",
    "memory freed twice": "did not raise ContractError",
    "memory that is not used again": "not used again",
    "a peak that trim leaves": "after trim() the peak is",
    "copies nobody counts": "copied the memory, and stats() counts 0",
    "memory that is never given back": "are in use",
    "fails open": "not refused with 'packed'",
    "an option taken undeclared": "no_such_option=1 is not declared",
    "ignores the given log-sum-exp": "given the whole's",
    "more noise than declared": "out is wrong by",
    "hidden generator": "repeated",
    "closes other sessions": "is closed",
    "delegates by the public function": "bound:0 did the work",
    "one dropout for all heads": "another head",
    "half the dropout": "was dropped",
}


@pytest.fixture
def bound() -> Iterator[None]:
    """An honest device with a fast path of its own, registered as "bound"."""
    hal.register(DenseBackend("bound", BoundSession))
    yield
    hal.unregister("bound")


@pytest.mark.parametrize("name", [*FAULTS, *MORE])
@pytest.mark.usefixtures("honest", "bound")
def test_each_fault_is_found_by_name(name: str, seed: int) -> None:
    made = (FAULTS | MORE)[name]
    report = check_backend(made.make(), checks=[made.check], quick=True, seed=seed)
    assert not report.passed, str(report)
    assert SAYS[name] in report[made.check].detail


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTS, *MORE])
@pytest.mark.usefixtures("honest", "bound")
def test_each_fault_fails_its_own_check_and_no_other(name: str, seed: int) -> None:
    made = (FAULTS | MORE)[name]
    names = [check for check in CHECKS if check == made.check or check not in SLOW]
    report = check_backend(made.make(), checks=names, quick=True, seed=seed)
    failed = {result.name for result in report.results if not result.passed}
    assert made.check in failed, str(report)
    if name not in BROAD:
        assert failed <= {made.check} | ALSO.get(name, set()), str(report)


def test_every_check_finds_some_fault() -> None:
    found = {made.check for made in (FAULTS | MORE).values()}
    # Features that the honest device does not claim, and checks with faulty devices in tests of their own.
    apart = {
        "packed",
        "paged",
        "used_lengths",
        "fp8_cache",
        "block_plan",
        "discovery",
        "kernels",
        "value_dim",
        "combinations",
    }
    alike = {"strides", "softcap", "mask_gradient", "lse_gradient", "prepared_reuse", "huge_strides"}
    assert set(CHECKS) - found <= apart | alike


def test_there_are_enough_public_faults() -> None:
    assert len(FAULTS) >= 10
    assert {made.check for made in FAULTS.values()} <= set(CHECKS)


def test_an_honest_device_passes_everything_quickly(seed: int) -> None:
    report = check_backend(DenseBackend(), quick=True, seed=seed)
    assert report.passed, str(report)
    skipped = {result.name for result in report.results if result.status == "skipped"}
    assert skipped == {"packed", "paged", "used_lengths", "fp8_cache", "block_plan", "discovery", "kernels", "costs"}
    assert not any(result.warning for result in report.results if result.name != "estimates")


@pytest.mark.slow
def test_an_honest_device_passes_everything(seed: int) -> None:
    report = check_backend(DenseBackend(), seed=seed)
    assert report.passed, str(report)


def test_a_loose_bound_is_said_aloud(seed: int) -> None:
    numerics = {"float32": hal.Numerics(1.2)}
    claims = attrs.evolve(CLAIMS, dtypes=numerics, numerics=numerics, features={"grouped_heads"})
    report = check_backend(DenseBackend("loose", claims=claims), checks=["structure"], quick=True, seed=seed)
    assert report.passed
    assert "bound too loose to show anything: 1.2 in float32" in report["structure"].warning
    assert "WARNING, structure: bound too loose" in str(report)


def test_a_plan_that_is_read_without_any_effect_is_a_warning(seed: int) -> None:
    """Equal bits under every block size prove nothing against a device that reads the block sizes."""

    class Reads(DenseSession):
        def prepare_attention(self, *given: Any, plan: Any = None, **named: Any) -> Any:
            assert plan is None or plan.block_q
            return super().prepare_attention(*given, **named)

    claims = attrs.evolve(CLAIMS, tile_sizes=hal.Range(1, 128))
    report = check_backend(DenseBackend("reads", Reads, claims), checks=["tilings"], quick=True, seed=seed)
    assert report.passed, str(report)
    assert "nothing shows that the plan is followed" in report["tilings"].warning


def test_a_pool_that_is_never_used_again_is_a_warning(seed: int) -> None:
    class Holds(DenseSession):
        """A view of its scratch tensor outlives the block."""

        def attend(self, query: Tensor, *rest: Any) -> Any:
            with self.scratch(query.shape, "float32") as staged:
                row = staged[0]
            self.row = row
            return query.clone(), torch.zeros(query.shape[:3])

    class Once(DenseSession):
        def attend(self, query: Tensor, *rest: Any) -> Any:
            with self.scratch(query.shape, "float32") as staged:
                staged.fill_(0)
                del staged
            return query.clone(), torch.zeros(query.shape[:3])

    for session, warns in ((Holds, True), (Once, False)):
        backend = DenseBackend("pools", session)
        report = check_backend(backend, checks=["memory"], quick=True, seed=seed)
        assert ("used none again" in report["memory"].warning) == warns, str(report)


@pytest.mark.parametrize("name", OTHERS)
def test_other_honest_devices_pass(name: str, seed: int) -> None:
    session, claims, backend = OTHERS[name]
    report = check_backend(backend("other", session, claims), checks=OWN[name], quick=True, seed=seed)
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_honest_devices_pass_everything(name: str, seed: int) -> None:
    session, claims, backend = OTHERS[name]
    names = [check for check in CHECKS if check not in SLOW]
    report = check_backend(backend("other", session, claims), checks=names, quick=True, seed=seed)
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
    monkeypatch.setitem(registry._specs, "double", (spec, "a test"))
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

    hal.register(fault("value_dim", attend=off).make(), name="faulty")
    try:
        subject = Subject(registry.find("faulty")[0], seed=seed, quick=False)
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
        hal.unregister("faulty")


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


def test_every_fault_is_named_as_one() -> None:
    assert all(made.make().devices()[0].id == "faulty:0" for made in FAULTS.values())

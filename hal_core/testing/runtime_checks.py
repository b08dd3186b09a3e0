"""Whether a device is what it says: where it runs, what it costs, what its discovery loads, what its kernels compute.

ESTIMATE_FACTOR: how far outside its interval a time estimate may lie from the measured time, by what it is based on:
measured ones leave room for a busy machine, the others for not knowing this machine. GROSS_FACTOR: what fails on a busy
machine too. COST_FACTOR: how far outside the estimate's interval the middle of what `cost()` says may lie.
QUIET_SPREAD: median over fastest call, up to which a machine counts as quiet. HOST_SLACK, LAUNCH_SLACK:
seconds that a call may take beyond any estimate, for a busy host's scheduler and for an accelerator's launch.
DISCOVER: runs in a fresh process and prints which modules are there after discovery, and which libraries it loaded.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import DEFAULT, Mock, patch

import torch
from torch._C._nn import scaled_dot_product_attention  # torch's, whatever took its place
from torch.utils._python_dispatch import TorchDispatchMode

from .. import Basis, Causal, Estimate, Fidelity, MaskKind, meter
from ..registry import registry, resolve
from .benchmark import BenchmarkRunner
from .cases import QKV, Case
from .findings import Failure, Measure, Skip
from .reference import relative_error
from .subject import Subject

ESTIMATE_FACTOR = {Basis.MEASURED: 4.0, Basis.MODELLED: 10.0, Basis.DECLARED: 30.0}
GROSS_FACTOR, QUIET_SPREAD, COST_FACTOR = 1000.0, 1.5, 2.0
HOST_SLACK, LAUNCH_SLACK = 10e-3, 0.2e-3
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention", "matmul")
DISCOVER = """
import json, os, sys
def libraries():
    lines = open("/proc/self/maps") if os.path.exists("/proc/self/maps") else []
    return {line.split()[-1] for line in lines if ".so" in line and "lib-dynload" not in line}
import importlib.metadata, shutil
from hal_core.registry import registry
before = libraries()
registry.discover()
print(json.dumps([sorted(sys.modules), sorted(libraries() - before)]))
"""


def discovery(s: Subject) -> Measure:
    """Finding the plugin imports neither torch nor a driver."""
    entry = registry.entry(s.device.id)
    plugins = [p.name for p in registry.plugin_list() if p.distribution and p.distribution == entry.distribution]
    if not plugins:
        raise Skip("registered at run time, not found by an entry point")
    environment = os.environ | {"HAL_PLUGINS": ",".join(plugins), "HAL_DISABLE": ""}
    done = subprocess.run(
        [sys.executable, "-c", DISCOVER], env=environment, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise Failure(f"discovery in a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    modules, libraries = json.loads(done.stdout)
    target = entry.spec.target.partition(":")[0]
    if found := [*({"torch", "numpy", target} & set(modules)), *libraries]:
        raise Failure(f"discovery loads {', '.join(found)}: import it where it is used")
    return Measure(detail=", ".join(plugins))


def estimates(s: Subject) -> Measure:
    """Estimates are sane, grow with the work, and for real devices agree with the measured time."""
    proposed = [s.corners.case("estimates", {"len_q": n, "len_k": n}) for n in (64, 256, 1024)]
    cases = [case for case in proposed if s.accepts(case.request)]
    if not cases:
        raise Skip("none of the lengths 64, 256 and 1024 is claimed")
    found = [s.backend.estimate(case.request, s.device) for case in cases]
    for case, estimate in zip(cases, found, strict=True):
        r, total = case.request, sum(estimate.parts.values())
        if estimate.memory < r.batch * r.heads_q * r.len_q * r.dim_v:
            raise Failure(f"{case}: a memory of {estimate.memory:,} bytes is estimated, the output alone needs more")
        if estimate.parts and abs(total - estimate.time.middle) > 0.01 * estimate.time.middle:
            raise Failure(
                f"{case}: the parts add up to {total:.3g} s, the time's middle is {estimate.time.middle:.3g} s"
            )
    for small, large in itertools.pairwise(found):
        if any(a and b and b.high < a.middle for a, b in ((small.time, large.time), (small.energy, large.energy))):
            raise Failure(f"{cases[found.index(large)]}: estimated to cost less than fewer tokens")
    if s.device.fidelity is Fidelity.SIMULATED:
        return Measure(detail="modelled: compared with each other, not with this machine's clock")
    return _compared_with_the_clock(s, cases, found)


def costs(s: Subject) -> Measure:
    """What a session's `cost` says of a call that ran agrees with the estimate of that call."""
    if not hasattr(s.session, "cost"):
        raise Skip("the session has no cost()")
    proposed: list[dict[str, Any]] = [{"len_q": n, "len_k": n} for n in (64, 256)]
    proposed += [{"heads_q": 4, "heads_kv": 2}, {"causal": Causal.TOP_LEFT}, {"len_q": 1, "len_k": 256}]
    worst, tried = Measure(), 0
    for case in (s.corners.case("costs", change) for change in ({}, *proposed)):
        if not s.accepts(case.request):
            continue
        inputs = case.draw(s.seed)
        prepared = s.session.prepare_attention(*inputs[:3], request=case.request)
        s.session.compute_attention(prepared, inputs.mask, rng=s.rng(case.request))
        found, estimate = s.session.cost(prepared), s.backend.estimate(case.request, s.device)
        if not isinstance(found, Estimate):
            raise Failure(f"{case}: cost() gave {found!r}: give an Estimate")
        for name in ("time", "energy"):
            said, before = getattr(found, name), getattr(estimate, name)
            if said is None or before is None:
                continue
            off = max(_ratio(said.middle, before.high), _ratio(before.low, said.middle))
            if off > COST_FACTOR:
                unit = "s" if name == "time" else "J"
                interval = f"{before.low:.3g} to {before.high:.3g} {unit} were estimated"
                raise Failure(f"{case}: cost() says {said.middle:.3g} {unit}, {interval}", off, COST_FACTOR)
            worst = s.worse(worst, Measure(off, COST_FACTOR))
        tried += 1
    return worst._replace(detail=f"{tried} calls, as a factor outside the estimate's interval")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 1.0


def _compared_with_the_clock(s: Subject, cases: list[Case], found: list[Estimate]) -> Measure:
    """Time each case, interleaved with torch's own attention on equal tensors, which shows whether the host is quiet.

    On a busy host an estimate that is off is a warning; one that is off by `GROSS_FACTOR` fails anywhere.
    """
    worst, on_host, doubts = Measure(), s.corners.base.device == "cpu", list[str]()
    runner = BenchmarkRunner(2, 30, budget=2.0, synchronize=None if on_host else torch.cuda.synchronize)
    slack = HOST_SLACK if on_host else LAUNCH_SLACK
    for case, estimate in zip(cases, found, strict=True):
        inputs = case.draw(s.seed)
        yardstick = partial(scaled_dot_product_attention, *inputs[:3], enable_gqa=True)
        calls: dict[str, Any] = {"call": partial(s.run, "hal.attention", case, inputs), "yardstick": yardstick}
        timed = runner.compare(calls).results
        call, given, factor = timed["call"], estimate.time, ESTIMATE_FACTOR[estimate.time.basis]
        # A busy machine only adds: the fastest call meets the upper end, the median the lower one.
        off = max((call.min / 1e3 - slack) / given.high, given.low / (call.p50 / 1e3))
        spread = max(each.p50 / each.min for each in timed.values())
        if off > factor:
            interval = f"{given.low:.3g} to {given.high:.3g} s ({given.basis})"
            wrong = f"{case}: {interval} estimated, {call.min:.3g} to {call.p50:.3g} ms measured"
            if off > GROSS_FACTOR or (spread <= QUIET_SPREAD and not _others_wait()):
                raise Failure(wrong, off, factor)
            doubts.append(f"{wrong}, while torch's own attention varied by a factor of {spread:.2g}")
        else:
            worst = s.worse(worst, Measure(max(off, 0.0), factor, "factor between interval and measured time"))
    return worst._replace(warning=f"the host was busy: {'; '.join(doubts)}" if doubts else "")


def _others_wait() -> bool:
    """Whether more threads want to run than there are cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)


def runs_where_it_says(s: Subject) -> Measure:
    """The device does the work itself: it calls no other device, and hardware does not let torch compute elsewhere.

    A composite names the devices it holds in its `Device.features`, for example "inner cpu:0".
    """
    case = s.probe({"mask": MaskKind.BOOLEAN}, {"causal": Causal.TOP_LEFT}, {"grads": QKV})
    inputs, own = case.draw(s.seed), s.device
    for path in ("hal.attention", "session"):
        s.run(path, case, inputs)  # the first call may open or compile: it is not watched
        with _watched(s) as called, _Products() as products, meter() as metered:
            result = s.run(path, case, inputs)
        if path == "hal.attention" and own.id not in metered.records:
            raise Failure(f"{case}: the meter saw {sorted(metered.records)} run, not {own.id}")
        if strangers := sorted(
            id for id in called | set(metered.records) - {own.id} if id not in " ".join(own.features)
        ):
            raise Failure(f"{case}, by {path}: {', '.join(strangers)} did the work, and {own.id} does not name it")
        if result.out.device != inputs.query.device:
            raise Failure(
                f"{case}, by {path}: the result lies on {result.out.device}, the query on {inputs.query.device}"
            )
        if own.fidelity is Fidelity.HARDWARE and (elsewhere := products.devices - {own.family}):
            raise Failure(
                f"{case}, by {path}: torch computed it on {', '.join(elsewhere)}, {own.family} hardware is claimed"
            )
    return Measure()


class _Products(TorchDispatchMode):
    """Records on which kinds of torch device matrix products run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.__name__ for name in _PRODUCTS) and args and isinstance(args[0], torch.Tensor):
            self.devices.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(s: Subject) -> Iterator[set[str]]:
    """Collects the ids of other devices whose open sessions are called inside the block."""
    called: set[str] = set()
    others = [
        (id, session) for entry in registry.entries() for id, session in entry.sessions.items() if id != s.device.id
    ]
    with ExitStack() as undo:
        for (id, session), name in itertools.product(others, ("prepare_attention", "compute_attention")):
            noting = Mock(wraps=getattr(session, name), side_effect=partial(_note, called, id))
            undo.enter_context(patch.object(session, name, noting))
        yield called


def _note(called: set[str], id: str, *_: Any, **__: Any) -> Any:
    called.add(id)
    return DEFAULT


def kernels(s: Subject) -> Measure:
    """Every kernel that is provided agrees with the reference of its specification."""
    if not hasattr(s.backend, "kernel_names"):
        raise Skip("no kernels are provided")
    names, specs, worst = sorted(s.backend.kernel_names(s.device)), registry.kernel_specs(), Measure()
    if unspecified := sorted(set(names) - set(specs)):
        raise Failure(f"kernels {unspecified} are provided, and no plugin specifies them")
    for name, dtype in [(each, dtype) for each in names for dtype in specs[each].tolerance]:
        drawn = resolve(specs[name].sampler)(torch.Generator().manual_seed(s.seed))
        floats = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in drawn]
        given = [
            x.to(s.corners.base.device, getattr(torch, dtype) if f else x.dtype) if isinstance(x, torch.Tensor) else x
            for x, f in zip(drawn, floats, strict=True)
        ]
        want = resolve(specs[name].reference)(*(x.double() if f else x for x, f in zip(given, floats, strict=True)))
        got, bound = s.session.kernel(name)(*given), specs[name].tolerance[dtype]
        if (numerics := s.capabilities.numerics.get(dtype)) is not None and numerics.noisy:
            bound = max(bound, numerics.relative)  # an analogue device is held to the noise that it declares
        results = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        error = max(relative_error(x, wanted) for x, wanted in results)
        if not error <= bound:
            raise Failure(f"kernel {name} in {dtype} is wrong by {error:.2g}, {bound:.2g} specified", error, bound)
        worst = s.worse(worst, Measure(error, bound))
    return worst._replace(detail=", ".join(names))

"""Whether a device is what it says: where it runs, what it costs, what its discovery loads, what its kernels compute."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..context import meter
from ..device import Fidelity
from ..estimate import Basis, Estimate
from ..kernels import resolve
from ..protocols import KernelProvider
from ..registry import registry
from ..request import Causal, MaskKind
from .cases import QKV, Case, Inputs
from .reference import relative_error
from .subject import Failure, Measure, Skip, Subject

#: How far outside its interval a time estimate may lie from the measured time, by what the estimate is based on. Measured
#: ones leave room for a busy machine, the others for not knowing this machine.
ESTIMATE_FACTOR = {Basis.MEASURED: 4.0, Basis.MODELLED: 10.0, Basis.DECLARED: 30.0}
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention", "matmul")
#: Runs where nothing has imported torch: prints what discovering the given plugins loaded.
_DISCOVER = """
import json, os, sys
def libraries():
    try:
        return {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
    except OSError:
        return set()
import hal_core
before = libraries()
hal_core.registry.registry.discover()
standard = os.path.dirname(os.__file__)
new = [p for p in libraries() - before if not p.startswith(os.path.join(standard, "lib-dynload"))]
print(json.dumps({"modules": sorted(sys.modules), "libraries": sorted(new)}))
"""


def discovery(s: Subject) -> Measure:
    """Finding the plugin imports neither torch nor a driver."""
    entry = registry.entry(s.device.id)
    plugins = [p.name for p in registry.plugins() if p.distribution and p.distribution == entry.distribution]
    if not plugins:
        raise Skip("registered at run time, not found by an entry point")
    import os

    environment = os.environ | {"HAL_PLUGINS": ",".join(plugins), "HAL_DISABLE": ""}
    done = subprocess.run([sys.executable, "-c", _DISCOVER], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Failure(f"discovery in a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    loaded = json.loads(done.stdout)
    target = entry.spec.target.partition(":")[0]
    if wrong := [name for name in ("torch", "numpy", target) if name in loaded["modules"]]:
        raise Failure(f"discovery imports {', '.join(wrong)}: move the import to where it is used")
    if loaded["libraries"]:
        raise Failure(f"discovery loads {', '.join(loaded['libraries'])}: a driver belongs into the backend's target")
    return Measure(detail=", ".join(plugins))


def estimates(s: Subject) -> Measure:
    """Estimates are sane, grow with the work, and for real devices agree with the measured time."""
    lengths = [n for n in (64, 256, 1024) if n in s.capabilities.length]
    plain = {"batch": s.corners.base.batch}
    cases = [s.corners.case("estimates", "", plain | {"len_q": n, "len_k": n}) for n in lengths]
    cases = [case for case in cases if s.accepts(case.request)]
    if not cases:
        raise Skip("no length of 64, 256 or 1024 is claimed")
    found = [s.backend.estimate(case.request, s.device) for case in cases]
    for case, estimate in zip(cases, found, strict=True):
        least = case.request.batch * case.request.heads_q * case.request.len_q * case.request.dim_v
        if not isinstance(estimate, Estimate):
            raise Failure(f"{case}: estimate() gave {estimate!r}")
        if estimate.memory < least:
            raise Failure(f"{case}: a memory of {estimate.memory:,} bytes is estimated, the output alone needs more")
        total = sum(estimate.parts.values())
        if estimate.parts and abs(total - estimate.time.middle) > 0.01 * estimate.time.middle:
            raise Failure(f"{case}: the parts add up to {total:.3g} s, the time's middle is {estimate.time.middle:.3g} s")
    for (small, low), (large, high) in zip(zip(cases, found, strict=True), list(zip(cases, found, strict=True))[1:], strict=False):
        if high.time.high < low.time.middle or (high.energy and low.energy and high.energy.high < low.energy.middle):
            raise Failure(f"{large} is estimated to cost less than {small}")
    if s.device.fidelity is Fidelity.SIMULATED:
        return Measure(detail="modelled: compared with each other, not with this machine's clock")
    worst = 0.0
    for case, estimate in zip(cases, found, strict=True):
        times, factor = _times(s, case), ESTIMATE_FACTOR[estimate.time.basis]
        # A busy machine only adds: the fastest call meets the upper end, the median the lower one.
        off = max(times[0] / max(estimate.time.high, 1e-12), estimate.time.low / times[len(times) // 2])
        if off > factor:
            given = f"{estimate.time.low:.3g} to {estimate.time.high:.3g} s ({estimate.time.basis})"
            measured = f"{times[0]:.3g} s at best and {times[len(times) // 2]:.3g} s in the middle"
            raise Failure(f"{case}: {given} estimated, {measured} measured", off, factor)
        worst = max(worst, off / factor)
    return Measure(worst, 1.0, "distance from the interval over the factor allowed for its basis")


def _times(s: Subject, case: Case) -> list[float]:
    inputs = case.draw(s.seed)
    synchronize = getattr(s.session, "synchronize", None) or (torch.cuda.synchronize if inputs.query.is_cuda else lambda: None)
    times: list[float] = []
    stop = time.monotonic() + 2.0
    while len(times) < 5 or (len(times) < 30 and time.monotonic() < stop):
        synchronize()
        start = time.perf_counter()
        s.run("hal.attention", case, inputs)
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])


def runs_where_it_says(s: Subject) -> Measure:
    """The device does the work itself: no other device is called, and hardware does not leave it to torch elsewhere.

    A composite names the devices it holds in its `Device.features`, for example "inner cpu:0".
    """
    case = s.probe({"mask": MaskKind.BOOLEAN}, {"causal": Causal.TOP_LEFT}, {"grads": QKV})
    inputs = case.draw(s.seed)
    s.run("hal.attention", case, inputs)  # what opens or compiles on the first call does so before anybody watches
    named = " ".join(s.device.features)
    for path in ("session", "hal.attention"):
        with _watch_sessions(s) as called, _Products() as products, meter() as metered:
            result = s.run(path, case, inputs)
        called |= set(metered.records) - {s.device.id}
        if path == "hal.attention" and s.device.id not in metered.records:
            raise Failure(f"{case}: the meter saw {sorted(metered.records)} run, not {s.device.id}")
        if strangers := sorted(device for device in called if device not in named):
            raise Failure(f"{case}, by {path}: {', '.join(strangers)} did the work, and {s.device.id} does not name it")
        if result.out.device != inputs.query.device:
            raise Failure(f"{case}, by {path}: the result lies on {result.out.device}, the query on {inputs.query.device}")
        if s.device.fidelity is Fidelity.HARDWARE and (elsewhere := products.devices - {s.device.family}):
            raise Failure(f"{case}, by {path}: torch computed the products on {', '.join(elsewhere)}, {s.device.family} hardware is claimed")
    return Measure()


class _Products(TorchDispatchMode):
    """Notes on which kind of torch device matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.__name__ for name in _PRODUCTS) and args and isinstance(args[0], torch.Tensor):
            self.devices.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


@contextmanager
def _watch_sessions(s: Subject) -> Iterator[set[str]]:
    """The ids of other devices whose sessions are asked for, or asked to work, inside."""
    called: set[str] = set()
    undo: list[tuple[Any, str]] = []

    def watch(holder: Any, name: str, device: str | None) -> None:
        method = getattr(holder, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            called.add(device or args[0])
            return method(*args, **kwargs)

        setattr(holder, name, noting)
        undo.append((holder, name))

    own = registry.entry(s.device.id).sessions.values()
    for entry in registry.entries():
        for device, session in entry.sessions.items():
            if session not in own:
                watch(session, "prepare_attention", device)
                watch(session, "compute_attention", device)
    try:
        yield called
    finally:
        for holder, name in undo:
            delattr(holder, name)


def kernels(s: Subject) -> Measure:
    """Every kernel that is provided agrees with the reference of its specification."""
    provider = s.backend
    if not isinstance(provider, KernelProvider):
        raise Skip("no kernels are provided")
    specs, worst = registry.kernel_specs(), Measure()
    names = sorted(provider.kernel_names(s.device))
    for name in names:
        if name not in specs:
            raise Failure(f"kernel {name!r} is provided, and no plugin specifies it")
        spec, kernel = specs[name], s.session.kernel(name)
        for dtype, bound in spec.tolerance.items():
            drawn = resolve(spec.sampler)(torch.Generator().manual_seed(s.seed))
            given = _map(drawn, lambda t, dtype=dtype: t.to(getattr(torch, dtype)).to(s.corners.base.device))
            want = resolve(spec.reference)(*_map(given, lambda t: t.double()))
            got = kernel(*given)
            for x, wanted in zip(_tuple(got), _tuple(want), strict=True):
                error = relative_error(x, wanted)
                if not error <= bound:
                    raise Failure(f"kernel {name} in {dtype} is wrong by {error:.2g}, {bound:.2g} specified", error, bound)
                worst = max(worst, Measure(error, bound), key=lambda m: m.share)
    return worst._replace(detail=", ".join(names))


def _map(values: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    return tuple(change(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


__all__ = ["ESTIMATE_FACTOR", "Inputs", "discovery", "estimates", "kernels", "runs_where_it_says"]

"""Choosing a device: check every candidate, compare estimates, record why."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import attrs

from .capabilities import Code, Refusal, listing
from .context import NO_FRAME, OBJECTIVES, Frame, frame_var, memory_limit, settings
from .device import Basis, Device, Estimate, Fidelity, Provenance, Quantity
from .errors import ContractError, DeviceUnavailableError, UnsupportedError
from .registry import Entry, registry
from .request import AttentionRequest

FORMAT = 1


@attrs.frozen(kw_only=True)
class Policy:
    """How to choose: the wishes of all levels merged.

    Attributes:
        origin: whose word names the devices: "argument", "use", "prefer", "configure", "environment" or "automatic".
        names: devices or backends, in order; empty for automatic. fall_through: whether later names may serve.
        objective: "time", "energy" or "error". allow_simulated, transfer: see `hal_core.use`.
    """

    origin: str = "automatic"
    names: tuple[str, ...] = ()
    fall_through: bool = False
    objective: str = attrs.field(default="time", validator=attrs.validators.in_(OBJECTIVES))
    allow_simulated: bool = False
    transfer: bool | None = None


@attrs.frozen(kw_only=True)
class Candidate:
    """A device as it stood in a decision: every refusal, or its estimate."""

    device: Device
    distribution: str
    refusals: tuple[Refusal, ...] = ()
    estimate: Estimate | None = None
    error: Quantity | None = None
    priority: int = 0
    transfer: bool = False

    def figure(self, objective: str) -> Quantity | None:
        if objective == "error":
            return self.error
        return getattr(self.estimate, objective) if self.estimate else None


@attrs.frozen(kw_only=True)
class Decision:
    """Why a call runs where it runs. Prints as text, travels as JSON, and can be replayed.

    Attributes:
        request: the call. ranked: (len_q, len_k), the bounds that estimates are for. policy: how was chosen.
        chosen: device id; None where nobody can. reason: one sentence. candidates: all that were looked at.
        core: version of the core.
    """

    request: AttentionRequest
    ranked: tuple[int, int]
    policy: Policy
    chosen: str | None
    reason: str
    candidates: tuple[Candidate, ...]
    core: str

    @property
    def origin(self) -> str:
        return self.policy.origin

    @property
    def objective(self) -> str:
        return self.policy.objective

    @property
    def winner(self) -> Candidate:
        """The chosen candidate. Raises UnsupportedError where there is none."""
        for candidate in self.candidates:
            if candidate.device.id == self.chosen:
                return candidate
        raise UnsupportedError(refused_message(self), self)

    def __str__(self) -> str:
        head = f"{self.chosen or 'no device'} for {self.request.describe()}: {self.reason}"
        if self.ranked != (self.request.len_q, self.request.len_k):
            head += f"\n  ranked for lengths up to {self.ranked[0]} x {self.ranked[1]}"
        lines = []
        for candidate in self.candidates:
            mark = "*" if candidate.device.id == self.chosen else " "
            lines.append(f" {mark} {candidate.device.id:12} {candidate.device.fidelity:9} {_figures(candidate)}")
            lines += [f"     {refusal}" for refusal in candidate.refusals]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        plain = attrs.asdict(self, value_serializer=_plain, filter=lambda a, _: a.name != "request")
        return {"format": FORMAT, "request": self.request.to_dict(), **plain}

    def to_json(self, indent: int | None = 2) -> str:
        from json import dumps

        return dumps(self.to_dict(), indent=indent)


def replay(record: Decision | dict[str, Any] | str) -> Decision:
    """Decide the recorded request again, under the recorded policy, with the devices that are here now.

    Args:
        record: a Decision, its `to_dict()`, or its JSON.

    Raises:
        ContractError: not a decision record, or one of a newer format.
    """
    import json

    try:
        data = (
            json.loads(record)
            if isinstance(record, str)
            else record.to_dict()
            if isinstance(record, Decision)
            else record
        )
        if (format := data["format"]) > FORMAT:
            raise ContractError(f"a decision record of format {format} was given: this core reads {FORMAT}; upgrade it")
        request = AttentionRequest.from_dict(data["request"])
        policy = Policy(**{**data["policy"], "names": tuple(data["policy"]["names"])})
        ranked = replace(request, len_q=data["ranked"][0], len_k=data["ranked"][1])
    except ContractError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise ContractError(f"not a decision record ({error!r}): pass what to_json() gave") from error
    return attrs.evolve(decide(ranked, policy), request=request)


def merged_policy(
    backend: str | None, objective: str | None, allow_simulated: bool | None, transfer: bool | None
) -> Policy:
    """The call's arguments over `use` and `prefer`, over `configure`, over HAL_BACKEND, over automatic."""
    argument = Frame("argument", () if backend is None else (backend,), False, objective, allow_simulated, transfer)
    levels = [argument, frame_var.get(), settings.frame]
    if variable := os.environ.get("HAL_BACKEND"):
        levels.append(Frame("environment", (variable,)))
    named = next((level for level in levels if level.names), NO_FRAME)

    def first(field: str, default: Any) -> Any:
        return next((value for level in levels if (value := getattr(level, field)) is not None), default)

    return Policy(
        origin=named.origin,
        names=named.names,
        fall_through=named.fall_through,
        objective=first("objective", "time"),
        allow_simulated=first("allow_simulated", False),
        transfer=first("transfer", None),
    )


def check_all(request: AttentionRequest, device: Device | str, *, transfer: bool = False) -> tuple[Refusal, ...]:
    """Every reason why a device cannot run a request; empty when it can. For composites that hold an inner device."""
    if isinstance(device, str):
        device = registry.find(device)[0]
    return _candidate(request, device, registry.entry(device.id), transfer).refusals


def _candidate(
    request: AttentionRequest, device: Device, entry: Entry, transfer: bool, hardware_only: bool = False
) -> Candidate:
    moved = not device.reads_from(request.device)
    seen = Candidate(device=device, distribution=entry.distribution, priority=entry.spec.priority, transfer=moved)
    if failure := entry.failure or entry.broken.get(device.id):
        offered = f"a backend that fails ({failure.message})"
        return attrs.evolve(
            seen, refusals=(Refusal(Code.UNAVAILABLE, "backend", entry.spec.name, offered, failure.fix),)
        )
    fix = "pass transfer=True, or move the tensors"
    elsewhere = Refusal(Code.PLACEMENT, "device", request.device, listing(device.reads), fix)
    placement = [elsewhere] if moved and not transfer else []
    try:
        backend = registry.backend_of(device)
        capabilities = backend.capabilities(device)
        # A feature's refusals are asked of the device only for what its data allows: check() may rely on that.
        refusals = [*placement, *capabilities.refusals(request)] or list(backend.check(request, device))
        if (
            hardware_only and device.fidelity is not Fidelity.HARDWARE
        ):  # a simulator's estimate may take long: not asked for
            fix = f'pass allow_simulated=True or backend="{device.id}"'
            refusals.append(Refusal(Code.FIDELITY, "fidelity", "hardware", str(device.fidelity), fix))
        if refusals:
            return attrs.evolve(seen, refusals=tuple(refusals))
        estimate, bound = backend.estimate(request, device), capabilities.numerics[request.dtype].relative
        error = estimate.error or Quantity(bound, bound, Basis.DECLARED, Provenance.ASSUMED, "declared numerics")
        return attrs.evolve(seen, refusals=_memory(estimate, device), estimate=estimate, error=error)
    except (Exception, SystemExit) as wrong:  # a broken device must not take the others down
        registry.fail_entry(entry, "check", wrong)
        return _candidate(request, device, entry, transfer, hardware_only)


def _memory(estimate: Estimate, device: Device) -> tuple[Refusal, ...]:
    limit = memory_limit(device.id) or device.memory
    session = registry.opened(device.id)
    in_use = session.memory.stats().in_use if session is not None else 0
    if limit is None or estimate.memory + in_use <= limit:
        return ()
    offered = f"{max(limit - in_use, 0):,} bytes ({in_use:,} in use of a limit of {limit:,})"
    fix = "shorten the request, free buffers, or raise hal.configure(memory_limit=...)"
    return (Refusal(Code.MEMORY, "memory", f"{estimate.memory:,} bytes", offered, fix),)


def decide(request: AttentionRequest, policy: Policy) -> Decision:
    """Look at every candidate and choose. Never raises for a refusal: `Decision.winner` does.

    Raises:
        UnknownBackendError, DeviceUnavailableError: a named device does not exist here.
    """
    from . import __version__

    groups = [_present(name, policy.fall_through) for name in policy.names] or [registry.devices()]
    transfer = policy.transfer if policy.transfer is not None else bool(policy.names)
    candidates, chosen, reason = [], None, "no installed backend has a device"
    for devices in groups:
        hardware_only = not policy.names and not policy.allow_simulated
        seen = [_candidate(request, device, registry.entry(device.id), transfer, hardware_only) for device in devices]
        candidates += seen
        chosen, reason = _choose(request, seen, policy)
        if chosen is not None:
            break
    decision = Decision(
        request=request,
        ranked=(request.len_q, request.len_k),
        policy=policy,
        chosen=chosen,
        reason=reason,
        candidates=tuple(candidates),
        core=__version__,
    )
    for _ in registry.call_each("hal_decision", decision=decision):
        pass
    return decision


def settled(request: AttentionRequest, policy: Policy) -> Decision:
    """`decide`, and the chosen device opened: one that does not open is a refusal from then on."""
    while True:
        decision = decide(request, policy)
        try:
            if decision.chosen is not None:
                registry.session(decision.chosen)
            return decision
        except DeviceUnavailableError:
            continue


def _present(name: str, may_be_absent: bool) -> list[Device]:
    try:
        return registry.find(name)
    except DeviceUnavailableError:
        if may_be_absent:  # a preference passes over a device that is not here
            return []
        raise


def _choose(request: AttentionRequest, candidates: list[Candidate], policy: Policy) -> tuple[str | None, str]:
    able = [candidate for candidate in candidates if not candidate.refusals]
    if not able:
        return None, "no device can" if not policy.names else f"{listing(policy.names)} cannot"
    if policy.names and len(able) == 1:
        return able[0].device.id, f"named by {policy.origin}"
    for plugin, wish in registry.call_each("hal_policy", request=request, candidates=able):
        if wish in [candidate.device.id for candidate in able]:
            return wish, f"chosen by the policy of {plugin}"
        registry.fail_plugin(plugin, "hal_policy", ValueError(f"it chose {wish!r}, which is not among the candidates"))
    return _least(able, policy.objective)


def _least(able: list[Candidate], objective: str) -> tuple[str | None, str]:
    """The smallest figure. The better basis decides between overlapping intervals only."""
    figures = {c.device.id: figure for c in able if (figure := c.figure(objective)) is not None}
    stated = [c for c in able if c.device.id in figures]
    if objective == "energy" and stated:  # simulated joules are never compared with measured ones
        best = min(c.device.fidelity.rank for c in stated)
        stated = [c for c in stated if c.device.fidelity.rank == best]
    if not stated:
        return None, f"no device that can states its {objective}: ask for objective='time'"
    leader = min(stated, key=lambda c: figures[c.device.id].middle)
    rivals = [c for c in stated if figures[c.device.id].overlaps(figures[leader.device.id])]
    winner = min(rivals, key=lambda c: (figures[c.device.id].basis.rank, figures[c.device.id].middle, -c.priority))
    if len(able) == 1:
        return winner.device.id, "the only device that can"
    return winner.device.id, f"least {objective} of {len(stated)}: {_show(figures[winner.device.id], objective)}"


def refused_message(decision: Decision) -> str:
    """The text of an UnsupportedError: every reason of every candidate, and who else could."""
    request, policy = decision.request, decision.policy
    lines = []
    for candidate in decision.candidates:
        what = f" cannot run this attention ({request.describe()}):" if candidate.refusals else f": {decision.reason}"
        lines.append(f"{candidate.device.id}{what}")
        asked = {r: f"{r.wanted} asked, {r.offered} offered" for r in candidate.refusals}
        width, wide = max((len(r.field) for r in asked), default=0), max(map(len, asked.values()), default=0)
        for refusal, text in asked.items():
            fix = f"   -> {refusal.fix}" if refusal.fix else ""
            lines.append(f"  {refusal.field:{width}}   {text:{wide}}{fix}".rstrip())
    if not lines:
        lines.append(f"{decision.reason} ({request.describe()}): install a plugin, for example hal-cpu.")
    others = decide(request, Policy(allow_simulated=True)).candidates if policy.names else ()
    can = ", ".join(c.device.id for c in others if not c.refusals) or "none"
    lines.append(f"Other devices that can: {can}. Nothing was run." if policy.names else "Nothing was run.")
    return "\n".join(lines)


def _figures(candidate: Candidate) -> str:
    if candidate.refusals or candidate.estimate is None:
        return "refused"
    energy = candidate.estimate.energy
    joules = _show(energy, "energy") if energy else "not available"
    moved = ", tensors moved" if candidate.transfer else ""
    return f"time {_show(candidate.estimate.time, 'time')}, energy {joules}{moved}"


def _show(quantity: Quantity, objective: str) -> str:
    scale, unit = {"time": (1e3, " ms"), "energy": (1e3, " mJ"), "error": (1.0, "")}[objective]
    low, high = quantity.low * scale, quantity.high * scale
    interval = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    return f"{interval}{unit} ({quantity.basis}, {quantity.provenance})"


def _plain(_: Any, __: Any, value: Any) -> Any:
    return (
        sorted(value) if isinstance(value, frozenset) else str(value) if isinstance(value, Fidelity | Code) else value
    )

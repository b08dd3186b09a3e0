"""Choosing a device: check every candidate, compare estimates, record why."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import attrs

from .capability import Capabilities, Code, Range, Refusal, listing
from .decision import FORMAT, Candidate, Decision, Policy, PolicyChoice, figure_text
from .device_info import Basis, Device, Fidelity, Provenance, Quantity
from .errors import ContractError, DeviceUnavailableError, PluginError, refuse
from .plans import BlockPlan, TilePlan
from .plugins import failed
from .registry import registry
from .request import AttentionRequest
from .version import __version__

Excluded = dict[str, str]  # device id: why its session does not serve this request


def replay(record: Decision | dict[str, Any] | str) -> Decision:
    """Decide the recorded request again, under the recorded policy, with the devices that are here now.

    Args:
        record: a Decision, its `to_dict()`, or its JSON.

    Raises:
        ContractError: not a decision record, or one of another format, or one with a tiling, which no record can hold.
    """
    try:
        plain = record.to_dict() if isinstance(record, Decision) else record
        data = json.loads(plain) if isinstance(plain, str) else plain
        refuse(
            (
                not 1 <= data["format"] <= FORMAT,
                f"a decision record of format {data['format']} was given: this core reads up to {FORMAT}; upgrade it",
            )
        )
        request = AttentionRequest.from_dict(data["request"])
        options = tuple((name, value) for name, value in data["policy"].get("options") or ())
        policy = Policy(**{**data["policy"], "options": options})
        ranked = replace(request, len_q=data["ranked"][0], len_k=data["ranked"][1])
    except ContractError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ContractError(f"not a decision record ({error!r}): pass what to_json() gave") from error
    return attrs.evolve(decide(ranked, policy), request=request)


def check_all(request: AttentionRequest, device: Device | str, *, transfer: bool = False) -> tuple[Refusal, ...]:
    """Every reason why a device cannot run a request, memory limits apart; empty when it can. Asks for no estimate.

    For composites that hold an inner device, and for bounds of length buckets.
    """
    found = registry.find(device)[0] if isinstance(device, str) else device
    return _candidate(request, found, Policy(transfer=transfer, allow_simulated=True), estimated=False).refusals


def tiling_limits(capabilities: Capabilities) -> dict[str, int]:
    """The bounds that a device sets to block sizes of a tiling: "minimum" and "maximum", where it has them."""
    sizes = capabilities.tile_sizes
    high = sizes.high if isinstance(sizes, Range) else max(sizes, default=0)
    return {name: size for name, size in (("minimum", sizes.next_up(1)), ("maximum", high)) if size}


def cut_request(request: AttentionRequest, tiling: Any, capabilities: Capabilities) -> AttentionRequest:
    """The request with what a tiling makes of it on a device: its block sizes, or its block plan."""
    if tiling is None or request.block_plan is not None:
        return request
    refuse(
        (
            request.packed or request.page_size is not None,
            f"tiling {tiling.name!r} and packed or paged tables were given: use one of them",
        )
    )
    if tiling.needs_content:  # fixes its sizes beforehand
        return replace(request, block_plan=(tiling.block_q, tiling.block_k, tiling.max_blocks))
    plan = tiling.plan(request, tiling_limits(capabilities))
    if isinstance(plan, BlockPlan):
        return replace(request, block_plan=(plan.block_q, plan.block_k, plan.indices.shape[-1]))
    return replace(request, tiling=(tiling.name, plan.block_q, plan.block_k))


def checked_plan(
    tiling: Any, request: AttentionRequest, *, capabilities: Capabilities, **content: Any
) -> TilePlan | BlockPlan:
    """A tiling's plan within the device's bounds, its tiles checked for coverage. `content`: query and key, where the
    tiling reads them.
    """
    plan: TilePlan | BlockPlan = tiling.plan(request, tiling_limits(capabilities), **content)
    if isinstance(plan, TilePlan):
        plan.check(tiling.name)
    return plan


def plan_text(request: AttentionRequest, decision: Decision) -> str:
    """How the chosen device cuts the work at the exact lengths; "" where no device was chosen or nothing is cut."""
    if decision.chosen is None or request.block_plan is not None or request.packed or request.page_size is not None:
        return ""
    capabilities = registry.backend_of(decision.chosen).capabilities(decision.winner.device)
    brought = decision.policy.tiling
    cut, tiling = cut_request(request, brought, capabilities), brought or registry.session(decision.chosen).tiling
    return (
        f"{checked_plan(tiling, cut, capabilities=capabilities)} ({tiling.name})"
        if cut.block_plan is None
        else "blocks of {} x {}, at most {} a row, by {}".format(*cut.block_plan, tiling.name)
    )


def _candidate(
    request: AttentionRequest, device: Device, policy: Policy, *, estimated: bool = True, excluded: str = ""
) -> Candidate:
    """The device under a policy over all levels; its session does not serve the request where `excluded` says why."""
    entry, moved = registry.entry(device.id), not device.reads_from(request.device)
    seen = Candidate(device=device, distribution=entry.distribution, priority=entry.spec.priority, transfer=moved)

    def refused(code: Code, field: str, wanted: str, offered: str, fix: str) -> Candidate:
        return attrs.evolve(seen, refusals=(Refusal(code, field, wanted, offered, fix),))

    unavailable = partial(refused, Code.UNAVAILABLE, "backend", entry.spec.name)
    free = estimated and (policy.fall_through or not policy.names)  # to choose another device
    if failure := entry.failure or entry.broken.get(device.id) or (registry.avoided.get(device.id) if free else None):
        return unavailable(f"a backend that fails ({failure.message})", failure.fix)
    if excluded:
        return unavailable(f"a session that does not serve it ({excluded})", f"upgrade {entry.distribution or 'it'}")
    if denied := registry.access.why_not("devices", device.id, device.fidelity is not Fidelity.HARDWARE):
        return refused(Code.ACCESS, "access", device.id, denied, "ask whoever keeps the access policy")
    try:
        backend = registry.backend_of(device)
        capabilities = backend.capabilities(device)
        request = cut_request(request, policy.tiling, capabilities)
        refusals = capabilities.refusals(request)
        if moved and not (bool(policy.names) if policy.transfer is None else policy.transfer):
            offered, fix = listing(device.reads), "pass transfer=True, or move the tensors"
            refusals.insert(0, Refusal(Code.PLACEMENT, "device", request.device, offered, fix))
        # A feature's refusals are asked of the device only for what its data allows: check() may rely on that.
        refusals = refusals or list(backend.check(request, device))
        if wrong := [r for r in refusals if not isinstance(r, Refusal)]:
            raise PluginError(f"check() of {device.id} gave {wrong[0]!r}: give Refusal records")
        # A simulator's estimate may take long: it is not asked for where only hardware may serve.
        if not (policy.names or policy.allow_simulated or device.fidelity is Fidelity.HARDWARE):
            fix = f'pass allow_simulated=True or backend="{device.id}"'
            refusals.append(Refusal(Code.FIDELITY, "fidelity", "hardware", str(device.fidelity), fix))
        if refusals or not estimated:
            return attrs.evolve(seen, refusals=tuple(refusals))
        estimate, bound = backend.estimate(request, device), capabilities.numerics[request.dtype].relative
        error = estimate.error or Quantity(bound, bound, Basis.DECLARED, Provenance.ASSUMED, "declared numerics")
        seen = attrs.evolve(seen, estimate=estimate, error=error)
        most = registry.access.rule("seconds")
        if most is not None and estimate.time.middle > most:
            offered = f"{most:g} s, which the access policy allows a call"
            return refused(Code.ACCESS, "seconds", f"{estimate.time.middle:.3g} s", offered, "shorten the request")
        limit, session = registry.memory_limit(device.id) or device.memory, entry.sessions.get(device.id)
        in_use = session.memory.stats().in_use if session is not None else 0
        if limit is None or estimate.memory + in_use <= limit:
            return seen
        seen = attrs.evolve(seen, limit=(in_use, limit))
        return refused(
            Code.MEMORY,
            "memory",
            f"{estimate.memory:,} bytes",
            f"{max(limit - in_use, 0):,} bytes ({in_use:,} in use of a limit of {limit:,})",
            "shorten the request, free buffers, or raise hal.configure(memory_limit=...) or the access policy's limit",
        )
    except ContractError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        failure = failed(entry.spec.name, entry.distribution, "check", error)
        entry.request_failures[device.id] = failure  # of this request: the next one is asked afresh
        seen = attrs.evolve(seen, provisional=True)
        return unavailable(f"a backend that failed on this request ({failure.message})", failure.fix)


def decide(request: AttentionRequest, policy: Policy, excluded: Excluded | None = None) -> Decision:
    """Check every candidate and choose. Never raises for a refusal: `Decision.winner` does.

    Args:
        request: the call. policy: merged over all levels. excluded: devices whose session does not serve it, and why.

    Raises:
        UnknownBackendError, DeviceUnavailableError: a named device does not exist here.
    """
    candidates: list[Candidate] = []
    choice = PolicyChoice(None, reason="no installed backend has a device")
    # A preference passes over a device that is not here.
    named = [registry.find(name, may_be_absent=policy.fall_through) for name in policy.names]
    for devices in named or [registry.devices()]:
        seen = [_candidate(request, d, policy, excluded=(excluded or {}).get(d.id, "")) for d in devices]
        candidates += seen
        choice = _choose(request, seen, policy)
        if choice.device is not None:
            break
    asked = {candidate.device.id for candidate in candidates}
    left = [d for d in registry.devices() if d.id not in asked] if choice.device is None and policy.names else []
    decision = Decision(
        request=request,
        ranked=(request.len_q, request.len_k),
        policy=policy if choice.tiling is None else attrs.evolve(policy, tiling=choice.tiling),
        chosen=choice.device,
        reason=choice.reason,
        candidates=tuple(candidates),
        core=__version__,
        others=tuple(device.id for device in left if not check_all(request, device)),
        seconds=0.0 if any(c.provisional for c in candidates) else None if choice.seconds < 0 else choice.seconds,
        expired=choice.expired,
    )
    list(registry.call_each("hal_decision", decision=decision))
    return decision


def settled(request: AttentionRequest, policy: Policy, excluded: Excluded | None = None) -> Decision:
    """`decide`, and the chosen device opened: one that does not open is a refusal from then on."""
    decision = decide(request, policy, excluded)
    try:
        if decision.chosen is not None:
            registry.session(decision.chosen)
        return decision
    except DeviceUnavailableError:
        return settled(request, policy, excluded)


def _choose(request: AttentionRequest, candidates: list[Candidate], policy: Policy) -> PolicyChoice:
    able = [candidate for candidate in candidates if not candidate.refusals]
    if not able:
        return PolicyChoice(None, reason=f"{listing(policy.names)} cannot" if policy.names else "no device can")
    if policy.names and len(able) == 1:
        return PolicyChoice(able[0].device.id, reason=f"named by {policy.origin}")
    for plugin, answer in registry.call_each("hal_policy", request=request, candidates=able, policy=policy):
        choice = answer if isinstance(answer, PolicyChoice) else PolicyChoice(answer)
        if choice.device in [candidate.device.id for candidate in able]:
            return choice._replace(reason=f"chosen by the policy of {plugin}{choice.reason and f': {choice.reason}'}")
        registry.plugins.fail(
            plugin, "hal_policy", ValueError(f"it chose {answer!r}, which is not among the candidates")
        )
    return _least(able, policy.objective or "time")


def _least(able: list[Candidate], objective: str) -> PolicyChoice:
    """The smallest figure. The better basis decides between overlapping intervals only."""
    stated = [(c, figure) for c in able if (figure := c.figure(objective)) is not None]
    if not stated:
        return PolicyChoice(None, reason=f"no device that can states its {objective}: ask for objective='time'")
    if objective == "energy":  # simulated joules are never compared with measured ones
        best = min(c.device.fidelity.rank for c, _ in stated)
        stated = [(c, figure) for c, figure in stated if c.device.fidelity.rank == best]
    least = min((figure for _, figure in stated), key=lambda figure: figure.middle)
    rivals = [(c, figure) for c, figure in stated if figure.overlaps(least)]
    winner, figure = min(rivals, key=lambda rival: (rival[1].basis.rank, rival[1].middle, -rival[0].priority))
    why = f"least {objective} of {len(stated)}: {figure_text(figure, objective)}"
    return PolicyChoice(winner.device.id, reason="the only device that can" if len(able) == 1 else why)

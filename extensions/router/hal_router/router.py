"""The policy behind `hal.attention`: decisions from beliefs, and beliefs from what the calls took."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from hal_core import AttentionRequest, Candidate, Code, Decision, Fidelity, Policy, PolicyChoice
from hal_core.plugin_api import registry, tiling_limits

from .breaker import Breakers
from .choice import Arm, Choice, Chooser
from .estimator import NOTICED_LOAD, Believed, Estimator
from .keys import Keys
from .objective import deadline_var

#: Calls of one decision that are averaged before they are learned from, and the innovation that is learned at once.
BATCH, SURPRISE = 64, 0.25
#: Measured over believed time of a call that is averaged with others.
LOW, HIGH = 0.7, 1.4
#: The same of a decision's first call that is learned from at once.
FAR = 3.0
#: An arm is left for another one that is believed faster by more than this, in log seconds.
CLOSE = 0.03
#: Calls between looks at whether a cached decision should be made anew, to explore.
LOOK = 8
#: Tilings of a device that are tried beside its own, and how much slower they are believed to be at first.
MOST_TILINGS, HANDICAP = 4, 1.1
#: Host time of a call that does not shrink with its lengths, where the estimate names none.
_FIXED = 20e-6
#: Estimated seconds below which no other tiling is tried: the host's part of a call is most of it.
_TILED_FROM = 2 * _FIXED
_RANKS = {fidelity: fidelity.rank for fidelity in Fidelity}
_SIMULATED, _DEVICE = Fidelity.SIMULATED, Code.DEVICE
_SECONDS_BETWEEN_SAVES = 60.0


class Slot:
    """What a decision was made from, kept with it: `hal_call` learns here, and `expired` ends the decision.

    Attributes:
        expected: log seconds believed for the lengths that the decision was made for. stale: to be decided anew.
        per_second: 1 / the seconds believed, for the lengths of the newest calls. most: calls that may be averaged.
        others: [device, log seconds believed] of the arms that were not chosen. known: the arm's residual, and the
            estimator's version that it is of. keys: None, and with it no belief, until an only arm is called again.
        tiled: whether the devices' own tilings were asked for, which takes longer than a decision. free: whether its
            caller may be explored with. waited: calls before it was known what to learn by. odd: of a newest call
            of unusual time, whether it took longer than was believed.
    """

    arm: Arm
    arms: Sequence[Arm] = ()
    keys: Any = None
    others: Sequence[list[Any]] = ()
    explored = stale = tiled = False
    free = True
    odd: bool | None = None
    pending, pending_sum, most, waited, per_second = 0, 0.0, 0, 0, 0.0
    expected: float
    best: float
    known: tuple[int, Believed]

    def __init__(self, request: AttentionRequest, deadline: float | None, arms: Sequence[Arm] = ()) -> None:
        self.lengths, self.deadline, self.arms = (request.len_q, request.len_k), deadline, arms

    def fill(self, keys: Keys, choice: Choice, version: int) -> Slot:
        """Take what was chosen, and what is believed of it."""
        chosen = choice.chosen
        self.keys, self.arm, self.best, self.pending = keys, chosen.arm, choice.best.log_seconds, 0
        self.known, self.explored = (version, chosen.believed), bool(choice.why)
        self.others = [[each.arm.device, each.log_seconds] for each in choice.ranked if each is not chosen]
        self.expected, self.per_second = chosen.log_seconds, math.exp(-chosen.log_seconds)
        return self

    def expired(self) -> bool:
        """Whether the decision is to be made anew."""
        return self.stale or deadline_var.get() != self.deadline

    def believe(self, log_seconds: float) -> None:
        """Take another belief of what a call takes at the decision's lengths."""
        if log_seconds != self.expected:
            self.per_second *= math.exp(self.expected - log_seconds)
            self.expected = log_seconds

    def shift(self, device: str, change: float) -> None:
        """Take a change of a device's load, in log seconds, without asking the estimator again."""
        if self.arm.device == device:
            self.believe(self.expected + change)
        for other in self.others:
            if other[0] == device:
                other[1] += change
        self.compare()

    def compare(self) -> None:
        """Stale where another arm is believed better by more than a little."""
        if self.others and not self.explored:
            self.best = min(self.expected, min(seconds for _, seconds in self.others))
            self.stale = self.stale or self.expected > self.best + CLOSE

    def scale(self, len_q: int, len_k: int) -> float:
        """1 / the seconds believed for calls of these lengths, from now on: the part that is not fixed goes with the
        pairs of query and key.
        """
        seconds = math.exp(self.expected)
        fixed = min(_FIXED, seconds)
        pairs = len_q * len_k / max(self.lengths[0] * self.lengths[1], 1)
        self.per_second = 1.0 / max(fixed + (seconds - fixed) * pairs, 1e-12)
        return self.per_second


class Router:
    """Beliefs, breakers, and the decisions in force. Thread-safe.

    Attributes:
        chooser: the beliefs. breakers: by device. totals: calls and seconds, those beyond what was
            believed of the best other arm included, by device.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.chooser, self.breakers = Chooser(Estimator()), Breakers(clock)
        self.totals: dict[str, list[float]] = {}  # calls, seconds, regret, explored calls, explored seconds
        self.on_save: Callable[[], object] | None = None
        self._lock, self._clock, self._saved = threading.RLock(), clock, clock()
        self._slots: dict[Keys, Slot] = {}  # the newest of each shape
        self._named: dict[int, tuple[Decision, Slot]] = {}
        self._loads: dict[str, float] = {}
        self._tilings, self._cut = dict[tuple[str, Keys], list[Any]](), set[str]()  # devices that have any
        self._next_look, self._warm = LOOK, set[tuple[str, str]]()
        self._learned: list[Slot] = []  # since decisions were last looked at

    # Choosing

    def policy(self, request: AttentionRequest, candidates: Sequence[Candidate], policy: Policy) -> PolicyChoice | None:
        """The hook `hal_policy`. The core asks it only where the caller left a choice."""
        deadline = deadline_var.get()
        timed = deadline is None and policy.objective in (None, "time")
        if timed and len(candidates) == 1 and self._plain(request, candidates):
            # Needs no belief to be chosen; what it is to be learned by is found when it is called again.
            device = candidates[0].device.id
            return PolicyChoice(device, -1.0, "the only device that can", None, Slot(request, None).expired)
        keys = Keys.of(request)
        if timed and (stated := self._plain(request, candidates, keys)) is not None:
            with self._lock:
                quick = self.chooser.quick(keys, stated)
            if quick is not None:
                slot = Slot(request, None)
                slot.per_second, slot.most = 1.0 / quick[1], 1
                return PolicyChoice(quick[0], -1.0, quick[2], None, slot.expired)
        arms, objective = self._arms(keys, candidates, policy, timed=timed), policy.objective or "time"
        if not arms:
            return None
        with self._lock:
            free = is_free(request, policy)
            found = self.chooser.choose(keys, arms, objective, deadline, may_explore=free)
            slot = Slot(request, deadline, arms).fill(keys, found, self.chooser.estimator.version)
            slot.free = free
            if len(self._slots) >= 1024:
                self._slots.clear()
            self._slots[keys] = slot
        arm = found.chosen.arm
        return PolicyChoice(arm.device, -1.0, explained(found), arm.tiling, slot.expired)

    def _plain(
        self, request: AttentionRequest, candidates: Sequence[Candidate], keys: Keys | None = None
    ) -> list[tuple[str, float]] | None:
        """(device, its estimate) of candidates that are learned from and have no tilings for such a request that are
        known; None where there are others.
        """
        found = list[tuple[str, float]]()
        for candidate in candidates:
            estimate, device = candidate.estimate, candidate.device
            if estimate is None or device.fidelity is _SIMULATED:
                return None
            name, time = device.id, estimate.time
            seconds = math.sqrt(time.low * time.high) or time.middle
            if seconds >= _TILED_FROM and name in self._cut:
                keys = keys or Keys.of(request)
                if self._tilings.get((name, keys)):
                    return None
            found.append((name, seconds))
        return found

    def _arms(self, keys: Keys, candidates: Sequence[Candidate], policy: Policy, *, timed: bool) -> list[Arm]:
        """Devices that state a time, and their tilings as far as those are known. timed: nothing but time counts."""
        found = list[Arm]()
        for candidate in candidates:
            estimate, device = candidate.estimate, candidate.device
            if estimate is None:
                continue
            name, time, learns = device.id, estimate.time, device.fidelity is not _SIMULATED
            arm = Arm(name, name, math.sqrt(time.low * time.high) or time.middle, None, 0, 0.0, learns)
            if not timed:
                energy, error = estimate.energy, candidate.error
                arm = arm._replace(
                    energy=None if energy is None else energy.middle,
                    energy_rank=_RANKS[device.fidelity],
                    error=0.0 if error is None else error.middle,
                )
            found.append(arm)
            if learns and arm.seconds >= _TILED_FROM and policy.tiling is None and not candidate.transfer:
                for tiling in self._tilings.get((name, keys), ()):
                    found.append(
                        arm._replace(name=f"{name} {tiling.name}", seconds=arm.seconds * HANDICAP, tiling=tiling)
                    )
        return found

    def arms(self, request: AttentionRequest, candidates: Sequence[Candidate], policy: Policy) -> list[Arm]:
        """Devices that state a time, and their tilings where the caller brings none and the device's own is used."""
        keys = Keys.of(request)
        for candidate in candidates if policy.tiling is None else ():
            estimate, device = candidate.estimate, candidate.device
            if estimate is None or candidate.transfer or device.fidelity is _SIMULATED:
                continue
            opened = device.id in registry.entry(device.id).sessions  # which alone has tilings
            if estimate.time.high >= _TILED_FROM and opened and (device.id, keys) not in self._tilings:
                if len(self._tilings) > 4096:
                    self._tilings.clear()
                found = self._tilings[device.id, keys] = tilings(request, candidate)
                self._cut |= {device.id} if found else set()
        return self._arms(keys, candidates, policy, timed=False)

    # Learning

    def call(self, decision: Decision, seconds: float, operands: tuple[Any, ...] | None) -> None:
        """The hook `hal_call`: called after every call, so it does next to nothing for an expected time."""
        expired: Any = decision.expired
        try:
            slot: Slot = expired.__self__
            ratio = seconds * slot.per_second
        except AttributeError:
            slot = self._slot_of(decision)
            ratio = seconds * slot.per_second
        usual = LOW < ratio < HIGH
        if usual:
            slot.odd = None
        elif slot.keys is not None:
            if operands is not None:  # perhaps of other lengths than the call before
                ratio = seconds * slot.scale(operands[0].shape[2], operands[1].shape[2])
                usual = LOW < ratio < HIGH
            if not usual and slot.most > 1 and not slot.others and slot.odd is not (ratio > 1.0):
                # Where there is no choice one alone says little, as a call that was interrupted: two on one side do.
                slot.odd, usual, ratio = ratio > 1.0, True, min(max(ratio, LOW), HIGH)
        if usual and slot.pending < slot.most:
            slot.pending += 1
            slot.pending_sum += ratio
        elif slot.keys is not None or self._meet(slot, decision, seconds):
            self._learn(slot, math.log(max(seconds * slot.per_second, 1e-9)))
            if not slot.tiled:
                self._tile(slot, decision)

    def _slot_of(self, decision: Decision) -> Slot:
        """The slot of a decision of this policy, or one made for a decision that was none of its: named devices teach
        too.
        """
        slot = getattr(decision.expired, "__self__", None)
        if isinstance(slot, Slot):
            return slot
        with self._lock:
            kept = self._named.get(id(decision))
            if kept is None or kept[0] is not decision:
                winner, request = decision.winner, decision.request
                keys = Keys.of(request)
                [arm] = self.arms(request, [winner], decision.policy)[:1] or [
                    Arm(winner.device.id, winner.device.id, 1.0)
                ]
                if decision.policy.tiling is not None:
                    arm = arm._replace(name=f"{arm.device} {decision.policy.tiling.name}")
                found = self.chooser.choose(keys, [arm])
                kept = (decision, Slot(request, None, [arm]).fill(keys, found, self.chooser.estimator.version))
                kept[1].tiled = True
                if len(self._named) > 1024:
                    self._named.clear()
                self._named[id(decision)] = kept
            return kept[1]

    def _meet(self, slot: Slot, decision: Decision, seconds: float) -> bool:
        """Find what a decision that was made quickly is to be learned by. True where this call is to be learned.

        Its first call holds checks of the core and says little, unless it took far from what was expected; nor does the
        second where nothing was expected.
        """
        slot.waited += 1
        quick, far = slot.per_second > 0, not 1 / FAR < seconds * slot.per_second < FAR
        if slot.waited + slot.pending < 2 and not (quick and far):
            return False
        request, policy = decision.request, decision.policy
        self.breakers.succeeded(decision.chosen or "")
        with self._lock:
            keys = Keys.of(request)
            able = [candidate for candidate in decision.candidates if not candidate.refusals]
            arms, slot.tiled, slot.free = self.arms(request, able, policy), True, is_free(request, policy)
            found = self.chooser.choose(keys, arms, may_explore=False)
            own = next(each for each in found.ranked if each.arm.name == decision.chosen)
            slot.arms, slot.stale = arms, own.log_seconds > found.best.log_seconds + CLOSE
            self._slots[keys] = slot.fill(keys, found._replace(chosen=own), self.chooser.estimator.version)
        return quick

    def _tile(self, slot: Slot, decision: Decision) -> None:
        """Let the tilings of the devices be arms, where they are not yet: to be tried from the next decision on."""
        slot.tiled = True
        if slot.deadline is None and slot.arm.tiling is None and decision.policy.tiling is None:
            able = [candidate for candidate in decision.candidates if not candidate.refusals]
            with self._lock:
                arms = self.arms(decision.request, able, decision.policy)
                if len(arms) > len(slot.arms):
                    slot.arms = arms
                    self._refresh(slot)

    def _learn(self, slot: Slot, off: float) -> None:
        with self._lock:
            device = slot.arm.device
            self.breakers.succeeded(device)
            # The first call of a session compiles, allocates and warms up: what it takes beyond belief is not learned.
            place, slot.most = (slot.arm.name, slot.keys.kind), 0 if slot.explored else self._patience([slot])
            if place not in self._warm and off > SURPRISE and slot.arm.learns:
                self._warm.add(place)
                self.chooser.calls += 1
                self.chooser.served += math.exp(slot.expected + off)
                if slot.explored:
                    self.chooser.spent += math.exp(slot.expected + off) - math.exp(slot.best)
                return
            self._warm.add(place)
            calls, mean = slot.pending + 1, off
            if slot.pending:
                mean = (slot.pending * math.log(slot.pending_sum / slot.pending) + off) / calls
            slot.pending, slot.pending_sum = 0, 0.0
            measured = slot.expected + mean
            version, believed = slot.known
            before = believed if version == self.chooser.estimator.version else None
            self.chooser.observe(slot.keys, slot.arm, slot.best, measured, slot.explored, calls, before)
            if not slot.arm.learns:
                return
            total = self.totals.setdefault(device, [0, 0.0, 0.0, 0, 0.0])
            seconds = math.exp(measured)
            best = math.exp(min((log_seconds for _, log_seconds in slot.others), default=measured))
            total[0], total[1] = total[0] + calls, total[1] + calls * seconds
            total[2] += calls * max(seconds - best, 0.0)
            if slot.explored:
                total[3], total[4] = total[3] + calls, total[4] + calls * max(seconds - best, 0.0)
            self._reconsider(slot, mean)
        if self._clock() - self._saved > _SECONDS_BETWEEN_SAVES and self.on_save is not None:
            self._saved = self._clock()
            threading.Thread(target=self.on_save, name="hal-router-save", daemon=True).start()

    def _patience(self, slots: list[Slot]) -> int:
        """Calls that may be averaged: few while something is explored or a device is loaded and there is a choice."""
        if not any(slot.others for slot in slots):
            return BATCH
        chooser = self.chooser
        watching = chooser.calls < 64 or any(load.value > NOTICED_LOAD for load in chooser.estimator.loads.values())
        return LOOK if watching else BATCH

    def _reconsider(self, slot: Slot, off: float) -> None:
        """End decisions that beliefs no longer hold up: this one, or all where the load of a device has changed."""
        device, chooser = slot.arm.device, self.chooser
        load = chooser.estimator.load(device).value
        change = load - self._loads.get(device, 0.0)
        if slot.explored:
            slot.stale = True
        # An only arm's time that was as expected changes nothing.
        if slot.others or abs(off) > SURPRISE:
            self._refresh(slot)
        if abs(change) > 0.2:
            self._loads[device] = load
            looked = [each for each in self._slots.values() if each is not slot and each.deadline is None]
            most = self._patience(looked)
            for each in looked:
                each.shift(device, change)
                each.most = min(each.most, most) if each.others else each.most
        if slot.others and slot.deadline is None:
            self._learned.append(slot)
        if chooser.calls >= self._next_look:
            self._next_look = chooser.calls + LOOK
            learned, self._learned = self._learned, []
            for each in learned:
                if each.free and not each.stale and self._slots.get(each.keys) is each:
                    choice = chooser.choose(each.keys, each.arms)
                    if choice.why and choice.chosen.arm.name != each.arm.name:
                        each.stale = True
                        break

    def _refresh(self, slot: Slot) -> None:
        """What is believed of a slot's arms now."""
        if slot.deadline is not None:
            return
        ranked = self.chooser.rank(slot.keys, slot.arms)
        own = next(each for each in ranked if each.arm.name == slot.arm.name)
        slot.others = [[each.arm.device, each.log_seconds] for each in ranked if each is not own]
        slot.known = (self.chooser.estimator.version, own.believed)
        slot.believe(own.log_seconds)
        slot.compare()

    def error(self, decision: Decision, error: Exception) -> None:
        """The hook `hal_error`."""
        if decision.chosen is not None:
            self.breakers.failed(decision.chosen, error)

    def decided(self, decision: Decision) -> None:
        """The hook `hal_decision`: devices that refuse by their own state, a hot chip say, are shown with breakers."""
        known = self.breakers.by_device
        for candidate in decision.candidates:
            refusals = candidate.refusals
            if refusals and refusals[0].code is _DEVICE and refusals[0].field == "state":
                self.breakers.hold(candidate.device.id, str(refusals[0]))
            elif known and candidate.device.id in known:
                self.breakers.hold(candidate.device.id, "")


def is_free(request: AttentionRequest, policy: Policy) -> bool:
    """Whether a caller may be explored with: not one who named devices, even several, or who bounds the error."""
    return not policy.names and request.max_error is None and not request.deterministic


def explained(choice: Choice) -> str:
    """Why an arm was chosen, with what was believed of it and of the next best."""
    chosen = choice.chosen
    if not choice.why:
        others = [each.text() for each in choice.ranked[:3] if each is not chosen][:2]
        behind = f"; before {', '.join(others)}" if others else ""
        return f"{choice.aim} believed: {chosen.text()}{behind}"
    return f"exploring, {choice.why}: {chosen.text()}; best is {choice.best.text()}"


def tilings(request: AttentionRequest, candidate: Candidate) -> list[Any]:
    """Up to `MOST_TILINGS` choices of an open device's own tiling, where the device itself cuts this request."""
    device = candidate.device
    plain = request.tiling is None and request.block_plan is None and not request.packed and request.page_size is None
    session: Any = registry.entry(device.id).sessions.get(device.id) if plain and not request.grads else None
    choices = getattr(session and session.tiling, "choices", None)
    if choices is None or not request.len_q or not request.len_k:
        return []
    capabilities = registry.backend_of(device).capabilities(device)
    if 0 not in capabilities.tile_sizes and not tiling_limits(capabilities):
        return []
    if getattr(session.tiling.plan(request, {}), "cut_by", "") not in (device.family, session.tiling.cut_by):
        return []  # torch or a driver cuts: another tiling would be another kernel
    offered = [
        one
        for one in choices(request, tiling_limits(capabilities))[1:]
        if one.block_q in capabilities.tile_sizes
        and one.block_k in capabilities.tile_sizes
        and one.block_q <= request.len_q
        and one.block_k <= request.len_k
    ]
    step = max(len(offered) // MOST_TILINGS, 1)
    return offered[::step][:MOST_TILINGS]

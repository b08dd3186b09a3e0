"""Why a call runs where it runs, as data: the policy that chose, every candidate, and the decision. Nothing here
decides.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import attrs

from .capability import Code, Refusal
from .device_info import Device, Estimate, Fidelity, Quantity, Record
from .errors import MemoryLimitError, UnsupportedError, refuse
from .request import AttentionRequest

FORMAT = 2
OBJECTIVES = ("time", "energy", "error")


def _identity(tiling: Any) -> tuple[type, str] | None:
    return None if tiling is None else (type(tiling), tiling.name)


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen(cache_hash=True)
class Policy:
    """How to choose. A level of overrides leaves fields at None; `merged` over all levels, none is None but transfer.

    Attributes:
        origin: which level names the devices: "argument", "use", "prefer", "configure", "environment" or "automatic".
        names: devices or backends, in order; empty for automatic. fall_through: whether later names may serve.
        objective: "time", "energy" or "error". allow_simulated, transfer, options, tiling: see `hal_core.use`.
        caller: see `hal_core.caller`.
    """

    origin: str = "automatic"
    names: tuple[str, ...] = attrs.field(default=(), converter=_texts)
    fall_through: bool = False
    objective: str | None = None
    allow_simulated: bool | None = None
    transfer: bool | None = None
    options: tuple[tuple[str, Any], ...] | None = None
    tiling: Any = attrs.field(default=None, eq=_identity)  # equal names of one type give equal plans
    caller: str | None = None

    def __attrs_post_init__(self) -> None:
        flags = {"allow_simulated": self.allow_simulated, "transfer": self.transfer}
        refuse(
            *(
                (type(flag) not in (bool, type(None)), f"{name}={flag!r} was given: use True, False or None")
                for name, flag in flags.items()
            ),
            (
                self.objective is not None and self.objective not in OBJECTIVES,
                f"objective {self.objective!r} was given: use 'time', 'energy' or 'error'",
            ),
            (
                self.tiling is not None and not isinstance(getattr(self.tiling, "name", None), str),
                f"tiling {self.tiling!r} was given: pass a TilingStrategy, which has a name and a plan()",
            ),
        )

    @property
    def key(self) -> str:
        """A text that two policies share only if they mean the same; "" for no overrides at all."""
        plain = attrs.astuple(self, filter=lambda a, _: a.name != "tiling")
        return "" if self == NO_POLICY else f"{plain} {_identity(self.tiling)}"

    def over(self, outer: "Policy") -> "Policy":
        """This level's overrides, and the outer level's where this one has none."""
        named = self if self.names else outer
        changes: dict[str, Any] = {f: getattr(outer, f) for f in _INHERITED if getattr(self, f) is None}
        return attrs.evolve(self, origin=named.origin, names=named.names, fall_through=named.fall_through, **changes)


NO_POLICY = Policy()
_INHERITED = ("objective", "allow_simulated", "transfer", "options", "tiling", "caller")


class PolicyChoice(NamedTuple):
    """What a `hal_policy` hook may return instead of a device id.

    Attributes:
        device: the id of a candidate; None, of the core itself: none can. seconds: for how long the decision may be
            reused; 0: ask again at the next call; below 0: for as long as devices and settings stay.
        reason: one sentence for `explain`. tiling: a `TilingStrategy` of the device's own `choices` that cuts the work.
        expired: asked at every call that would reuse the decision, in place of `seconds`; True: ask the policy again.
    """

    device: str | None
    seconds: float = -1.0
    reason: str = ""
    tiling: Any = None
    expired: Callable[[], bool] | None = None


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class Candidate(Record):
    """A device as it stood in a decision: every refusal, or its estimate."""

    device: Device
    distribution: str
    refusals: tuple[Refusal, ...] = ()
    estimate: Estimate | None = None
    error: Quantity | None = None
    priority: int = 0
    transfer: bool = False
    limit: tuple[int, int] | None = None  # bytes in use and the limit, where memory alone refuses
    provisional: bool = False  # the backend failed on this request: ask it again at the next call

    def figure(self, objective: str) -> Quantity | None:
        return self.error if objective == "error" else getattr(self.estimate, objective, None)

    @property
    def figures(self) -> str:
        """Time and energy as text, or that it is refused."""
        if self.refusals or self.estimate is None:
            return "refused"
        joules = figure_text(self.estimate.energy, "energy") if self.estimate.energy else "not available"
        moved = ", tensors moved" if self.transfer else ""
        return f"time {figure_text(self.estimate.time, 'time')}, energy {joules}{moved}"


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class Decision(Record):
    """Why a call runs where it runs. Prints as text, travels as JSON, and can be replayed.

    Attributes:
        request: the call. ranked: (len_q, len_k), the bounds that estimates are for. policy: how the choice was made.
        chosen: device id; None where no device can. reason: one sentence. candidates: every device that was considered.
        core: version of the core. others: devices that were not asked for and could run the request.
        seconds: for how long the decision may be reused; None for as long as devices and settings stay.
        expired: whether a policy wants to be asked again; None where it does not say. No part of the record.
        plan: the cut of the work at the exact lengths, as text; "" where it was not asked for.
    """

    request: AttentionRequest
    ranked: tuple[int, int]
    policy: Policy
    chosen: str | None
    reason: str
    candidates: tuple[Candidate, ...]
    core: str
    others: tuple[str, ...] = ()
    seconds: float | None = None
    plan: str = ""
    expired: Callable[[], bool] | None = None

    @property
    def origin(self) -> str:
        return self.policy.origin

    @property
    def objective(self) -> str:
        return self.policy.objective or "time"

    @property
    def winner(self) -> Candidate:
        """The chosen candidate. Raises UnsupportedError where there is none, MemoryLimitError where memory alone
        refuses.
        """
        for candidate in self.candidates:
            if candidate.device.id == self.chosen:
                return candidate
        if self.policy.names and len(self.candidates) == 1 and (limit := self.candidates[0].limit) is not None:
            estimate = self.candidates[0].estimate
            raise MemoryLimitError(self.candidates[0].device.id, estimate.memory if estimate else 0, *limit, self)
        raise UnsupportedError(self.refusal_text(), self)

    def __str__(self) -> str:
        lines = [f"{self.chosen or 'no device'} for {self.request.describe()}: {self.reason}"]
        if self.ranked != (self.request.len_q, self.request.len_k):
            lines.append(f"  ranked for lengths up to {self.ranked[0]} x {self.ranked[1]}")
        lines += [f"  {self.plan}"] if self.plan else []
        shown, folded = self._folded()
        for candidate in shown:
            mark = "*" if candidate.device.id == self.chosen else " "
            how = (candidate.estimate.time.source,) if mark == "*" and candidate.estimate else ()
            lines += [
                f" {mark} {candidate.device.id:12} {candidate.device.fidelity:9} {candidate.figures}",
                *(f"     {text}" for text in (*candidate.refusals, *how)),
            ]
        return "\n".join([*lines, *(f"   {line}" for line in folded)])

    def refusal_text(self) -> str:
        """The text of an UnsupportedError: every reason of every candidate, and which other devices could."""
        described, lines = self.request.describe(), list[str]()
        shown, folded = self._folded()
        for candidate in shown:
            what = f" cannot run this attention ({described}):" if candidate.refusals else f": {self.reason}"
            rows = [(r.field, f"{r.wanted} asked, {r.offered} offered", r.fix) for r in candidate.refusals]
            width, wide = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
            lines.append(f"{candidate.device.id}{what}")
            lines += [f"  {f:{width}}   {text:{wide}}{fix and f'   -> {fix}'}".rstrip() for f, text, fix in rows]
        if not self.candidates:
            lines.append(f"{self.reason} ({described}): install a plugin, for example hal-cpu.")
        can = f"Other devices that can: {', '.join(self.others) or 'none'}. " if self.policy.names else ""
        return "\n".join([*lines, *folded, f"{can}Nothing was run."])

    def _folded(self) -> tuple[list[Candidate], list[str]]:
        """Candidates to show one by one, and lines that name those that automatic selection leaves out as not
        hardware.
        """
        codes = [(c, {refusal.code for refusal in c.refusals}) for c in self.candidates]
        groups = {
            "not hardware, left out: {}   -> pass allow_simulated=True, or name one with backend=": [
                c.device.id for c, found in codes if found == {Code.FIDELITY}
            ],
            "not hardware, and unable: {}   -> name one with backend= to see why": [
                c.device.id for c, found in codes if found > {Code.FIDELITY}
            ],
        }
        folded = [line.format(", ".join(group)) for line, group in groups.items() if group]
        return [c for c, found in codes if Code.FIDELITY not in found], folded

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "request": self.request.to_dict(),
            **attrs.asdict(
                self, value_serializer=_plain, filter=lambda field, _: field.name not in ("request", "expired")
            ),
        }

    def to_json(self, indent: int | None = 2) -> str:
        from json import dumps

        return dumps(self.to_dict(), indent=indent)


def figure_text(quantity: Quantity, objective: str) -> str:
    """An interval with its unit and origin: "1.2 to 1.4 ms (modelled, assumed)"."""
    scale, unit = {"time": (1e3, " ms"), "energy": (1e3, " mJ"), "error": (1.0, "")}[objective]
    ends = dict.fromkeys(f"{end * scale:.3g}" for end in (quantity.low, quantity.high))  # one where they print alike
    return f"{' to '.join(ends)}{unit} ({quantity.basis}, {quantity.provenance})"


def _plain(_: Any, field: Any, value: Any) -> Any:
    if field is not None and field.name == "tiling":
        return getattr(value, "name", None)
    return (
        sorted(value) if isinstance(value, frozenset) else str(value) if isinstance(value, Fidelity | Code) else value
    )

"""How much of a compiled model the KPU ran: nodes, multiply-accumulates, bytes and time, and what was left to the
host.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import attrs

from ...simulator.fidelity import FIDELITIES
from .macs import Counting, Work
from .plan import Plan


@attrs.frozen
class HostOp:
    """An operator that the host runs, and why."""

    name: str
    reason: str


@attrs.frozen
class GraphRecord:
    """One graph that a compiler was given.

    Attributes:
        kind: "forward", "backward" or "inference". frame: which piece of the user's code it is of.
        nodes: operators in it; sizes, checks and the unpacking of tuples are not counted. kpu_nodes: of those, on
            the KPU. fallback: the others.
    """

    kind: str
    frame: Any
    nodes: int
    kpu_nodes: int
    fallback: tuple[HostOp, ...]


class Run:
    """One run of a graph; filled while it runs."""

    def __init__(self, graph: GraphRecord, fidelity: int = 0) -> None:
        self.graph, self.fidelity = graph, fidelity
        self.plans: list[Plan] = []
        self.host_macs = self.host_bytes = self.boundary_bytes = self.active_macs = 0
        self.host_wall = self.kpu_wall = 0.0
        self.timings: list[Any] = []


#: What the partitions that run now report to; operators that run meanwhile are counted there.
RUN: ContextVar[Run | None] = ContextVar("hal_kpu_run", default=None)


@attrs.frozen(kw_only=True)
class Coverage:
    """How much of some runs the KPU did.

    Attributes:
        whole: whether all that ran was seen, as inside `measure`; else `nodes`, `macs`, `bytes` and `seconds` are those
            of compiled graphs alone.
        graphs: runs of compiled graphs. graph_breaks: pieces that the model was compiled in, less one.
        nodes, kpu_nodes: ATen operators run, and those of them that lower to DFX opcodes.
        macs, kpu_macs: multiply-accumulates of matrix products and convolutions.
        bytes, kpu_bytes: operands and results of each operation, read or written once.
        seconds, kpu_seconds: time. time_basis: "modelled": the KPU's by its cycle model, the host's by its clock;
            "measured": both by the clock of the machine that computes the values; "host": nothing ran on the KPU, and
            all is the host's, by its clock.
        boundary_bytes: crossing between KPU and host inside graphs.
        fallback: ((operator, why, how often), ...) on the host, of compiled graphs.
        outside: ((operator, how often, MACs), ...) that ran outside of compiled graphs, on the host.
        opcodes: DFX opcodes run, and how often.
        fidelity: "behavioral", "transactional" or "cycle_accurate".
        active_macs: multiply-accumulates counted in the PEs, stepped cycle by cycle; CYCLE_ACCURATE only, else 0.
        execution: the timed runs' `ExecutionStats`, one for each program; empty in BEHAVIORAL.
    """

    graphs: int
    graph_breaks: int
    nodes: int
    kpu_nodes: int
    macs: int
    kpu_macs: int
    bytes: int
    kpu_bytes: int
    seconds: float
    kpu_seconds: float
    time_basis: str
    boundary_bytes: int
    fallback: tuple[tuple[str, str, int], ...]
    opcodes: tuple[tuple[str, int], ...]
    fidelity: str
    whole: bool = False
    outside: tuple[tuple[str, int, int], ...] = ()
    active_macs: int = 0
    execution: tuple[Any, ...] = attrs.field(default=(), repr=False)

    @property
    def shares(self) -> dict[str, float]:
        """Of nodes, MACs, bytes and time on the KPU, each 0 to 1; 1 where there was nothing to share, 0 where no graph
        ran.
        """
        if not self.graphs:
            return dict.fromkeys(("nodes", "macs", "bytes", "time"), 0.0)
        pairs = {
            "nodes": (self.kpu_nodes, self.nodes),
            "macs": (self.kpu_macs, self.macs),
            "bytes": (self.kpu_bytes, self.bytes),
            "time": (self.kpu_seconds, self.seconds),
        }
        return {name: part / whole if whole else 1.0 for name, (part, whole) in pairs.items()}

    @property
    def cycles(self) -> int:
        """Of all timed programs, one after the other; 0 in BEHAVIORAL."""
        return sum(int(stats.cycles) for stats in self.execution)

    @property
    def fused(self) -> tuple[tuple[str, int], ...]:
        """((opcodes with "+" between, how often), ...) of operations that were timed as one."""
        return tuple(collections.Counter(label for stats in self.execution for label in stats.fused).most_common())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the shares."""
        listed_apart = ("execution", "fallback", "outside", "opcodes")
        fields = attrs.asdict(self, filter=lambda field, _: field.name not in listed_apart)
        listed = [{"operator": name, "reason": reason, "count": count} for name, reason, count in self.fallback]
        return fields | {
            "fallback": listed,
            "outside": [{"operator": name, "count": count, "macs": macs} for name, count, macs in self.outside],
            "opcodes": dict(self.opcodes),
            "fused": dict(self.fused),
            "shares": self.shares,
            "cycles": self.cycles,
        }

    def rows(self) -> list[list[str]]:
        """Lines of a table: what, on the KPU, of all, share."""
        names = {"nodes": ("nodes", "operators"), "macs": ("macs", "MACs"), "bytes": ("bytes", "bytes")}
        shares = self.shares
        lines = [
            [
                title,
                f"{getattr(self, f'kpu_{name}'):,}",
                f"{getattr(self, name):,}",
                self._percent(shares[name]) if getattr(self, name) else "-",
            ]
            for name, title in names.values()
        ]
        if self.time_basis == "host":
            return [*lines, ["time of the host", "-", f"{self.seconds:.3g} s", "-"]]
        times = [f"{self.kpu_seconds:.3g} s", f"{self.seconds:.3g} s", self._percent(shares["time"])]
        return [*lines, [f"time, {self.time_basis}", *times]]

    def _percent(self, share: float) -> str:
        """A share, rounded down, so that 100% is all; of the graphs, where nothing else was seen."""
        return f"{math.floor(share * 1000) / 10:.1f}%{'' if self.whole else ' of graphs'}"

    def notes(self) -> list[str]:
        """What the table does not say: breaks, bytes across, and each operator left to the host with its reason."""
        ran = f"{self.graphs} graph runs, {self.graph_breaks} graph breaks"
        head = f"{ran}, {self.boundary_bytes:,} bytes between KPU and host"
        basis = {
            "modelled": f"KPU time is modelled ({self.fidelity}, simulated); the host's is this machine's clock",
            "measured": "time is this machine's clock over values it computes itself: no model of the KPU's time",
            "host": "nothing ran on the KPU: time is this machine's clock over what ran on the host",
        }[self.time_basis]
        joined = [f"as one: {label} x {count}" for label, count in self.fused]
        left = [f"on the host: {name} x {count}: {reason}" for name, reason, count in self.fallback]
        left += [
            f"on the host, outside of compiled graphs: {name} x {count}{f', {macs:,} MACs' if macs else ''}"
            for name, count, macs in self.outside
        ]
        if not self.graphs:
            return ["torch.compile sent no graph: all of it ran on the host, as nn.LSTM does", *left]
        unseen = ["outside of compiled graphs: not seen; `with hal_kpu.measure()` counts it"]
        return [head, basis, *joined, *(left or ["on the host: nothing"]), *([] if self.whole else unseen)]

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table

        table = Table("", "on the KPU", "of all", "share", title="KPU coverage", caption="\n".join(self.notes()))
        for row in self.rows():
            table.add_row(*row)
        return table

    def summary(self) -> str:
        """The same as plain text."""
        return "\n".join([*("  ".join(row) for row in self.rows()), *self.notes()])


def cover(runs: Sequence[Run], fidelity: int = 0, outside: Mapping[str, Work] | None = None) -> Coverage:
    """Add runs up. outside: what ran beside them; None where nobody looked."""
    others = sorted((outside or {}).items(), key=lambda item: (-item[1].macs, -item[1].calls, item[0]))
    plans = [plan for run in runs for plan in run.plans]
    timings = [stats for run in runs for stats in run.timings]
    fallback = collections.Counter((op.name, op.reason) for run in runs for op in run.graph.fallback)
    opcodes: collections.Counter[str] = collections.Counter()
    for plan in plans:
        opcodes.update(op.opcode for op in plan.program.ops)
    frames = {run.graph.frame for run in runs if run.graph.kind != "backward"}
    kpu_macs, kpu_bytes = sum(plan.macs for plan in plans), sum(plan.bytes for plan in plans)
    kpu_seconds = sum(stats.seconds for stats in timings) if timings else sum(run.kpu_wall for run in runs)
    return Coverage(
        graphs=len(runs),
        graph_breaks=max(len(frames) - 1, 0),
        nodes=sum(run.graph.nodes for run in runs) + sum(work.calls for _, work in others),
        kpu_nodes=sum(run.graph.kpu_nodes for run in runs),
        macs=kpu_macs + sum(run.host_macs for run in runs) + sum(work.macs for _, work in others),
        kpu_macs=kpu_macs,
        bytes=kpu_bytes + sum(run.host_bytes for run in runs) + sum(work.bytes for _, work in others),
        kpu_bytes=kpu_bytes,
        seconds=kpu_seconds + sum(run.host_wall for run in runs) + sum(work.seconds for _, work in others),
        kpu_seconds=kpu_seconds,
        time_basis="modelled" if timings else "measured" if any(run.graph.kpu_nodes for run in runs) else "host",
        boundary_bytes=sum(run.boundary_bytes for run in runs),
        fallback=tuple((name, reason, count) for (name, reason), count in fallback.most_common()),
        opcodes=tuple(opcodes.most_common()),
        fidelity=FIDELITIES[fidelity],
        whole=outside is not None,
        outside=tuple((name, work.calls, work.macs) for name, work in others),
        active_macs=sum(run.active_macs for run in runs),
        execution=tuple(timings),
    )


def compiled_callable() -> Any:
    """What torch.compile was given, of the outermost compiled call that is running; None outside of any."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            found = frame
        frame = frame.f_back
    return None if found is None else found.f_locals.get("fn")


def _begins_again(first: GraphRecord, graph: GraphRecord) -> bool:
    """Whether a graph is the one that began the last call, or the same code with gradients where that had none."""
    if graph is first:
        return True
    return graph.kind != "backward" and graph.frame == first.frame and graph.kind != first.kind


class Recorder:
    """Keeps the runs of the last call of a compiled model, and of every `measure` that is open.

    A call begins when another compiled callable is entered, or when the graph that began the last call runs again:
    forward, backward and the pieces between graph breaks belong to one call, and so do all steps of a generation.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: list[Run] = []
        self._open: list[list[Run]] = []
        self._fidelity = 0
        self._callable: Callable[[], Any] = lambda: None

    def add(self, run: Run, fidelity: int) -> None:
        entered = compiled_callable() if run.graph.kind != "backward" else None
        with self._lock:
            another = entered is not None and self._callable() is not entered
            if another or (self._last and _begins_again(self._last[0].graph, run.graph)):
                self._last = []
            if another:
                self._callable = weakref.ref(entered)
            self._last.append(run)
            self._fidelity = fidelity
            for runs in self._open:
                runs.append(run)

    def last(self) -> Coverage | None:
        with self._lock:
            return cover(self._last, self._fidelity) if self._last else None

    @contextlib.contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Everything that runs inside: compiled graphs of all threads, and in this thread what runs outside of them."""
        runs: list[Run] = []
        with self._lock:
            self._open.append(runs)
        try:
            with Counting(paused=lambda: RUN.get() is not None) as counting:
                yield Measurement(self, runs, counting.work)
        finally:
            with self._lock:
                self._open = [other for other in self._open if other is not runs]


class Measurement:
    """What ran inside a `measure`."""

    def __init__(self, recorder: Recorder, runs: list[Run], outside: Mapping[str, Work]) -> None:
        self._recorder, self._runs, self._outside = recorder, runs, outside

    def coverage(self) -> Coverage:
        """So far."""
        return cover(self._runs, self._recorder._fidelity, self._outside)


RECORDER = Recorder()
measure = RECORDER.measure


def get_last_stats() -> Coverage | None:
    """The coverage of the last call of a model compiled with a KPU backend; None before the first.

    A call of which torch.compile sends no graph leaves no trace here: `measure` then says that nothing ran.
    """
    return RECORDER.last()

"""Many attention requests at once, over several devices: bounded queues, shortest expected completion first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

import hal_core as hal
from hal_core import ContractError, DeviceUnavailableError, Fidelity, HalError, UnsupportedError
from hal_core.plugin_api import registry

from . import control
from .breaker import Breakers, is_device_fault
from .estimator import Estimator
from .keys import Keys

#: Requests of one batch, and the longest that they are expected to take, in seconds, to be worth joining.
MOST_JOINED, SHORT = 16, 1e-3


class QueueFullError(HalError, RuntimeError):
    """Every queue that could take the request is full. Nothing was queued; try again later.

    Attributes:
        queued: requests waiting now. limit: the most that wait for one device.
    """

    def __init__(self, queued: int, limit: int) -> None:
        super().__init__(
            f"{queued} requests wait, and {limit} may wait for a device: try again later. Nothing was queued."
        )
        self.queued, self.limit = queued, limit


class DeadlineError(HalError, TimeoutError):
    """A request could not be answered within its deadline; it was not run."""


class _Job:
    """A request on its way. expected: seconds by device that can run it. tried: devices that failed it."""

    __slots__ = (
        "arguments",
        "deadline",
        "expected",
        "form",
        "future",
        "joins",
        "keys",
        "keywords",
        "priority",
        "tried",
    )

    def __init__(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any], priority: int, deadline: float | None
    ) -> None:
        self.arguments, self.keywords, self.priority, self.deadline = arguments, keywords, priority, deadline
        self.future: Future[Any] = Future()
        self.tried, self.expected = set[str](), dict[str, float]()
        self.form, self.joins = _form(arguments, keywords), False
        self.keys: Keys | None = None


def _form(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What equal calls without tables and masks share; None where a call has them or is malformed."""
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in keywords.values())
    if len(arguments) != 3 or not plain:
        return None
    try:
        tensors = tuple((t.shape, t.dtype, t.device, t.stride()[-1], t.requires_grad) for t in arguments)
    except (AttributeError, IndexError):
        return None
    return (tensors, tuple(sorted(keywords.items())))


class _Queue:
    """One device's: jobs by priority and then order, and the seconds that they are expected to take."""

    def __init__(self, device: str) -> None:
        self.device, self.jobs = device, list[tuple[int, int, _Job]]()
        self.seconds, self.running = 0.0, 0


class Pool:
    """Serves attention requests on several devices at once. Thread-safe; `submit` from threads, `attention` in asyncio.

    A request goes to the device that is expected to complete it first: by its queue, by the device's estimate and by
    what was learned. A device that fails is gone round until its breaker closes, and its request runs elsewhere; other
    errors are the request's. Every request is answered once: by its result, its error, or its cancellation.

    Args:
        devices: ids or backend names; None: every device that is hardware.
        limit: requests that may wait for one device, before those that a failing device gives up to it.
        join: whether equal small requests are run as one batch.
        clock: seconds, for deadlines. breakers: the router's where it is enabled, else the pool's own.

    Raises:
        ContractError: no devices, or a limit below 1.
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        *,
        limit: int = 64,
        join: bool = True,
        clock: Callable[[], float] = monotonic,
        breakers: Breakers | None = None,
    ) -> None:
        if type(limit) is not int or limit < 1 or isinstance(devices, str):
            raise ContractError(
                f"devices {devices!r} and limit {limit!r} were given: pass a list of ids, and 1 or more"
            )
        every = [d.id for d in hal.devices() if d.fidelity is Fidelity.HARDWARE] if devices is None else devices
        names = [hal.device(name).id for name in every]
        if not names:
            raise ContractError("a pool needs a device: name one")
        self.limit, self._join, self._clock = limit, join, clock
        router = control.router
        self.breakers = breakers or (router.breakers if router is not None else Breakers())
        self._estimator = router.chooser.estimator if router is not None else Estimator()
        self._queues = {name: _Queue(name) for name in dict.fromkeys(names)}
        self._known: dict[
            Any, Any
        ] = {}  # by form: keys, estimates by device, whether it may be joined, its description
        self._order, self._changed = itertools.count(), threading.Condition()
        self._closed = False
        self.counts = {"done": 0, "failed": 0, "refused": 0, "cancelled": 0, "expired": 0, "joined": 0, "moved": 0}
        self._threads = [
            threading.Thread(target=self._serve, args=(queue,), name=f"hal-pool-{queue.device}", daemon=True)
            for queue in self._queues.values()
        ]
        for thread in self._threads:
            thread.start()
        control.pools.append(weakref.ref(self))
        control.pools[:] = [reference for reference in control.pools if reference() is not None]

    def submit(self, *arguments: Any, priority: int = 0, deadline: float | None = None, **keywords: Any) -> Future[Any]:
        """Queue a request.

        Args:
            arguments, keywords: as for `hal.attention`; `backend` may name one of the pool's devices, which then runs
                it or fails it.
            priority: higher first. deadline: seconds from now within which it must be begun.

        Returns:
            A future of what `hal.attention` returns. `cancel()` works until the request runs.

        Raises:
            QueueFullError: every queue that could take it is full. UnsupportedError: no device of the pool can run it.
            ContractError: malformed arguments, or a pool that was closed. DeadlineError: it cannot be met now.
        """
        backend = keywords.pop("backend", None)
        job = _Job(arguments, keywords, priority, None if deadline is None else self._clock() + deadline)
        able = self._able(job)
        if backend is not None:
            named = {device.id for device in registry.find(backend)}
            job.tried = set(self._queues) - named
            if not named & set(able):
                raise UnsupportedError(
                    f"{backend} is not of this pool ({', '.join(self._queues)}), or cannot run this request: leave "
                    "backend= out, or make a pool with it. Nothing was queued."
                )
        with self._changed:
            if self._closed:
                raise ContractError("the pool was closed: make another one")
            queue = self._quickest(job, able)
            if queue is None:
                self.counts["refused"] += 1
                raise QueueFullError(sum(len(q.jobs) for q in self._queues.values()), self.limit)
            waiting = queue.seconds + job.expected[queue.device]
            if deadline is not None and waiting > deadline:
                self.counts["refused"] += 1
                raise DeadlineError(
                    f"{waiting:.3g} s are expected and {deadline:.3g} s were given, with {len(queue.jobs)} requests "
                    "before it. Nothing was queued."
                )
            self._put(queue, job)
        return job.future

    async def attention(self, *arguments: Any, **options: Any) -> Any:
        """`submit`, awaited. A cancelled task cancels its request where that does not run yet."""
        return await asyncio.wrap_future(self.submit(*arguments, **options))

    def _able(self, job: _Job) -> list[str]:
        """Devices that can run a job, with the seconds expected of each: estimate and residual, load included.

        Raises what `hal.explain` raises for a malformed call.
        """
        known = self._known.get(job.form) if job.form is not None else None
        if known is None:
            request = hal.explain(*job.arguments, **job.keywords).request
            able = [d for d in map(hal.device, self._queues) if not hal.check_all(request, d, transfer=True)]
            times = {d.id: registry.backend_of(d).estimate(request, d).time.middle for d in able}
            # Dropout draws for a whole batch at once, and gradients flow to each caller's own tensors.
            joins = not (request.grads or request.packed or request.dropout)
            known = (Keys.of(request), times, job.form is not None and joins, request.describe())
            if job.form is not None:
                if len(self._known) > 1024:
                    self._known.clear()
                self._known[job.form] = known
        job.keys, times, job.joins, described = known
        if not times:
            raise UnsupportedError(
                f"no device of this pool ({', '.join(self._queues)}) can run {described}: `hal.explain` with backend= "
                "says why. Nothing was queued."
            )
        for name, seconds in times.items():
            seconds = max(seconds, 1e-7)
            believed = self._estimator.believe(name, job.keys, seconds).residual + self._estimator.load(name).value
            job.expected[name] = seconds * math.exp(believed)
        return list(times)

    def _quickest(self, job: _Job, able: Sequence[str]) -> _Queue | None:
        """The queue of shortest expected completion with room, devices with an open breaker last."""
        free = [self._queues[n] for n in able if n not in job.tried and len(self._queues[n].jobs) < self.limit]
        well = [queue for queue in free if not self.breakers.is_open(queue.device)] or free
        return min(well, key=lambda q: q.seconds + job.expected[q.device], default=None)

    def _put(self, queue: _Queue, job: _Job) -> None:
        heapq.heappush(queue.jobs, (-job.priority, next(self._order), job))
        queue.seconds += job.expected[queue.device]
        self._changed.notify_all()

    def _take(self, queue: _Queue) -> list[_Job] | None:
        """The next jobs of a queue, several where they are equal and small; None once the pool is closed and empty."""
        with self._changed:
            while True:
                while not queue.jobs:
                    if self._closed:
                        return None
                    queue.seconds = 0.0
                    self._changed.wait()
                taken = [self._pop(queue)]
                first = taken[0]
                short = self._join and first.joins and first.expected[queue.device] < SHORT
                while short and queue.jobs and len(taken) < MOST_JOINED and queue.jobs[0][2].form == first.form:
                    taken.append(self._pop(queue))
                jobs = [job for job in taken if self._begins(job)]
                if jobs:
                    queue.running = len(jobs)
                    return jobs

    def _pop(self, queue: _Queue) -> _Job:
        job = heapq.heappop(queue.jobs)[2]
        queue.seconds = max(queue.seconds - job.expected[queue.device], 0.0)
        return job

    def _begins(self, job: _Job) -> bool:
        """Whether a job is to be run: it was neither cancelled nor is its deadline over."""
        if not job.future.running() and not job.future.set_running_or_notify_cancel():
            self.counts["cancelled"] += 1
            return False
        if job.deadline is not None and self._clock() > job.deadline:
            self.counts["expired"] += 1
            job.future.set_exception(DeadlineError("the request's deadline was over before a device was free for it"))
            return False
        return True

    def _serve(self, queue: _Queue) -> None:
        while (jobs := self._take(queue)) is not None:
            try:
                results = self._run(queue.device, jobs)
            except Exception as error:
                if len(jobs) > 1:  # each by itself, so that one does not fail the others
                    for job in jobs:
                        self._run_one(queue, job)
                else:
                    self._failed(queue, jobs[0], error)
            else:
                self._succeeded(queue.device)
                with self._changed:
                    self.counts["done"] += len(jobs)
                    self.counts["joined"] += len(jobs) if len(jobs) > 1 else 0
                for job, result in zip(jobs, results, strict=True):
                    job.future.set_result(result)
            queue.running = 0

    def _run_one(self, queue: _Queue, job: _Job) -> None:
        try:
            [result] = self._run(queue.device, [job])
        except Exception as error:
            self._failed(queue, job, error)
        else:
            self._succeeded(queue.device)
            with self._changed:
                self.counts["done"] += 1
            job.future.set_result(result)

    def _run(self, device: str, jobs: list[_Job]) -> list[Any]:
        first = jobs[0]
        if len(jobs) == 1:
            return [hal.attention(*first.arguments, **first.keywords, backend=device)]
        import torch

        joined: list[Any] = [torch.cat([job.arguments[place] for job in jobs]) for place in range(3)]
        query, key, value = joined
        result, size = hal.attention(query, key, value, **first.keywords, backend=device), first.arguments[0].shape[0]
        if isinstance(result, tuple):
            return [hal.AttentionOutput(*parts) for parts in zip(*(each.split(size) for each in result), strict=True)]
        return list(result.split(size))

    def _succeeded(self, device: str) -> None:
        if self.breakers.is_open(device):
            self.breakers.succeeded(device)

    def _failed(self, queue: _Queue, job: _Job, error: Exception) -> None:
        """Give the job to another device where this one is at fault, or its error to who waits for it."""
        if is_device_fault(error):
            if control.router is None or self.breakers is not control.router.breakers:  # that one has heard of it
                self.breakers.failed(queue.device, error)
            job.tried.add(queue.device)
            with self._changed:
                # A request that ran is never turned away: what a failing device gives up comes on top of a limit.
                others = [n for n in job.expected if n not in job.tried]
                well = [n for n in others if not self.breakers.is_open(n)] or others
                if well and not self._closed:
                    self.counts["moved"] += 1
                    self._put(
                        min((self._queues[n] for n in well), key=lambda q: q.seconds + job.expected[q.device]), job
                    )
                    return
        with self._changed:
            self.counts["failed"] += 1
        job.future.set_exception(error)

    def state(self) -> dict[str, Any]:
        """Requests waiting and running by device, the limit, and how many were done, failed, refused, cancelled,
        expired, joined with others, and moved off a failing device.
        """
        with self._changed:
            queued = {name: len(queue.jobs) for name, queue in self._queues.items()}
            running = {name: queue.running for name, queue in self._queues.items()}
            return {
                "name": f"pool-{id(self):x}",
                "queued": queued,
                "running": running,
                "limit": self.limit,
                **self.counts,
            }

    def close(self, timeout: float | None = None) -> None:
        """Answer what waits, then end. Later calls of `submit` raise. With `timeout`, what still waits after so many
        seconds is failed with DeviceUnavailableError.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)
        with self._changed:
            for queue in self._queues.values():
                while queue.jobs:
                    job = self._pop(queue)
                    if not job.future.done() and (job.future.running() or job.future.set_running_or_notify_cancel()):
                        job.future.set_exception(DeviceUnavailableError("the pool was closed before the request ran"))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

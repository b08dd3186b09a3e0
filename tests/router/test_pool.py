"""Many requests at once: every one answered once, right or refused, whatever the devices do."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes import full
from hal_router import Pool, QueueFullError
from hal_router.breaker import Breakers
from hal_router.pool import DeadlineError

import hal_core as hal

SDPA = torch.nn.functional.scaled_dot_product_attention


class Gate:
    """Holds a device's calls until a test opens it."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self, request: Any) -> float:
        self.entered.set()
        assert self.open.wait(60)
        return 0.0


@pytest.fixture
def calm() -> Iterator[Breakers]:
    """Breakers whose probes succeed at once, in the background."""
    found = Breakers(
        later=lambda seconds, function: threading.Timer(0.002, function).start(), probe=lambda device: None
    )
    yield found
    time.sleep(0.02)
    found.reset()


def test_5000_requests_of_64_callers_with_failing_devices(device: Any, calm: Breakers) -> None:
    draw, lock, ran = random.Random(3), threading.Lock(), Counter[str]()

    def count(name: str) -> Any:
        def takes(request: Any) -> float:
            with lock:
                ran[name] += 1
                if name == "flaky" and draw.random() < 0.05:
                    raise OSError("a bit fell over")
                if name == "killed" and 500 < sum(ran.values()) < 2500:
                    raise hal.DeviceUnavailableError("killed")
            return 0.0

        return takes

    for name in ("steady", "flaky", "killed"):
        device(name, 1e-6, count(name))
    shapes = [torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 6, 9, 16)]
    wanted = [SDPA(q, q, q) for q in shapes]
    outcome = Counter[str]()
    with Pool(["steady", "flaky", "killed"], limit=32, breakers=calm) as pool:

        def caller(number: int) -> None:
            own = random.Random(number)
            for _ in range(5000 // 64 + (number < 5000 % 64)):
                place = own.randrange(4)
                query = shapes[place] + number * 0.0
                while True:
                    try:
                        future = pool.submit(query, query, query, priority=own.randrange(3))
                        break
                    except QueueFullError:
                        time.sleep(0.001)
                try:
                    result = future.result(120)
                    right = torch.allclose(result, wanted[place], atol=1e-5)
                    found = "right" if right else "wrong"
                except (OSError, hal.HalError):
                    found = "failed"
                with lock:
                    outcome[found] += 1

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = pool.state()
    assert sum(outcome.values()) == 5000
    assert outcome["wrong"] == 0
    assert outcome["right"] >= 4990  # all but those that three devices failed one after another
    assert counts["done"] + counts["failed"] == 5000
    assert counts["moved"] > 0


def test_priorities_and_order(device: Any, calm: Breakers) -> None:
    gate = Gate()
    only = device("only", 1.0, gate)
    with Pool(["only"], breakers=calm, join=False) as pool:
        first = pool.submit(*[torch.randn(1, 2, 3, 8)] * 3)
        assert gate.entered.wait(60)
        sizes = {4: 0, 5: 2, 6: 1, 7: 2}
        futures = [pool.submit(*[torch.randn(1, 2, n, 8)] * 3, priority=p) for n, p in sizes.items()]
        gate.open.set()
        for future in [first, *futures]:
            future.result(60)
    assert [request.len_q for _, request in only.ran] == [3, 5, 7, 6, 4]


def test_a_full_queue_refuses_with_its_length_and_a_cancelled_request_is_not_run(device: Any, calm: Breakers) -> None:
    gate = Gate()
    only = device("only", 1.0, gate)
    q = torch.randn(1, 2, 4, 8)
    with Pool(["only"], limit=2, breakers=calm) as pool:
        running = pool.submit(q, q, q)
        assert gate.entered.wait(60)
        kept, dropped = pool.submit(q, q, q), pool.submit(q, q, q)
        with pytest.raises(QueueFullError, match="2 requests wait, and 2 may wait") as refused:
            pool.submit(q, q, q)
        assert (refused.value.queued, refused.value.limit) == (2, 2)
        assert dropped.cancel()
        assert not running.cancel()
        gate.open.set()
        assert kept.result(60).shape == q.shape
    assert len(only.ran) == 2
    assert pool.state()["cancelled"] == 1
    assert pool.state()["refused"] == 1


def test_deadlines_refuse_at_once_or_expire_in_the_queue(device: Any, calm: Breakers) -> None:
    now, gate = [0.0], Gate()
    only = device("only", 1.0, gate)
    q = torch.randn(1, 2, 4, 8)
    with Pool(["only"], breakers=calm, clock=lambda: now[0]) as pool:
        with pytest.raises(DeadlineError, match="Nothing was queued"):
            pool.submit(q, q, q, deadline=0.5)
        first = pool.submit(q, q, q)
        assert gate.entered.wait(60)
        late = pool.submit(q, q, q, deadline=5.0)
        now[0] = 10.0
        gate.open.set()
        first.result(60)
        with pytest.raises(DeadlineError, match="was over before"):
            late.result(60)
    assert len(only.ran) == 1


def test_equal_small_requests_are_joined_and_split_again(device: Any, calm: Breakers) -> None:
    gate = Gate()
    only = device("only", 1e-6, gate)
    tensors = [[torch.randn(1, 2, 6, 8) for _ in range(3)] for _ in range(9)]
    with Pool(["only"], breakers=calm) as pool:
        blocker = pool.submit(*[torch.randn(1, 2, 3, 8)] * 3)
        assert gate.entered.wait(60)
        futures = [pool.submit(*each, is_causal=True, return_lse=True) for each in tensors]
        gate.open.set()
        blocker.result(60)
        results = [future.result(60) for future in futures]
    assert [request.batch for _, request in only.ran] == [1, 9]
    for each, result in zip(tensors, results, strict=True):
        assert torch.allclose(result.out, SDPA(*each, is_causal=True), atol=1e-5)
        assert result.lse.shape == (1, 2, 6)


def test_a_named_device_is_not_left_and_others_are_refused(device: Any, calm: Breakers) -> None:
    one, two = device("one", 1.0), device("two", 1e-9)
    q = torch.randn(1, 2, 4, 8)
    with Pool(["one", "two"], breakers=calm) as pool:
        pool.submit(q, q, q, backend="one").result(60)
        one.error = OSError("down")
        with pytest.raises(OSError, match="down"):
            pool.submit(q, q, q, backend="one").result(60)
        with pytest.raises(hal.UnsupportedError, match="not of this pool"):
            pool.submit(q, q, q, backend="cpu")
        with pytest.raises(hal.ContractError):
            pool.submit(q, q, q[0])
    assert not two.ran
    with pytest.raises(hal.ContractError, match="was closed"):
        pool.submit(q, q, q)


def test_a_request_that_no_device_of_the_pool_runs_is_refused(device: Any, calm: Breakers) -> None:
    device("only", 1.0, capabilities=full(dtypes={"float16"}))
    with Pool(["only"], breakers=calm) as pool, pytest.raises(hal.UnsupportedError, match="Nothing was queued"):
        pool.submit(*[torch.randn(1, 2, 4, 8)] * 3)


def test_the_shorter_queue_gets_the_next_request(device: Any, calm: Breakers) -> None:
    gate = Gate()
    fast, slow = device("fast", 1.0, gate), device("slow", 2.5, gate)
    q = torch.randn(1, 2, 4, 8)
    with Pool(["fast", "slow"], breakers=calm, join=False) as pool:
        futures: list[Future[Any]] = []
        for _ in range(7):  # 1, 2 | 2.5 | 3, 4, 5 | 5
            futures.append(pool.submit(q, q, q))
            time.sleep(0.02)  # the worker takes the first of a queue
        waiting = pool.state()
        gate.open.set()
        for future in futures:
            future.result(60)
    assert waiting["running"]["fast:0"] == 1
    assert len(fast.ran) > len(slow.ran) >= 1


def test_asyncio_awaits_results_and_cancels_what_waits(device: Any, calm: Breakers) -> None:
    gate = Gate()
    device("only", 1.0, gate)
    q = torch.randn(1, 2, 4, 8)

    async def main(pool: Pool) -> int:
        tasks = [asyncio.create_task(pool.attention(q, q, q)) for _ in range(4)]
        await asyncio.get_running_loop().run_in_executor(None, gate.entered.wait, 60)
        tasks[3].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return sum(isinstance(result, torch.Tensor) for result in results)

    with Pool(["only"], breakers=calm, join=False) as pool:
        assert asyncio.run(main(pool)) == 3
    assert pool.state()["done"] == 3


def test_closing_with_a_timeout_fails_what_still_waits(device: Any, calm: Breakers) -> None:
    gate = Gate()
    device("only", 1.0, gate)
    q = torch.randn(1, 2, 4, 8)
    pool = Pool(["only"], breakers=calm, join=False)
    first = pool.submit(q, q, q)
    assert gate.entered.wait(60)
    second = pool.submit(q, q, q)
    pool.close(timeout=0.01)
    with pytest.raises(hal.DeviceUnavailableError, match="was closed before"):
        second.result(60)
    gate.open.set()
    first.result(60)


@pytest.mark.parametrize("given", [{"devices": "cpu"}, {"devices": []}, {"limit": 0}, {"limit": 1.5}])
def test_malformed_pools_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(hal.ContractError):
        Pool(**given)


def test_submitting_from_many_threads_keeps_the_limit(device: Any, calm: Breakers) -> None:
    gate = Gate()
    device("only", 1.0, gate)
    q = torch.randn(1, 2, 4, 8)

    def attempt(_: int) -> str:
        try:
            pool.submit(q, q, q)
        except QueueFullError:
            return "full"
        return "queued"

    with Pool(["only"], limit=5, breakers=calm, join=False) as pool:
        with ThreadPoolExecutor(16) as threads:
            outcome = Counter(threads.map(attempt, range(64)))
        assert pool.state()["queued"]["only:0"] <= 5
        gate.open.set()
    assert outcome["queued"] in (5, 6)  # one may run

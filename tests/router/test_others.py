"""`AdaptiveRouter`, `cached`, the command, and what the package loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import hal_router
import pytest
import torch
from hal_router import AdaptiveRouter, PerformanceMetrics, WorkloadCharacteristics, cached

import hal_core as hal


def test_an_adaptive_router_learns_what_it_is_told(device: Any) -> None:
    device("modest", 4e-3)
    device("boaster", 2e-3)
    router = AdaptiveRouter(devices=["modest:0", "boaster:0"], min_samples_for_prediction=5)
    small, large = WorkloadCharacteristics(1, 16, 64, 4), WorkloadCharacteristics(1, 512, 64, 4, causal=True)
    assert router.select_device(small) == "boaster:0"
    true = {"modest:0": 1.0, "boaster:0": 8.0}
    for workload in (small, large) * 60:
        chosen = router.select_device(workload)
        router.update_performance(chosen, workload, PerformanceMetrics(latency_ms=true[chosen]))
    assert router.select_device(small) == router.select_device(large) == "modest:0"
    stats = router.get_stats()
    assert stats["total"] == 120
    assert stats["devices"]["modest:0"]["predicted"]
    assert stats["devices"]["boaster:0"]["factor"] > 1.5
    assert stats["devices"]["modest:0"]["mean_latency_ms"] == pytest.approx(1.0)


def test_an_adaptive_router_passes_over_a_device_that_failed(device: Any) -> None:
    device("one", 1e-3)
    device("two", 2e-3)
    router, workload = AdaptiveRouter(devices=["one:0", "two:0"]), WorkloadCharacteristics(2, 8, 32, 2)
    router.update_performance("one:0", workload, PerformanceMetrics(0.0, failed=True))
    assert router.select_device(workload) == "two:0"
    router.update_performance("one:0", workload, PerformanceMetrics(1.0))
    assert router.select_device(workload) == "one:0"
    assert router.get_stats()["devices"]["one:0"]["failures"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: AdaptiveRouter(history_size=0),
        lambda: AdaptiveRouter(exploration_rate=2),
        lambda: AdaptiveRouter(learning_rate=-1),
        lambda: AdaptiveRouter().select_device(WorkloadCharacteristics(1, 8, 30, 4)),
        lambda: AdaptiveRouter().select_device(WorkloadCharacteristics(0, 8, 32, 4)),
        lambda: AdaptiveRouter().update_performance(
            "cpu:0", WorkloadCharacteristics(1, 8, 32, 4), PerformanceMetrics(-1)
        ),
        lambda: cached(hal.attention, max_bytes=0),
    ],
)
def test_malformed_arguments_are_refused(wrong: Any) -> None:
    with pytest.raises(hal.ContractError):
        wrong()


def test_equal_calls_are_answered_from_the_cache_and_others_are_not() -> None:
    calls: list[int] = []

    def attend(*given: Any, **more: Any) -> Any:
        calls.append(1)
        return hal.attention(*given, backend="cpu", **more)

    ask, q = cached(attend), torch.randn(1, 2, 4, 8)
    first = ask(q, q, q)
    again = ask(q.clone(), q, q)
    assert len(calls) == 1
    assert torch.equal(first, again)
    again.zero_()
    assert torch.equal(ask(q, q, q), first)
    changed = q.clone()
    changed[0, 0, 0, 0] += 1
    ask(changed, q, q)
    ask(q, q, q, is_causal=True)
    ask(q, q, q, scale=1)
    ask(q, q, q, scale=1.0)
    assert len(calls) == 5
    both = ask(q, q, q, return_lse=True)
    assert torch.equal(ask(q, q, q, return_lse=True).lse, both.lse)
    assert ask.cache.hits == 3  # type: ignore[attr-defined]


def test_what_cannot_be_compared_or_is_random_is_not_cached() -> None:
    calls: list[int] = []

    def attend(query: Any, *given: Any, **more: Any) -> Any:
        calls.append(1)
        return query * 2

    ask, q = cached(attend), torch.randn(1, 2, 4, 8)
    for _ in range(2):
        ask(q, q, q, dropout_p=0.5)
        ask(q, q, q, tiling=hal.DenseTiling())
        ask(q.clone().requires_grad_(), q, q)
    assert len(calls) == 6


def test_the_cache_keeps_to_its_bytes_and_drops_the_oldest() -> None:
    ask = cached(lambda tensor: tensor * 2, max_bytes=3 * (400 + 256))
    tensors = [torch.full((100,), float(n)) for n in range(5)]
    for tensor in tensors:
        ask(tensor)
    cache = ask.cache  # type: ignore[attr-defined]
    assert cache.bytes <= cache.most
    ask(tensors[4])
    assert cache.hits == 1
    ask(tensors[0])
    assert cache.hits == 1
    ask(torch.zeros(10_000))
    assert cache.bytes <= cache.most
    cache.clear()
    assert cache.bytes == 0


def test_the_cache_knows_the_devices_that_are_asked_for() -> None:
    calls: list[int] = []

    def attend(*given: Any) -> Any:
        calls.append(1)
        return given[0] * 1

    ask, q = cached(attend), torch.randn(1, 1, 2, 8)
    ask(q)
    with hal.use("cpu"):
        ask(q)
    assert len(calls) == 2


def test_the_report_shows_and_draws_what_was_learned(device: Any, router: Any, tensors: Any, tmp_path: Path) -> None:
    from hal_router import command

    device("only", 1e-6, 3e-6)
    for _ in range(100):
        hal.attention(*tensors())
    assert hal_router.save()
    picture = tmp_path / "learned.svg"
    parser = ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["router", "report", "--picture", str(picture)])
    result = options.run(options)
    assert result.data["arms"]["only:0"]["factor"] == pytest.approx(3.0, rel=0.2)
    assert any("only:0" in row for table in result.tables for row in table.rows)
    assert result.data["totals"]["only:0"][2] == 0  # there is no other device that would have been better
    assert picture.read_text().startswith("<svg")
    assert "only:0" in picture.read_text()
    json.dumps(result.data)
    removed = parser.parse_args(["router", "reset"])
    assert removed.run(removed).data == {"removed": True}
    empty = command.run_report(Namespace(picture=None))
    assert "Nothing was learned yet" in empty.text[0]


def test_importing_loads_no_torch_and_the_variable_enables() -> None:
    code = "import sys, hal_router, hal_router.plugin; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_variable_enables_the_router(tmp_path: Path) -> None:
    code = (
        "import torch, hal_core as hal, hal_router\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "hal.attention(q, q, q)\n"
        "print(hal_router.state()['enabled'], 'policy of router' in hal.explain(q, q, q).reason)"
    )
    given = os.environ | {"HAL_ROUTER": "1", "HAL_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
    assert done.stdout == "True True\n"
    assert list((tmp_path / "router").glob("*.json"))


def test_the_example_answers_every_request(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "route_requests.py"
    given = os.environ | {"HAL_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True, env=given)
    assert "chosen by the policy of router" in done.stdout
    assert "30 of 30 requests answered right" in done.stdout

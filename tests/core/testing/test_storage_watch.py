"""What the memory check sees: storage that torch returns to a plugin's code, and nothing that is exempt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing.benchmark import allocator_peak
from hal_core.testing.storage_watch import SMALL, StorageWatch

LARGE = SMALL // 4 + 1  # float32 numbers


def code_in(file: str, source: str, **names: Any) -> Any:
    """The function `run` of some source text, as if it stood in this file."""
    scope: dict[str, Any] = {"torch": torch, **names}
    exec(compile(source, file, "exec"), scope)
    return scope["run"]


def watched(call: Any, memory: Any = None) -> tuple[StorageWatch, Any]:
    with StorageWatch(memory or hal.PooledMemory()) as watch:
        result = call()
    return watch, result


def plugin(source: str, file: str = "/site/hal_x/session.py", **names: Any) -> Any:
    return code_in(file, f"def run():\n    return {source}", **names)


def test_a_temporary_is_found_with_file_and_line() -> None:
    watch, result = watched(plugin("torch.ones(n).sum()", n=LARGE))
    (found,) = watch.violations(result)
    assert found.where == "/site/hal_x/session.py:2"
    assert found.nbytes == 4 * LARGE
    assert "torch's ones at /site/hal_x/session.py:2" in str(found)


@pytest.mark.parametrize(
    "source",
    [
        "torch.ones(n - 1).sum()",
        "x[1:].view(-1)",
        "x.add_(1)",
        "torch.exp(x, out=x)",
        "torch.ones(n)",
        "torch.ones(2 * n)[n:]",
    ],
)
def test_small_ones_views_and_results_are_allowed(source: str) -> None:
    given = torch.zeros(LARGE)
    watch, result = watched(plugin(source, n=LARGE, x=given))
    assert watch.violations(given, result) == []


def test_memory_of_the_sessions_manager_is_allowed_and_that_of_another_is_not() -> None:
    memory, other = hal.PooledMemory(), hal.PooledMemory()
    use = "torch.sum(memory.allocate((n,), 'float32').tensor.zero_())"
    assert watched(plugin(use, memory=memory, n=LARGE), memory)[0].violations() == []
    assert len(watched(plugin(use, memory=other, n=LARGE), memory)[0].violations()) == 1


def test_frames_of_a_simulator_are_exempt_and_those_beside_it_are_not() -> None:
    source = "torch.ones(n).sum()"
    assert watched(plugin(source, "/site/hal_x/simulator/engine.py", n=LARGE))[0].violations() == []
    assert watched(plugin(source, "/site/hal_x/simulators.py", n=LARGE))[0].violations()


def test_the_innermost_frame_of_the_plugin_is_named() -> None:
    inner = code_in("/site/hal_x/kernels/softmax.py", "def run(n):\n    return torch.ones(n).sum()")
    watch, _ = watched(plugin("inner(n)", inner=inner, n=LARGE))
    assert [found.where for found in watch.violations()] == ["/site/hal_x/kernels/softmax.py:2"]


def test_a_toolkit_function_counts_for_the_plugin_that_calls_it() -> None:
    parts, lse = torch.ones(2, 1, 1, 300, 64), torch.zeros(2, 1, 1, 300)
    watch, _ = watched(plugin("merge(parts, lse)[0].sum()", merge=hal.merge_partials, parts=parts, lse=lse))
    assert {found.where for found in watch.violations(parts, lse)} == {"/site/hal_x/session.py:2"}


def test_temporaries_inside_a_torch_function_belong_to_torch() -> None:
    q, mask = (
        torch.randn(1, 4, 200, 32),
        torch.zeros(1, 4, 200, 200).requires_grad_(),
    )
    sdpa = torch.nn.functional.scaled_dot_product_attention
    watch, result = watched(plugin("sdpa(q, q, q, mask)", sdpa=sdpa, q=q, mask=mask))
    assert watch.violations(q, mask, result) == []


def test_the_allocators_peak_is_what_is_held_at_once() -> None:
    def work() -> None:
        first = torch.ones(1 << 20)
        del first
        torch.ones(2 << 20)

    assert allocator_peak(work) == 8 << 20
    assert allocator_peak(lambda: None) == 0

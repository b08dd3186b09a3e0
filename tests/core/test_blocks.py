"""Overrides hold for their block alone: in any order of ending, after an interrupt, and not at all where never
entered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import hal_core as hal
from hal_core.options import policy_var


def selected() -> tuple[str, ...]:
    return policy_var.get().names


def test_interleaved_generators_leave_nothing_selected(fake: Any) -> None:
    fake("one")
    fake("two")

    def under(name: str) -> Iterator[None]:
        with hal.use(name):
            yield

    first, second = under("one"), under("two")
    next(first)
    next(second)
    assert selected() == ("two",)
    list(first)
    assert selected() == ("two",)
    list(second)
    assert selected() == ()


def test_an_interrupt_at_any_step_of_a_block_leaves_nothing_selected(fake: Any) -> None:
    """KeyboardInterrupt is raised at every line of the block's code in turn, as a signal would raise it."""
    fake("one")

    def run(step: int) -> bool:
        steps = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal steps
            if not frame.f_code.co_filename.endswith("options.py"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                steps += 1
                if steps == step:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        block = None
        try:
            sys.settrace(trace)
            block = hal.use("one")
            with block:
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            del block
        return False

    step = 1
    while run(step):
        assert selected() == (), f"step {step} left the device selected"
        step += 1
    assert step > 50


def test_a_block_that_was_never_entered_says_so(fake: Any) -> None:
    fake("one")
    with pytest.warns(RuntimeWarning, match=r"hal.use\('one'\) was never entered"):
        hal.use("one")


@pytest.mark.parametrize("value", ["no", 5, 1.5, [True]])
@pytest.mark.parametrize("name", ["allow_simulated", "transfer"])
def test_overrides_are_true_false_or_none(fake: Any, name: str, value: Any) -> None:
    fake("model", fidelity="simulated")
    with pytest.raises(hal.ContractError, match="use True, False or None"), hal.use(**{name: value}):
        pass


def test_options_reach_the_session_and_are_part_of_the_decision(fake: Any, generator: Any) -> None:
    from fakes import full
    from test_attention import draw

    backend = fake("knobs", capabilities=full(options={"passes": hal.Range(1, 8), "mode": ("fast", "slow")}))
    other = fake("plain")
    tensors = draw(generator)
    with hal.use("knobs", options={"passes": 4, "mode": "slow"}):
        hal.attention(*tensors)
        assert backend.ran[-1][1].options == (("mode", "slow"), ("passes", 4))
        with hal.use(options={"passes": 2}):
            hal.attention(*tensors)
        assert backend.ran[-1][1].options == (("passes", 2),)
    hal.attention(*tensors, backend="knobs")
    assert backend.ran[-1][1].options == ()
    for options, offered in (({"passes": 9}, "passes of 1 to 8"), ({"colour": 1}, "options mode or passes")):
        with pytest.raises(hal.UnsupportedError, match=offered), hal.use("knobs", options=options):
            hal.attention(*tensors)
    with pytest.raises(hal.ContractError, match="pass a mapping"), hal.use("knobs", options=[1]):
        pass
    assert not other.ran

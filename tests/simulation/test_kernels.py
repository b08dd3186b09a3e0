"""Metered kernels, the sizes of products, and the interval of a modelled figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_simulation import RELATIVE_UNCERTAINTY, MeteredKernel, ProductSize, linear_size, matmul_size, modelled

import hal_core as hal
from hal_core import Basis, ContractError, Device, Estimate, Fidelity, Provenance

DEVICE = Device(id="toy:0", family="toy", vendor="nobody", model="toy", fidelity=Fidelity.SIMULATED)


class Doubled(MeteredKernel):
    """Doubles its operand, in a modelled second for each time it is asked to."""

    def run(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        return x * 2

    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        times = options.get("times", 1)
        seconds, joules = (modelled(x * times, Provenance.PAPER_PROJECTION, "a toy") for x in (1.0, 3.0))
        return Estimate(time=seconds, energy=joules), operands[0].numel() * times


def test_a_metered_kernel_adds_its_modelled_cost_of_these_operands_and_options() -> None:
    kernel = Doubled(DEVICE)
    with hal.meter() as meter:
        assert torch.equal(kernel(torch.ones(5)), torch.full((5,), 2.0))
        kernel(torch.ones(2), times=3)
    record = meter.records["toy:0"]
    assert (record.calls, record.macs, record.transferred) == (2, 11, 0)
    assert record.time is not None
    assert record.energy is not None
    assert (record.time.middle, record.energy.middle) == (4.0, 12.0)
    assert record.time.provenance is Provenance.PAPER_PROJECTION
    assert 0 < record.wall < record.time.middle
    assert kernel.estimate(torch.ones(2), times=3).time.middle == 3.0


def test_without_a_meter_no_cost_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubled, "cost", lambda *args, **options: pytest.fail("the cost was computed"))
    assert torch.equal(Doubled(DEVICE)(torch.ones(1)), torch.full((1,), 2.0))


@pytest.mark.parametrize("provenance", list(Provenance))
def test_a_modelled_figure_is_an_interval_as_wide_as_its_provenance(provenance: Provenance) -> None:
    found, share = modelled(8.0, provenance, "here"), RELATIVE_UNCERTAINTY[provenance]
    assert (found.low, found.high) == (8 * (1 - share), 8 * (1 + share))
    assert (found.basis, found.provenance, found.source) == (Basis.MODELLED, provenance, "here")
    assert modelled(8.0, provenance, "here", 0.0).low == 8.0


def test_worse_provenance_is_never_a_narrower_interval() -> None:
    widths = [RELATIVE_UNCERTAINTY[provenance] for provenance in Provenance]
    assert widths == sorted(widths)


def test_sizes_of_products() -> None:
    a, b = torch.zeros(2, 1, 5, 7), torch.zeros(3, 7, 4, dtype=torch.float32)
    assert matmul_size(a, b) == ProductSize(6, 5, 4, 7, "float32")
    assert (matmul_size(a, b).macs, matmul_size(a, b).results) == (6 * 5 * 4 * 7, (a @ b).numel())
    x, weight = torch.zeros(2, 3, 7, dtype=torch.bfloat16), torch.zeros(4, 7)
    assert linear_size(x, weight) == ProductSize(1, 6, 4, 7, "bfloat16")
    assert linear_size(torch.zeros(5, 0), torch.zeros(4, 0)).results == 20
    assert linear_size(torch.zeros(7), weight).rows == 1


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 5)), ((3,), (3, 2)), ((2, 2, 3), (3, 3, 2))])
def test_operands_of_matmul_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ContractError, match=r"were given: pass"):
        matmul_size(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize(
    ("x", "weight", "bias"), [((2, 3), (4, 5), None), ((), (4, 1), None), ((3,), (4, 3, 1), None), ((3,), (4, 3), (3,))]
)
def test_operands_of_linear_that_do_not_fit_are_refused(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    with pytest.raises(ContractError, match=r"were given: pass"):
        linear_size(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))


@pytest.mark.parametrize("ask", ["__call__", "estimate"])
@pytest.mark.parametrize(
    ("operands", "options", "said"),
    [
        (1, {"tims": 3}, "option 'tims' was given to doubled: did you mean 'times'[?] It takes x, times"),
        (1, {"zzz": 3}, "option 'zzz' was given to doubled: leave it out; it takes x, times"),
        (0, {}, r"doubled: missing a required argument: 'x': call doubled\(x, \*, times=1\)"),
        (2, {}, r"doubled: too many positional arguments: call doubled\(x, \*, times=1\)"),
    ],
)
def test_operands_and_options_that_a_kernel_does_not_have_are_refused_with_those_it_has(
    ask: str, operands: int, options: dict[str, int], said: str
) -> None:
    with pytest.raises(ContractError, match=said):
        getattr(Doubled(DEVICE), ask)(*[torch.ones(1)] * operands, **options)


def test_an_operand_that_is_no_tensor_is_refused_by_its_name() -> None:
    with pytest.raises(ContractError, match="b of type list was given: pass a tensor"):
        matmul_size(torch.zeros(2, 3), [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="weight of type NoneType was given: pass a tensor"):
        linear_size(torch.zeros(2, 3), None)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="bias of type int was given: pass a tensor or None"):
        linear_size(torch.zeros(2, 3), torch.zeros(4, 3), 1)  # type: ignore[arg-type]

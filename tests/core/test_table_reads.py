"""What tables and block plans hold is read on the host, and never from an accelerator, unless the caller left out a
length or set HAL_CHECK=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import hal_core as hal
from hal_core import BlockPlan, ContractError, SequenceMetadata
from hal_core.frontend import dispatch
from hal_core.frontend.operands import Operands
from hal_core.frontend.validation import CallOptions, build_request


def zeros(*shape: int, device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def packed(device: str) -> Operands:
    query = zeros(1, 4, 256, 64, device=device, dtype=torch.float32)
    ends = torch.tensor([0, 100, 156, 256], dtype=torch.int32, device=device)
    return Operands(query, query, query, tables=SequenceMetadata(ends, ends))


def paged(device: str) -> Operands:
    query, pages = zeros(2, 4, 1, 64, device=device, dtype=torch.float32), zeros(16, 4, 32, 64, device=device).float()
    tables = SequenceMetadata(page_table=zeros(2, 3, device=device), cache_seqlens=zeros(2, device=device))
    return Operands(query, pages, pages, tables=tables)


def planned(device: str) -> Operands:
    query = zeros(1, 4, 256, 64, device=device, dtype=torch.float32)
    plan = BlockPlan(64, 64, zeros(1, 1, 4, 2, device=device), zeros(1, 1, 4, device=device))
    return Operands(query, query, query, plan=plan)


def describe(operands: Operands, **options: Any) -> Any:
    return dispatch.describe(operands, 0, tuple(CallOptions(**options)), (None,) * 5)


@pytest.mark.parametrize(
    ("operands", "options"),
    [(packed, {"max_seqlen_q": 100, "max_seqlen_k": 100}), (paged, {}), (planned, {})],
    ids=["packed", "paged", "block plan"],
)
def test_nothing_is_read_from_an_accelerator(operands: Callable[[str], Operands], options: dict[str, Any]) -> None:
    with FakeTensorMode():  # its tensors hold nothing: reading one raises
        request, _ = describe(operands("cuda"), **options)
    assert request.device == "cuda:0"


@pytest.mark.parametrize("given", [{}, {"max_seqlen_q": 100}, {"max_seqlen_k": 100}])
def test_a_length_that_is_not_given_is_read_from_the_tables(given: dict[str, int]) -> None:
    request = build_request(packed("cpu"), CallOptions(**given), frozenset())
    assert (request.len_q, request.len_k) == (100, 100)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        describe(packed("cuda"), **given)


def test_packed_lengths_that_are_not_given_compute_the_same(cpu: str, generator: torch.Generator) -> None:
    tensors = [torch.randn(1, 4, 256, 64, generator=generator) for _ in range(3)]
    ends = torch.tensor([0, 100, 156, 256], dtype=torch.int32)
    tables = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "is_causal": True, "backend": cpu}
    assert torch.equal(
        hal.attention(*tensors, **tables), hal.attention(*tensors, **tables, max_seqlen_q=100, max_seqlen_k=100)
    )


def test_hal_check_reads_tables_wherever_they_lie(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound call trusts its tables, as a call on an accelerator does."""
    wrong = {
        packed: SequenceMetadata(*(torch.tensor([0, 200, 156, 256], dtype=torch.int32),) * 2),
        paged: SequenceMetadata(page_table=zeros(2, 3, device="cpu"), cache_seqlens=zeros(2, device="cpu") + 97),
    }
    for checked in ("0", "1"):
        monkeypatch.setenv("HAL_CHECK", checked)
        for operands, tables in wrong.items():
            given = operands("cpu")
            lengths = {"max_seqlen_q": 100, "max_seqlen_k": 100} if operands is packed else {}
            named = {n: t for n, t in given.tables._asdict().items() if t is not None}
            bound = hal.bind(*given[:3], **named, **lengths, backend=cpu)
            if checked == "1":
                with pytest.raises(ContractError, match=r"was given: (start at 0|use 0 to 96)"):
                    bound(*given[:3], tables=tables)
            else:
                bound(*given[:3], tables=given.tables)

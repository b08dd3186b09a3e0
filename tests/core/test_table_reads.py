"""What tables and block plans hold is read on the host, and never from an accelerator, unless the caller left out a
length or set HAL_CHECK=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import full
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import hal_core as hal
from hal_core import BlockPlan, ContractError, Range, SequenceMetadata
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


class Elsewhere:
    """Tensors of an accelerator: on the meta device, and taken for tensors with data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.described = 0
        plain = dispatch.describe

        def describe(*given: Any) -> Any:
            self.described += 1
            return plain(*given)

        monkeypatch.setattr(dispatch, "is_fake", lambda tensor: False)
        monkeypatch.setattr(dispatch, "describe", describe)

    def find(self, operands: Operands, **options: Any) -> Any:
        return dispatch.find(operands, 0, tuple(CallOptions(**options)), ("elsewhere", None, None, None, None))


@pytest.fixture
def elsewhere(fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    features = full().features | {"packed", "paged", "used_lengths"}
    fake("elsewhere", reads=("meta",), capabilities=full(features=features, page_sizes=Range(1)))
    return Elsewhere(monkeypatch)


LENGTHS = {"max_seqlen_q": 100, "max_seqlen_k": 100}


@pytest.mark.parametrize(
    ("operands", "options"), [(packed, LENGTHS), (paged, {}), (planned, {})], ids=["packed", "paged", "block plan"]
)
def test_a_call_with_tables_or_a_plan_is_described_once(
    elsewhere: Elsewhere, operands: Callable[[str], Operands], options: dict[str, Any]
) -> None:
    first = elsewhere.find(operands("meta"), **options)
    assert elsewhere.find(operands("meta"), **options) is first
    assert elsewhere.described == 1


def _longer(given: Tensor, place: int, by: int) -> Tensor:
    shape = list(given.shape)
    shape[place] += by
    return given.new_empty(shape)


@pytest.mark.parametrize("change", ["tokens", "sequences", "dtype", "longest", "unknown"])
def test_packed_calls_of_other_sizes_are_described_anew(elsewhere: Elsewhere, change: str) -> None:
    elsewhere.find(packed("meta"), **LENGTHS)
    given, options = packed("meta"), dict(LENGTHS)
    if change == "tokens":
        tensor = _longer(given.query, 2, 1)
        given = given._replace(query=tensor, key=tensor, value=tensor)
    elif change == "sequences":
        ends = _longer(given.tables.cu_seqlens_q, 0, 1)
        given = given._replace(tables=SequenceMetadata(ends, ends))
    elif change == "longest":
        options["max_seqlen_q"] = 101
    elif change == "unknown":  # the tables are read
        options["max_seqlen_q"] = None
    else:
        given = given._replace(tables=SequenceMetadata(*(end.long() for end in given.tables[:2])))
    if change in ("dtype", "unknown"):
        with pytest.raises((ContractError, RuntimeError)):
            elsewhere.find(given, **options)
    else:
        elsewhere.find(given, **options)
    assert elsewhere.described == 2


@pytest.mark.parametrize("change", ["rows", "blocks", "kind", "device"])
def test_a_plan_that_does_not_fit_is_refused_after_one_that_did(elsewhere: Elsewhere, change: str) -> None:
    given = planned("meta")
    elsewhere.find(given)
    plan: Any = given.plan
    changed = {
        "rows": plan._replace(counts=_longer(plan.counts, 2, 1)),
        "blocks": plan._replace(block_q=32),
        "kind": tuple(plan),
        "device": plan._replace(indices=torch.empty(plan.indices.shape, dtype=torch.int32)),
    }[change]
    with pytest.raises(ContractError, match="block_plan"):
        elsewhere.find(given._replace(plan=changed))


def test_pages_that_do_not_match_their_values_are_refused_after_some_that_did(elsewhere: Elsewhere) -> None:
    given = paged("meta")
    elsewhere.find(given)
    with pytest.raises(ContractError, match=r"key .* and value"):
        elsewhere.find(given._replace(value=_longer(given.value, 0, 1)))


def test_tables_of_a_processor_are_checked_in_each_call(fake: Callable[..., Any]) -> None:
    fake("here", capabilities=full(features=full().features | {"packed"}))
    given, options = packed("cpu"), tuple(CallOptions(**LENGTHS))
    overrides = ("here", None, None, None, None)
    dispatch.find(given, 0, options, overrides)
    ends = torch.tensor([0, 200, 156, 256], dtype=torch.int32)
    with pytest.raises(ContractError, match="start at 0"):
        dispatch.find(given._replace(tables=SequenceMetadata(ends, ends)), 0, options, overrides)

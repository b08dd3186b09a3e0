"""What a check finds: a failure, a skip, or a measured error; and the result of one call."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import Grads
from ..plugins import raised_at


class Failure(Exception):  # noqa: N818 - a finding, not an error of the program
    """A check's finding against the device, with the worst error and the bound it broke where there are such."""

    def __init__(self, detail: str, error: float | None = None, bound: float | None = None) -> None:
        super().__init__(detail)
        self.error, self.bound = error, bound


class Skip(Exception):  # noqa: N818
    """A check that has nothing to look at on this device, and why."""


def raised_text(error: BaseException) -> str:
    """An exception's type, message and place, in one line: the plugin's line where its code was running."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({raised_at(error) or f'{last.filename}:{last.lineno}'})"


class Measure(NamedTuple):
    """What a passed check saw: the error closest to its bound, and a warning that does not fail the device."""

    error: float | None = None
    bound: float | None = None
    detail: str = ""
    warning: str = ""

    @property
    def share(self) -> float:
        return 0.0 if not self.error else self.error / self.bound if self.bound else math.inf


class Outcome(NamedTuple):
    """What a device, or the reference, gave for a case."""

    out: Tensor
    lse: Tensor | None
    grads: Grads


@contextmanager
def one_thread() -> Iterator[None]:
    """Small float64 products are much faster on one thread where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_host(value: Any) -> Any:
    """Tensors, also inside tuples, on the host; anything else as it is."""
    return tree_map_only(Tensor, Tensor.cpu, value)


def bounded(about: str, error: float, bound: float) -> Measure:
    """The error as a measure. Raises Failure where it is above the bound, or NaN."""
    if not error <= bound:
        raise Failure(f"{about} is off by {error:.2g}, {bound:.2g} allowed", error, bound)
    return Measure(error, bound)


def pairs(a: Outcome, b: Outcome) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors that both results have: output, log-sum-exp and gradients."""
    both = zip((a.out, a.lse, *a.grads), (b.out, b.lse, *b.grads), strict=True)
    return ((x, y) for x, y in both if x is not None and y is not None)

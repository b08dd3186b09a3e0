"""What ranks send each other: torch.distributed's operations with a time-out that names rank, step and peer."""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hal_core import HalError

# torch 2.13 renames both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: Seconds that a rank waits for another one, where the call does not say.
TIMEOUT = 300.0


_LATE, _LOST = ("timed out", "timeout"), ("connection", "closed", "reset", "broken pipe")


class ExchangeError(HalError, RuntimeError):
    """Another rank did not answer in time, or is gone. The process group cannot be used any more."""


class Link:
    """One rank's side of a process group.

    Attributes:
        rank, size: within the group. ranks: global ranks of its members. timeout: seconds of every wait.
        device: torch device whose tensors the group sends.
    """

    def __init__(self, group: Any, timeout: float, device: torch.device) -> None:
        self.group, self.timeout, self.device = group, timeout, device
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.ranks)

    def failed(self, what: str, error: Exception) -> ExchangeError:
        """The error of a wait, with this rank's name."""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late, lost = (any(word in str(error).lower() for word in words) for words in (_LATE, _LOST))
        happened = f"nothing came within {self.timeout:g} s" if late else "the connection is lost" if lost else "failed"
        return ExchangeError(
            f"rank {dist.get_rank()} waited for {what}, and {happened} ({first}): look at that rank's own error, then "
            "start all ranks again"
        )

    def begin(self, start: Callable[[], Sequence[Any]], what: str) -> Callable[[], None]:
        """Start operations: what waits for them."""
        return partial(self.wait, self._tried(start, what), what)

    def wait(self, works: Sequence[Any], what: str) -> None:
        for work in works:
            if work is not None:
                self._tried(partial(work.wait, timedelta(seconds=self.timeout)), what)

    def _tried(self, step: Callable[[], Any], what: str) -> Any:
        try:
            return step()
        except RuntimeError as error:
            raise self.failed(what, error) from error

    def shift(self, send: Sequence[Tensor], receive: Sequence[Tensor], hops: int, what: str) -> Callable[[], None]:
        """Send tensors to the rank `hops` further on and receive from the one `hops` before, until what this returns is
        called.
        """
        to, source = (self.rank + hops) % self.size, (self.rank - hops) % self.size
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=to) for tensor in send]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=source) for tensor in receive]
        what = f"{named(list(dict.fromkeys((self.ranks[source], self.ranks[to]))))} ({what})"
        return self.begin(lambda: dist.batch_isend_irecv(operations), what)

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """[ranks, *shape]: every rank's tensor; all have one shape."""
        if self.size == 1 or not tensor.numel():
            return tensor.expand(self.size, *tensor.shape).contiguous()
        return self._run(_all_gather, tensor, (self.size, *tensor.shape), what)

    def all_to_all(self, tensor: Tensor, what: str) -> Tensor:
        """[ranks, ...]: the part that every rank holds for this one; part i of `tensor` goes to rank i."""
        if self.size == 1 or not tensor.numel():
            return tensor
        return self._run(dist.all_to_all_single, tensor, tensor.shape, what)

    def reduce_scatter(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over the ranks of part i of [ranks, ...], on rank i."""
        if self.size == 1 or not tensor.numel():
            return tensor[0]
        return self._run(_reduce_scatter, tensor, tensor.shape[1:], what)

    def _run(self, collective: Any, tensor: Tensor, shape: Sequence[int], what: str) -> Tensor:
        """A new tensor of this shape, which a collective operation fills from the given one."""
        plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor  # not every group sends bool
        flat = plain.contiguous().flatten()
        found = flat.new_empty(math.prod(shape))
        what = f"{named([rank for rank in self.ranks if rank != self.ranks[self.rank]])} ({what})"
        self.begin(lambda: [collective(found, flat, group=self.group, async_op=True)], what)()
        return found.view(tensor.dtype).view(shape)


def named(ranks: Sequence[int]) -> str:
    """Ranks for messages."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


_Change = Callable[[Tensor], Tensor]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: _Change, back: _Change) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad), None, None


def exchanged(tensor: Tensor, there: _Change, back: _Change) -> Tensor:
    """`there(tensor)`, whose gradient comes through `back`."""
    found: Tensor = _Exchange.apply(tensor, there, back)  # type: ignore[no-untyped-call]
    return found


def _traded(tensor: Tensor, link: Link, split: int, join: int, what: str) -> Tensor:
    return torch.cat(list(link.all_to_all(torch.stack(tensor.chunk(link.size, split)), what)), join)


def gather_tokens(tensor: Tensor, link: Link, dim: int, what: str) -> Tensor:
    """Every rank's tensor joined along `dim`, in the order of ranks. Gradients are summed in at least float32."""
    if math.prod(tensor.shape) == 0 or link.size == 1:
        return tensor if link.size == 1 else torch.cat([tensor] * link.size, dim)

    def back(grad: Tensor) -> Tensor:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return link.reduce_scatter(torch.stack(wide.chunk(link.size, dim)), f"gradients of {what}").to(tensor.dtype)

    return exchanged(tensor, lambda given: torch.cat(list(link.all_gather(given, what)), dim), back)


def trade(tensor: Tensor, link: Link, split: int, join: int, what: str) -> Tensor:
    """Cut a tensor along `split` into a part for each rank, and join what the ranks hold for this one along `join`."""
    if link.size == 1:
        return tensor
    there = partial(_traded, link=link, split=split, join=join, what=what)
    back = partial(_traded, link=link, split=join, join=split, what=f"gradients of {what}")
    return exchanged(tensor, there, back)

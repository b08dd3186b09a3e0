"""The GPU's session: binds a request to its path and turns the runtime's failures into this project's errors."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    Autograd,
    BlockPlan,
    ContractError,
    Device,
    DeviceUnavailableError,
    Grads,
    MemoryLimitError,
    MemoryManager,
    SequenceMetadata,
    SessionBase,
    TilePlan,
    UnsupportedError,
)

from . import cost, paths
from .cost import Rates
from .discovery import Chip
from .kernels import composed
from .kernels.cudnn import CudnnBackward, CudnnForward
from .kernels.fp8.launch import Fp8Path
from .kernels.gradients import OwnBackward, differentiable
from .kernels.hopper.launch import HopperPath
from .kernels.hopper.packed import PackedHopperPath
from .kernels.hopper_masked.launch import HopperMaskedPath
from .kernels.portable.launch import PortablePath
from .kernels.portable.short_launch import ShortPath, takes as short_takes
from .kernels.skipping.launch import SkippedTiles, SkippingPath, Tally
from .memory import CudaMemory, StreamWorkspaces
from .runtime.context import Context
from .tiling import CudaTiling

Path = Callable[..., AttentionOutput]
_MOST_BOUND = 512
#: How Triton's launcher and torch begin the message of a CUDA call that failed; torch's newer errors have a class.
_LAUNCH_FAILED = ("Triton Error [CUDA]", "CUDA error", "CUDA driver error")


class Prepared(NamedTuple):
    """Operands bound to a request; they lie where the kernels read them, so nothing is copied."""

    query: Tensor
    key: Tensor
    value: Tensor
    request: AttentionRequest
    plan: BlockPlan | TilePlan | None
    tables: SequenceMetadata | None


class CudaSession(SessionBase):
    """An open GPU. Calls are ordered by torch's current stream and may come from any thread of the process that opened
    it.

    Args:
        device: what was found. chip: its facts. rates: () -> what paths take. memory: None for torch's allocator.
        paths: the paths that may run; None for all. For measurements.
    """

    def __init__(
        self,
        device: Device,
        chip: Chip,
        rates: Callable[[], Rates],
        memory: MemoryManager | None = None,
        paths: frozenset[str] | None = None,
    ) -> None:
        super().__init__(memory or CudaMemory(chip.index, name=device.id), CudaTiling(chip, self.path_of_lengths))
        self.device, self.chip, self._rates, self._paths = device, chip, rates, paths
        assert isinstance(self.tiling, CudaTiling)
        self._context = Context(chip, self.memory, StreamWorkspaces(self.memory), self.tiling)
        self._bound: dict[AttentionRequest, tuple[Path, Callable[..., Tensor]]] = {}
        self._backwards: dict[AttentionRequest, Callable[..., Grads]] = {}
        # By the request's identity, which is kept with it: a request takes longer to hash than the rest of the search.
        self._met: dict[tuple[int, bool], tuple[AttentionRequest, Callable[..., Grads]]] = {}
        self._timed: deque[tuple[Any, Any, Callable[[float], None]]] = deque()
        self._tally: Tally | None = None
        self._lost = ""
        _open.add(self)

    def _forked(self) -> None:
        self._lost = (
            f"{self.device.id} was opened before this process was forked, and CUDA does not survive a fork: start "
            "workers with multiprocessing's 'spawn'"
        )
        self.refresh()

    def autograd(self, request: AttentionRequest) -> Autograd:
        """explicit where own kernels give the gradients, native where torch's attention or operations do."""
        return "explicit" if self.path_of(request) in cost.OWN else "native"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """Query rows of a program for head_dim 128, and how many programs the call gives."""
        rows = 128 if sequence_length > 64 else 16
        return {"tile_size": rows, "programs": -(-sequence_length // rows) * batch_size * num_heads}

    def take_workspaces(self) -> None:
        """Allocate what decoding steps leave to those after them. Not while a CUDA graph is captured."""
        self._context.workspaces.prepare()

    def path_of(self, request: AttentionRequest) -> str:
        """The name of the path that runs a request (see `cost.label`)."""
        allowed = self._paths
        if allowed is None:
            return paths.choose(request, self.chip, self._rates()).path
        return paths.choose(request, self.chip, self._rates(), lambda path: path in allowed).path

    def outpaces(self, request: AttentionRequest, backend: str) -> bool:
        """Whether an own kernel is estimated to be as fast as a backend of torch ("cudnn", "flash", "efficient"), or is
        the only one of the two that is known to be right for a request.
        """
        own_or_backend = (*cost.OWN, backend)
        return paths.choose(request, self.chip, self._rates(), lambda path: path in own_or_backend).path in cost.OWN

    def path_of_lengths(self, request: AttentionRequest) -> str:
        """The same of a request whose lengths are exact, which a path may hand on to another one."""
        return paths.path_of_lengths(self.path_of(request), request)

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        """The fastest callable (query, key, value, mask, plan, tables, rng) for requests like this one."""
        return self._calls(request)[0 if request.lse else 1]

    def _calls(self, request: AttentionRequest) -> tuple[Path, Callable[..., Tensor]]:
        """A request's path, guarded: with an AttentionOutput for its result, and with the output alone."""
        if self._lost:
            raise DeviceUnavailableError(self._lost)
        calls = self._bound.get(request)
        if calls is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            path = self._made(request)
            calls = self._bound[request] = self._guarded(request, path, False), self._guarded(request, path, True)
        return calls

    def _made(self, request: AttentionRequest) -> Path:
        path = self._bound_to(paths.forward_path(self.path_of(request), request, self.chip), request)
        if request.lse and paths.lends_to_cudnn(request, self.chip):

            def faster(len_q: int, len_k: int) -> bool:
                return self.lent_to_cudnn(replace(request, len_q=len_q, len_k=len_k))

            return CudnnForward(request, path, faster)
        return path

    def lent_to_cudnn(self, request: AttentionRequest) -> bool:
        """Whether cuDNN is estimated to be the fastest at the lengths of a request that own kernels may serve too."""
        return paths.lends_to_cudnn(request, self.chip) and self.path_of(replace(request, lse=False)) == "cudnn"

    def _bound_to(self, name: str, request: AttentionRequest) -> Path:
        if name == "portable":
            portable = PortablePath(request, self._context)
            if short_takes(request):
                return ShortPath(request, self._context, portable)
            if request.grads and self.path_of(replace(request, grads=frozenset())) == "masked":
                return HopperMaskedPath(request, self._context, portable)
            return portable
        if name == "masked":
            return HopperMaskedPath(request, self._context, PortablePath(request, self._context))
        if name == "hopper":
            kind = PackedHopperPath if request.packed else HopperPath
            return kind(request, self._context, PortablePath(request, self._context))
        if name == "fp8":
            return Fp8Path(request, self._context)
        if name == "skipping":
            self._tally = self._tally or Tally(self._context)
            return SkippingPath(request, self._context, self._tally)
        if name == "composed":
            return lambda *given: composed.attend(request, self._context, *given)
        return self._native(name, request)

    def _native(self, name: str, request: AttentionRequest) -> Path:
        attend = paths.bind_torch(name, request)
        if request.grads:
            own = PortablePath(replace(request, lse=True), self._context)
            instead: Path = differentiable(request, self._context, own)
        else:
            instead = PortablePath(request, self._context)

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> AttentionOutput:
            if not paths.torch_takes_lengths(name, request, query.shape[2], key.shape[2]):
                return instead(query, key, value, mask, *rest)
            return AttentionOutput(attend(query, key, value, mask))

        return run

    def _guarded(self, request: AttentionRequest, path: Path, alone: bool) -> Callable[..., Any]:
        """Empty tensors answered and failures named: a call returns a result whose launches were all accepted, or
        raises.

        alone: the output, without the log-sum-exp.
        """
        index, several = self.chip.index, self._several()

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            plan: BlockPlan | TilePlan | None = None,
            tables: SequenceMetadata | None = None,
            rng: tuple[int, int] | None = None,
        ) -> Any:
            if self._lost:
                raise DeviceUnavailableError(self._lost)
            if not hasattr(_thread, "ready"):
                self._enter_thread()
            try:
                if not (query.numel() and key.numel()):
                    result = _nothing(query, key, value, mask, request)
                elif several and torch.cuda.current_device() != index:
                    with torch.cuda.device(index):
                        result = path(query, key, value, mask, plan, tables, rng)
                else:
                    result = path(query, key, value, mask, plan, tables, rng)
                return result[0] if alone else result
            except RuntimeError as error:
                named = self._named(request, error)
                if named is None:
                    raise
                raise named from error

        return run

    def _enter_thread(self) -> None:
        """Make the device's context current in a thread that has called nothing of CUDA's runtime: kernels are launched
        by the driver, which wants one. While a graph is captured there is one.
        """
        if self.device.reads[0] != "cpu":
            if torch.cuda.is_current_stream_capturing():
                return
            torch.zeros((), device=self.device.reads[0])
        _thread.ready = True

    def _several(self) -> bool:
        """Whether another GPU may be torch's current one."""
        return self.device.reads[0] != "cpu" and torch.cuda.device_count() > 1

    def _named(self, request: AttentionRequest, error: RuntimeError) -> Exception | None:
        """What a failure of the device is told as; None for any other error."""
        if isinstance(error, torch.OutOfMemoryError):
            return self._full(request)
        if not isinstance(error, torch.AcceleratorError) and not str(error).startswith(_LAUNCH_FAILED):
            return None
        # The driver's message: a kernel's code and stack lie in the same memory.
        return self._full(request) if "out of memory" in str(error) else self._not_started(request, error)

    def _not_started(self, request: AttentionRequest, error: RuntimeError) -> DeviceUnavailableError:
        return DeviceUnavailableError(
            f"{self.device.id} did not start a kernel of this attention ({request.describe()}): "
            f"{str(error).splitlines()[0]}; no result was returned: ask for a smaller batch, or start the process anew "
            "where earlier CUDA work has failed"
        )

    def _full(self, request: AttentionRequest) -> MemoryLimitError:
        free, total = torch.cuda.mem_get_info(self.chip.index)
        needed = cost.memory(request, self.path_of(request), self.chip)
        return MemoryLimitError(self.device.id, needed, total - free, total)

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: BlockPlan | TilePlan | None = None,
        tables: SequenceMetadata | None = None,
    ) -> Prepared:
        """Tiles are the device's own choice; `tile_size` does not change a result, so it is left aside."""
        return Prepared(query, key, value, request, plan, tables)

    def compute_attention(
        self,
        prepared: Prepared,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        request, given = prepared.request, prepared.query if query is None else query
        if mask is not None and mask.dim() != 4:
            mask = mask[(None,) * (4 - mask.dim())]
        if request.dropout and rng is None:
            raise ContractError("dropout without rng was given: pass rng=(seed, offset)")
        result = self._calls(request)[0](given, prepared.key, prepared.value, mask, prepared.plan, prepared.tables, rng)
        return result if out is None else AttentionOutput(out.copy_(result.out), result.lse)

    def compute_attention_backward(
        self,
        prepared: Prepared,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        own: bool = False,
    ) -> Grads:
        """Gradients by own kernels, or by cuDNN where it is estimated to be the fastest at the request's lengths,
        whatever path the forward took.

        Args:
            own: by own kernels alone, for callers that have decided.

        Raises:
            UnsupportedError: a paged or quantised cache, used lengths, or float64.
            ContractError: dropout without rng; no log-sum-exp of every row.
        """
        request = prepared.request
        if lse is None or lse.shape != out.shape[:3]:
            found = "none" if lse is None else f"one of shape {tuple(lse.shape)}"
            raise ContractError(
                f"a gradient needs the forward's log-sum-exp of shape {tuple(out.shape[:3])}, and {found} "
                "was given: run the forward with lse=True in its request (return_lse=True)"
            )
        cached = request.page_size is not None or request.used or request.cache_dtype is not None
        if cached or request.dtype == "float64":
            what = "a cache" if cached else "float64"
            raise UnsupportedError(
                f"a backward of {what} from a given output was asked of {self.device.id}, and float32, bfloat16 and "
                "float16 on plain keys are offered: call hal.attention with tensors that require gradients"
            )
        if request.dropout and rng is None:
            raise ContractError("dropout without rng was given: pass the forward's rng=(seed, offset)")
        if self._lost:
            raise DeviceUnavailableError(self._lost)
        if not hasattr(_thread, "ready"):
            self._enter_thread()
        query, key, value = prepared.query, prepared.key, prepared.value
        if not (query.numel() and key.numel()):
            of_mask = None if mask is None or "mask" not in request.grads else torch.zeros_like(mask)
            return Grads(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), of_mask)
        if mask is not None and mask.dim() != 4:
            mask = mask[(None,) * (4 - mask.dim())]
        given = (query, key, value, out, lse, grad_out, mask, prepared.plan, prepared.tables)
        try:
            if self._several() and torch.cuda.current_device() != self.chip.index:
                with torch.cuda.device(self.chip.index):
                    return self._backward(request, own)(*given, grad_lse=grad_lse, rng=rng)
            return self._backward(request, own)(*given, grad_lse=grad_lse, rng=rng)
        except RuntimeError as error:
            named = self._named(request, error)
            if named is None:
                raise
            raise named from error

    def _backward(self, request: AttentionRequest, own: bool) -> Callable[..., Grads]:
        """The backward of a request, kept. own: by own kernels alone."""
        met = self._met.get((id(request), own))
        if met is not None:
            return met[1]
        if len(self._met) >= _MOST_BOUND:
            self._met.clear()
        found = self._backwards.get(request)
        if found is None:
            if len(self._backwards) >= _MOST_BOUND:
                self._backwards.clear()
            found = self._backwards[request] = OwnBackward(self.path_of(request), request, self._context)
        if not own and self.lent_to_cudnn(request):
            found = CudnnBackward(request, found)
        self._met[id(request), own] = (request, found)
        return found

    def skipped_tiles(self) -> SkippedTiles:
        """What calls with the option "skip_tiles" have skipped since this was last asked. Waits for the device."""
        return SkippedTiles(0, 0, 0.0) if self._tally is None else self._tally.read()

    def kernel(self, name: str) -> Callable[..., Any]:
        """A kernel beside attention, see `hal_cuda.kernels`."""
        from .kernels.extra import provided

        return provided.kernel(name, self.chip.index)

    def timer(self, report: Callable[[float], None]) -> Callable[[], None]:
        """Start timing a call on the device; the function that is returned ends it.

        Nothing waits for the device: `report(seconds)` is called by a later `timer`, or by `synchronize`, once the
        call's work is done. While a CUDA graph is captured nothing is timed.
        """
        if self.device.reads[0] == "cpu":
            begun = time.perf_counter()
            return lambda: report(time.perf_counter() - begun)
        self._report_times()
        if torch.cuda.is_current_stream_capturing():
            return lambda: None
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()

        def end() -> None:
            if not torch.cuda.is_current_stream_capturing():
                stop.record()
                self._timed.append((start, stop, report))

        return end

    def _report_times(self) -> None:
        """Report the calls whose work is done, in their order."""
        while self._timed:
            try:
                start, stop, report = self._timed.popleft()
            except IndexError:  # another thread was faster
                return
            if not stop.query():
                self._timed.appendleft((start, stop, report))
                return
            report(start.elapsed_time(stop) / 1e3)

    def synchronize(self) -> None:
        """Wait for all work on the device."""
        if self.device.reads[0] != "cpu":
            torch.cuda.synchronize(self.chip.index)
            self._report_times()

    def refresh(self) -> None:
        """Forget bound paths, after rates changed."""
        self._bound.clear()
        self._backwards.clear()
        self._met.clear()

    def close(self) -> None:
        """Give memory back; after it the session serves no call. May be called twice."""
        if not self.closed:
            self.refresh()
            if not self._lost:
                self._context.workspaces.close()
                super().close()
            self.closed = True


#: What a thread remembers: `ready` once it has the context of a device.
_thread = threading.local()

#: Sessions of this process. A fork's handlers stay for good: one for each session would keep all that measurements
#: open.
_open: WeakSet[CudaSession] = WeakSet()


def _after_fork() -> None:
    for session in _open:
        session._forked()


os.register_at_fork(after_in_child=_after_fork)


def _nothing(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, request: AttentionRequest
) -> AttentionOutput:
    """What rows without a key give: 0 and -inf. Connected to its inputs, so that gradients are 0 and not missing."""
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    lse = query.new_full(query.shape[:3], -math.inf, dtype=kind) if request.lse else None
    if request.grads:
        for given in (query, key, value, mask):
            if given is not None and given.requires_grad:
                zero = given.reshape(-1)[:0].sum()
                out = out + zero.to(out.dtype)
                lse = None if lse is None else lse + zero.to(kind)
    return AttentionOutput(out, lse)


__all__ = ["CudaSession", "Prepared"]

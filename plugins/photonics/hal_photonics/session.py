"""An open photonic device: attention and kernels on one chip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    Autograd,
    BlockPlan,
    Device,
    Estimate,
    Grads,
    SequenceMetadata,
    SessionBase,
    TilePlan,
    UnsupportedError,
)

from .cost import attention_cost, passes_of
from .kernels.attention import attend, attend_exactly
from .kernels.extra import KERNELS, Product
from .kernels.straight_through import with_gradients_of
from .memory import HeldBuffers, PhotonicMemory
from .profiles.profile import Profile
from .runtime.controller import ChipController
from .runtime.driver import Driver
from .simulator.attention import OpticalProducts, Programmed, program
from .simulator.chip import SimulatedDriver
from .simulator.core import drawn, generator, not_finite, without
from .tiling import PhotonicTiling


class Prepared:
    """Operands of a call, with keys and values programmed into the chip. Immutable.

    Attributes:
        query, key, value: as given. request: with the tensors' lengths. plan: the cut of the work.
        held: the buffers of `Programmed`. not_finite: [batch, heads_kv], heads whose key or value is not finite; None
            for none.
    """

    __slots__ = ("held", "key", "not_finite", "plan", "query", "request", "tile_size", "value")

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        request: AttentionRequest,
        plan: TilePlan,
        tile_size: int | None,
        held: HeldBuffers,
        bad: Tensor | None,
    ) -> None:
        self.query, self.key, self.value, self.request, self.plan = query, key, value, request, plan
        self.tile_size, self.held, self.not_finite = tile_size, held, bad


class PhotonicSession(ChipController, SessionBase):
    """An open chip. `compute_attention` may be called from any thread; its noise depends on `rng` alone.

    Attributes:
        device, driver, profile, core, report, recalibrations: see `ChipController`.
    """

    def __init__(
        self,
        device: Device,
        driver: Driver,
        *,
        straight_through: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        outputs, inputs = driver.profile.count("array.outputs"), driver.profile.tile_inputs
        SessionBase.__init__(
            self, PhotonicMemory(device.id), PhotonicTiling(device.id.partition(":")[0], outputs, inputs)
        )
        ChipController.__init__(self, device, driver, changed)
        self._straight_through = straight_through
        self.power_on()

    def autograd(self, request: AttentionRequest) -> Autograd:
        """native with the straight-through estimator, none without."""
        return "native" if self._straight_through else "none"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """The array's own tile: keys or outputs by inputs."""
        return {"block_k": self.profile.count("array.outputs"), "inputs": self.profile.tile_inputs}

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: TilePlan | BlockPlan | None = None,
        tables: SequenceMetadata | None = None,
    ) -> Prepared:
        """Program keys and values into the chip.

        Args:
            tile_size: the most query rows whose scores are kept at once; None for as many as fit.
            plan: of a tiling that the caller brought; None for the device's own.
        """
        request = _exact(request, query, key)
        if isinstance(plan, BlockPlan):
            raise UnsupportedError(f"{self.device.id} reads no block plans: expand the plan to a mask")
        if plan is None:
            plan = self._own_plan(request, tile_size)
        batch, heads, len_k, dim = key.shape
        tiles = -(-dim // self.core.converters.inputs)
        held = HeldBuffers(
            self.memory, (key.shape, "float32"), ((batch, heads, len_k, tiles), "float32"), (value.shape, "float32")
        )
        with torch.no_grad():
            bad = _either(not_finite(key), not_finite(value))
            program(self.core, key, value, Programmed(*held.tensors), bad)
        return Prepared(query, key, value, request, plan, tile_size, held, bad)

    def compute_attention(
        self,
        prepared: Prepared,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        """Attention on the chip.

        A NaN or an infinity in query, key or value makes the rows of its batch entry and key head NaN,
        apart from rows whose keys are all masked, and leaves all others as they are.

        Args:
            rng: (seed, offset) of the readout noise; None draws a pair from torch's default generator.

        Raises:
            DeviceUnavailableError: the chip does not serve: its state, and what leads out of it.
        """
        self.require_service()
        query = prepared.query if query is None else query
        request, plan = prepared.request, prepared.plan
        if query.shape[2] != request.len_q:
            request = replace(request, len_q=query.shape[2])
            plan = self._own_plan(request, prepared.tile_size)
        held = Programmed(*prepared.held.tensors)
        products = OpticalProducts(self.core, held, generator(drawn(rng)), passes_of(request))
        with torch.no_grad():
            group_size = request.heads_q // request.heads_kv
            bad = _either(prepared.not_finite, _by_key_head(not_finite(query), group_size))
            clean = query if bad is None else without(query, bad.repeat_interleave(group_size, 1))
            shape = (*query.shape[:3], request.dim_v)
            found = torch.empty(shape, dtype=query.dtype) if out is None else out
            lse = torch.empty(shape[:3], dtype=torch.float32) if request.lse or bad is not None else None
            attend(products, clean, mask, request, plan, found, lse)
            if bad is not None and lse is not None:
                rows = bad.repeat_interleave(group_size, 1).unsqueeze(-1) & (lse != -torch.inf)
                found.masked_fill_(rows.unsqueeze(-1), torch.nan)
                lse.masked_fill_(rows, torch.nan)
        result = AttentionOutput(found, lse if request.lse else None)
        if self._straight_through and request.grads:
            exact = attend_exactly(query, prepared.key, prepared.value, mask, request, plan)
            return with_gradients_of(result, exact)
        return result

    def compute_attention_backward(self, prepared: Any, *given: Any, **named: Any) -> Grads:
        """Always refused: gradients go the native way."""
        raise UnsupportedError(
            f"{self.device.id} has no backward of its own: register it with straight_through=True for gradients of "
            "exact attention at the chip's output"
        )

    def cost(self, prepared: Prepared) -> Estimate:
        """Modelled time and energy of the call that was prepared, in the chip's present state."""
        duty, state = self.condition
        return attention_cost(self.profile, prepared.request, prepared.plan, duty=duty, state=state).estimate()

    def kernel(self, name: str) -> Product:
        """A kernel of `hal_photonics.kernels.extra` on this chip.

        Raises:
            UnsupportedError: no such kernel.
        """
        if name not in KERNELS:
            raise UnsupportedError(f"{self.device.id} has no kernel {name!r}: it has {', '.join(sorted(KERNELS))}")
        return KERNELS[name](self)

    def _own_plan(self, request: AttentionRequest, tile_size: int | None) -> TilePlan:
        plan = self.tiling.plan(request, {"block_q": tile_size} if tile_size else {})
        assert isinstance(plan, TilePlan)
        return plan


def open_simulated(
    device: Device, profile: Profile, *, straight_through: bool, changed: Callable[[], None]
) -> PhotonicSession:
    """A session on a fresh simulated chip."""
    return PhotonicSession(device, SimulatedDriver(profile), straight_through=straight_through, changed=changed)


def _exact(request: AttentionRequest, query: Tensor, key: Tensor) -> AttentionRequest:
    """The request with the tensors' lengths, which may be below the bounds of a bucket."""
    len_q, len_k = query.shape[2], key.shape[2]
    return request if (len_q, len_k) == (request.len_q, request.len_k) else replace(request, len_q=len_q, len_k=len_k)


def _either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first | second


def _by_key_head(rows: Tensor | None, group_size: int) -> Tensor | None:
    """[batch, heads_q] -> [batch, heads_kv]: whether some head of the group is set."""
    return None if rows is None else rows.unflatten(1, (-1, group_size)).any(-1)

"""What `hal bench cuda:0` adds: this package's own kernels and the installed peers as columns, clocks and power,
ceilings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BenchSetup, Call, Causal, Ceilings, Device

from . import _nvml, dispatch
from .calibrate import on_path
from .chip import Chip
from .peers import Peers
from .rates import Rates

#: Columns of the own kernels, by path.
OWN = {"hopper": "own Hopper", "portable": "own Triton"}


class CudaBench:
    """One GPU under `hal bench`. The second-level cache is flushed before each call, so that every read comes from
    memory.
    """

    def __init__(
        self, device: Device, chip: Chip, rates: Rates, gpu: _nvml.Gpu | None, peers: Peers | None = None
    ) -> None:
        self._device, self._chip, self._rates, self._gpu = device, chip, rates, gpu
        self._peers = peers or Peers()

    def setup(self) -> BenchSetup:
        cache = torch.empty(256 << 20, dtype=torch.uint8, device=self._device.reads[0])
        ceilings = Ceilings(self._rates.matrix, self._rates.bandwidth, self._rates.source)
        flush = partial(
            cache.random_, 0, 7
        )  # slower than zeros: the device is still busy when a call has been prepared
        return BenchSetup(self.calls, self.conditions, self.notes, flush, ceilings)

    def calls(self, request: AttentionRequest, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
        """Every own kernel that is right for the request, each alone, then the peers."""
        given = (query, key, value)
        paths = [path for path in dispatch.candidates(request, self._chip) if path in dispatch.OWN]
        own = {OWN[path]: self._bound(path, request, given) for path in paths}
        if request.dtype not in ("bfloat16", "float16") or request.causal is Causal.BOTTOM_RIGHT:
            return own
        return own | self._peers.dense(*given, causal=request.causal is Causal.TOP_LEFT)

    def _bound(self, path: str, request: AttentionRequest, given: Sequence[Tensor]) -> Callable[[], Any]:
        return partial(on_path(self._device, self._chip, self._rates, path, request), *given)

    def conditions(self) -> dict[str, Any]:
        """Clocks in MHz and board power in watts as they are now, and the driver; nothing where NVML does not
        answer.
        """
        if self._gpu is None:
            return {}
        try:
            return {
                "SM MHz": self._gpu.clock("sm"),
                "memory MHz": self._gpu.clock("memory"),
                "W": round(self._gpu.power()),
                "driver": self._device.driver,
            }
        except _nvml.NvmlError:
            return {}

    def notes(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self._peers.versions.items())
        return [
            f"own columns run one kernel of this package alone, hal and bound what dispatch chose; peers: {versions}",
            "second-level cache flushed before each call",
            *self._peers.notes,
        ]

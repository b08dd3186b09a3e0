"""The CUDA backend over host tensors: kernels run in Triton's interpreter, everything around them is the real code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from hal_cuda.backend import CAPABILITIES, CudaBackend
from hal_cuda.cost import Rates, estimate
from hal_cuda.discovery import Chip
from hal_cuda.memory import StreamWorkspaces
from hal_cuda.paths import choose
from hal_cuda.runtime.context import Context
from hal_cuda.session import CudaSession
from hal_cuda.tiling import CudaTiling

from hal_core import AttentionRequest, Capabilities, Device, Estimate, Fidelity, PooledMemory, Refusal

DEVICE = Device(
    id="interpreted:0",
    family="cuda",
    vendor="NVIDIA",
    model="Triton's interpreter",
    fidelity=Fidelity.EMULATED,
    reads=("cpu",),
)
CHIP = Chip(index=0, capability=(9, 0), multiprocessors=16, shared_memory=227 << 10, torch_attention=False)
RATES = Rates.assumed((9, 0), 132, None)


def context(chip: Chip = CHIP, path: str = "portable") -> Context:
    """What launches share, on the host."""
    memory = PooledMemory("cpu")
    return Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: path))


CONTEXT = context()


class InterpretedBackend:
    """One device that computes on the host. bfloat16 is left out: the interpreter cuts where a GPU rounds."""

    def devices(self) -> Sequence[Device]:
        return [DEVICE]

    def capabilities(self, device: Device) -> Capabilities:
        return attrs.evolve(CAPABILITIES, dtypes=CAPABILITIES.dtypes - {"bfloat16"})

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        backend = CudaBackend()
        backend._chips[device.id] = CHIP
        return backend.check(request, device)

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        return estimate(request, choose(request, CHIP, RATES), RATES, CHIP)

    def open(self, device: Device) -> CudaSession:
        return CudaSession(device, CHIP, lambda: RATES, memory=PooledMemory("cpu"))

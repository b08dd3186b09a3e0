"""Memory on a device: the buffer that travels by DLPack, and the counters of a memory manager."""

import math
from typing import Any, NamedTuple

from .errors import ContractError
from .request import DTYPE_BYTES


class MemoryStats(NamedTuple):
    """Counters of a memory manager, in bytes unless said otherwise.

    Attributes:
        in_use: held by live buffers. pooled: kept for reuse. peak: highest in_use since the last `trim()`.
        limit: None for none. allocations, reuses: buffers handed out in all, and out of the pool.
        copies, copied: copies that to_backend and to_torch had to make, and their bytes.
    """

    in_use: int
    pooled: int
    peak: int
    limit: int | None
    allocations: int
    reuses: int
    copies: int
    copied: int


class Buffer:
    """Memory on a device, [shape] of dtype, exported without a copy by DLPack.

    Attributes:
        owner: the memory manager that frees it. reserved: bytes that it occupies there, 0 for borrowed memory.
        shape, dtype: of the contents; `form` gives both. block: the manager's own record of the memory.
    """

    __slots__ = ("_tensor", "block", "dtype", "owner", "reserved", "shape")

    def __init__(
        self,
        tensor: Any,
        owner: object,
        reserved: int,
        block: Any = None,
        form: tuple[tuple[int, ...], str] | None = None,
    ) -> None:
        self._tensor, self.owner, self.reserved, self.block = tensor, owner, reserved, block
        self.shape, self.dtype = form or (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def freed(self) -> bool:
        return self._tensor is None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 1)

    @property
    def tensor(self) -> Any:
        """The memory as a torch tensor that shares it; valid for as long as that tensor lives."""
        if self._tensor is None:
            raise ContractError("this buffer was freed: allocate a new one")
        return self._tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def release(self) -> Any:
        """Give the tensor up. For memory managers. Raises ContractError the second time."""
        tensor, self._tensor = self.tensor, None
        return tensor

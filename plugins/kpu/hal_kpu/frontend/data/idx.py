"""IDX, the file format of MNIST: big-endian sizes after a magic number, then the values; gzip where the name ends in
.gz.

    byte 0, 1: zero    byte 2: type of the values    byte 3: number of dimensions    then each size as uint32, then
        values

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hal_core.plugin_api import ContractError, HalError, listing

#: The third byte of the magic number, and the big-endian type that it encodes.
TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class IdxError(HalError, ValueError):
    """A file that is not IDX, is cut short, or does not hold what is wanted."""


def read_idx(path: str | Path, *, magic: int | None = None) -> NDArray[np.generic]:
    """The values of an IDX file in the machine's byte order.

    Args:
        path: the file; one that ends in .gz is unpacked. magic: what its magic number must be (2051 for MNIST's images,
            2049 for its labels); None for any.

    Raises:
        IdxError: what is wrong with the file, and where. OSError: it cannot be read.
    """
    path = Path(path)
    data = _content(path)
    if len(data) < 4:
        raise IdxError(f"{path}: {len(data)} bytes: an IDX file begins with a magic number of 4")
    found = struct.unpack(">I", data[:4])[0]
    kind, dimensions = data[2], data[3]
    if found >> 16 or kind not in TYPES or not dimensions:
        wanted = "two zero bytes, a type and a number of dimensions"
        raise IdxError(f"{path}: magic number {found}: an IDX file begins with {wanted}")
    if magic is not None and found != magic:
        raise IdxError(f"{path}: magic number {found}: {magic} is wanted")
    head = 4 + 4 * dimensions
    if len(data) < head:
        raise IdxError(f"{path}: {len(data)} bytes: {dimensions} sizes need a head of {head}")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    dtype = np.dtype(TYPES[kind])
    needed = head + math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        sizes = " x ".join(map(str, shape))
        raise IdxError(f"{path}: {len(data):,} bytes: its sizes {sizes} need {needed:,}; the file is cut or has a tail")
    return np.frombuffer(data, dtype, offset=head).reshape(shape).astype(dtype.newbyteorder("="))


def write_idx(path: str | Path, values: NDArray[np.generic]) -> None:
    """Write an array as IDX; gzip, equal for equal values, where the path ends in .gz.

    Raises:
        ContractError: a type or shape that IDX does not have.
    """
    path, dtype = Path(path), values.dtype.newbyteorder(">")
    kinds = {np.dtype(name): kind for kind, name in TYPES.items()}
    if dtype not in kinds or not 0 < values.ndim < 256:
        names = listing(np.dtype(name).name for name in TYPES.values())
        given = f"an array of {values.dtype.name} with {values.ndim} dimensions was given"
        raise ContractError(f"{given}: IDX holds {names}, with 1 dimension or more")
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, kinds[dtype], values.ndim, *values.shape)
    data = head + values.astype(dtype).tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise IdxError(f"{path}: not a whole gzip file ({error}): download it again") from None

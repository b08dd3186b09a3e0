"""Storage formats of weights: rounding, packing into bytes, and back.

Integers are asymmetric: groups of weights along a row share a bfloat16 scale and a uint8 zero point, and
weight = (code - zero) * scale. Codes of 3, 5 and 6 bits are stored as fields of 4, 2 and 1 bits, so every width takes
exactly its bits. FP8 has a bfloat16 scale for each row.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0
#: Parts of a group's range that are tried as the range of narrow integers; the one with the least squared error is
#: taken. Clipping a few extreme weights rounds all others more finely.
_RANGES = (1.0, 0.92, 0.84, 0.76, 0.68)
_SEARCHED_BITS = 4
_COMPENSATED_BITS = 6
#: Added to the diagonal of the inputs' second moment, as a share of its mean, before it is inverted.
_DAMPING = 0.01


class PrecisionFormat(Enum):
    """A format that weights are stored in. `bits` of a weight are without scales."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT6 = "int6"
    INT5 = "int5"
    INT4 = "int4"
    INT3 = "int3"
    INT2 = "int2"

    @property
    def bits(self) -> int:
        """Bits of a weight, without its share of the scale."""
        return int("".join(c for c in self.value if c.isdigit()))

    @property
    def is_integer(self) -> bool:
        return self.value.startswith("int")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored tensor: uint8 for packed integers."""
        return _DTYPES.get(self.value, torch.uint8)

    def bytes_of(self, rows: int, columns: int, group: int) -> int:
        """Bytes that `rows` x `columns` weights take, scales and zero points included."""
        if self.is_integer:
            return rows * (columns * self.bits // 8 + columns // group * 3)
        return rows * (columns * self.bits // 8 + (2 if self is PrecisionFormat.FP8 else 0))


_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
FORMATS = tuple(PrecisionFormat)


class Packed(NamedTuple):
    """Weights of one format. values: floats [rows, columns], or packed codes, uint8 [rows, columns * bits / 8].
    scales: bfloat16 [rows, groups], or empty. zeros: uint8 [rows, groups], or empty.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


@lru_cache
def offered(device: str) -> tuple[PrecisionFormat, ...]:
    """Formats whose dtype the torch device converts from and to float32."""
    found = []
    for each in FORMATS:
        try:
            torch.ones(1, device=device).to(each.dtype).float()
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        found.append(each)
    return tuple(found)


def pack(weight: Tensor, form: PrecisionFormat, group: int, moment: Tensor | None = None) -> Packed:
    """Round weights [rows, columns] to a format.

    Args:
        weight: any float dtype; columns must divide by `group` for integers.
        moment: second moment of the inputs, float32 [columns, columns]. Narrow integers are then rounded column by
            column, and each column's error is made up for by those after it. The bytes are the same.

    Source: Frantar et al. 2023 (GPTQ), algorithm 1.
    """
    weight = weight.detach().float()
    none = weight.new_empty(0, dtype=torch.bfloat16), weight.new_empty(0, dtype=torch.uint8)
    if form is PrecisionFormat.FP8:
        scales = (weight.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(1e-30).bfloat16()
        values = (weight / scales.float()).clamp(-FP8_MAX, FP8_MAX).to(form.dtype)
        return Packed(values, scales, none[1])
    if not form.is_integer:
        return Packed(weight.to(form.dtype), *none)
    if moment is not None and form.bits <= _COMPENSATED_BITS:
        codes, scales, zeros = _round_compensated(weight, form.bits, group, moment.to(weight.device))
        return Packed(_pack_codes(codes, form.bits), scales, zeros)
    codes, scales, zeros = _round_groups(weight.unflatten(1, (-1, group)), form.bits)
    return Packed(_pack_codes(codes.flatten(1), form.bits), scales, zeros)


def unpack(packed: Packed, form: PrecisionFormat, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [rows, columns] that packed ones stand for, in `dtype`."""
    if not form.is_integer:
        values = packed.values.to(dtype)
        return values * packed.scales.to(dtype) if form is PrecisionFormat.FP8 else values
    codes = _unpack_codes(packed.values, form.bits).unflatten(1, (-1, group)).to(dtype)
    scales = packed.scales.unsqueeze(2).to(dtype)
    weight: Tensor = (codes - packed.zeros.unsqueeze(2).to(dtype)) * scales
    return weight.flatten(1)


def _round_groups(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 like the groups, bfloat16 scales, uint8 zeros [rows, groups]) of the least squared error."""
    top = 2**bits - 1
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    found: tuple[Tensor, Tensor, Tensor] | None = None
    best = grouped.new_zeros(())
    for part in _RANGES if bits <= _SEARCHED_BITS else _RANGES[:1]:
        scales = ((high - low) * part / top).clamp_min(1e-30).bfloat16()
        fine = scales.float()
        zeros = (-low * part / fine).round().clamp(0, top)
        codes = ((grouped / fine.unsqueeze(2)).round() + zeros.unsqueeze(2)).clamp(0, top)
        error = ((codes - zeros.unsqueeze(2)) * fine.unsqueeze(2) - grouped).square().sum(2)
        if found is not None:
            better = error < best
            codes = torch.where(better.unsqueeze(2), codes, found[0])
            scales, zeros = torch.where(better, scales, found[1]), torch.where(better, zeros, found[2])
            error = torch.where(better, error, best)
        found, best = (codes, scales, zeros), error
    assert found is not None
    return found[0].to(torch.uint8), found[1], found[2].to(torch.uint8)


def _round_compensated(weight: Tensor, bits: int, group: int, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_round_groups`, with codes [rows, columns], each column's error spread over the columns after it."""
    columns, top = weight.shape[1], 2**bits - 1
    damped = moment.double()
    mean = damped.diagonal().mean().clamp_min(1e-30)
    damped = damped / mean + _DAMPING * torch.eye(columns, dtype=torch.float64, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    left, codes, all_scales, all_zeros = weight.clone(), [], [], []
    for start in range(0, columns, group):
        _, scales, zeros = _round_groups(left[:, start : start + group].unsqueeze(1), bits)
        fine, zero = scales.float()[:, 0], zeros.float()[:, 0]
        errors = []
        for column in range(start, start + group):
            now = left[:, column]
            code = ((now / fine).round() + zero).clamp(0, top)
            error = (now - (code - zero) * fine) / spread[column, column]
            left[:, column + 1 : start + group] -= torch.outer(error, spread[column, column + 1 : start + group])
            codes.append(code.to(torch.uint8))
            errors.append(error)
        left[:, start + group :] -= torch.stack(errors, 1) @ spread[start : start + group, start + group :]
        all_scales.append(scales)
        all_zeros.append(zeros)
    return torch.stack(codes, 1), torch.cat(all_scales, 1), torch.cat(all_zeros, 1)


def _fields(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of the fields that codes are split into: powers of two, which divide a byte."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, shift))
            shift += width
    return found


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] as bytes [rows, columns * bits / 8]."""
    parts = []
    for width, shift in _fields(bits):
        field = (codes >> shift) & (2**width - 1)
        lanes = field.unflatten(1, (-1, 8 // width))
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        parts.append((lanes << shifts).sum(2, dtype=torch.uint8))
    return torch.cat(parts, 1)


def _unpack_codes(stored: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_codes`."""
    columns = stored.shape[1] * 8 // bits
    codes, start = None, 0
    for width, shift in _fields(bits):
        size = columns * width // 8
        part = stored[:, start : start + size]
        start += size
        if width < 8:
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=stored.device)
            part = ((part.unsqueeze(2) >> shifts) & (2**width - 1)).flatten(1)
        codes = part << shift if codes is None else codes | (part << shift)
    assert codes is not None
    return codes

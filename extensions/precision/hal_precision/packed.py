"""A linear layer that holds and computes from packed weights, each block of rows in its own format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hal_core import ContractError

from .config import QuantizationMode
from .formats import FORMATS, Packed, PrecisionFormat, pack, unpack

_INT8_MAX = 127.0


class _Region:
    """Where one format's rows lie in a layer's bytes: (start, bytes) of values, scales, zeros."""

    def __init__(self, form: PrecisionFormat, rows: int) -> None:
        self.form, self.rows = form, rows
        self.values = self.scales = self.zeros = (0, 0)


def _layout(counts: dict[PrecisionFormat, int], columns: int, group: int) -> tuple[list[_Region], int]:
    """Regions by format, and bytes in all. Wide dtypes come first, so that every view is aligned."""
    regions, place = [_Region(form, rows) for form, rows in counts.items()], 0

    def take(size: int) -> tuple[int, int]:
        nonlocal place
        place += size
        return place - size, size

    for region in regions:
        if region.form.dtype.itemsize > 1:
            region.values = take(region.rows * columns * region.form.dtype.itemsize)
    for region in regions:
        if region.form.is_integer or region.form is PrecisionFormat.FP8:
            region.scales = take(2 * region.rows * (columns // group if region.form.is_integer else 1))
    for region in regions:
        if region.form.dtype.itemsize == 1:
            region.values = take(region.rows * columns * region.form.bits // 8)
        if region.form.is_integer:
            region.zeros = take(region.rows * columns // group)
    return regions, place


class PackedLinear(nn.Module):
    """A linear layer whose weight [out, in] is stored packed, in one tensor of bytes.

    Tensors: `packed`, uint8 [bytes], regions of one format each; `formats`, uint8 [blocks], the place of each block's
    format in `FORMATS`; `bias`, a parameter or None; `input_scale`, float32, in static mode only.

    The weight is unpacked format by format when the layer is called, into the dtype of the input, and freed again.
    Gradients reach the input and the bias; the packed weight is constant.
    """

    packed: Tensor
    formats: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        formats: Sequence[PrecisionFormat],
        *,
        block_rows: int,
        group_size: int,
        mode: QuantizationMode = QuantizationMode.WEIGHT_ONLY,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_rows, self.group_size, self.mode = block_rows, group_size, mode
        self.bias = bias
        codes = torch.tensor([FORMATS.index(each) for each in formats], dtype=torch.uint8, device=device)
        self.register_buffer("formats", codes)
        self._arrange()
        self.register_buffer("packed", torch.zeros(self._size, dtype=torch.uint8, device=device))
        scale = torch.ones((), device=device) if mode is QuantizationMode.STATIC else None
        self.register_buffer("input_scale", scale)

    def _arrange(self) -> None:
        """Regions and the order of output pieces, from `formats`."""
        blocks = [FORMATS[code] for code in self.formats.tolist()]
        if len(blocks) != -(-self.out_features // self.block_rows):
            raise ContractError(
                f"A layer of {self.out_features} rows in blocks of {self.block_rows} has "
                f"{-(-self.out_features // self.block_rows)} formats, got {len(blocks)}."
            )
        self.blocks = tuple(blocks)
        counts: dict[PrecisionFormat, int] = {}
        pieces: list[list[Any]] = []
        for place, form in enumerate(blocks):
            rows = min(self.block_rows, self.out_features - place * self.block_rows)
            start = counts.get(form, 0)
            counts[form] = start + rows
            if pieces and pieces[-1][0] is form:
                pieces[-1][2] += rows
            else:
                pieces.append([form, start, start + rows])
        ordered = {form: counts[form] for form in FORMATS if form in counts}
        self._regions, self._size = _layout(ordered, self.in_features, self.group_size)
        self._pieces = [(list(ordered).index(form), start, stop) for form, start, stop in pieces]

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        formats: Sequence[PrecisionFormat],
        *,
        block_rows: int,
        group_size: int,
        mode: QuantizationMode = QuantizationMode.WEIGHT_ONLY,
        moment: Tensor | None = None,
    ) -> PackedLinear:
        """A linear layer packed; the bias is shared with it. `moment` is that of `formats.pack`."""
        found = cls(
            layer.in_features,
            layer.out_features,
            formats,
            block_rows=block_rows,
            group_size=group_size,
            mode=mode,
            bias=layer.bias,
            device=layer.weight.device,
        )
        for region in found._regions:
            rows = torch.cat(
                [
                    block
                    for block, form in zip(layer.weight.detach().split(block_rows), formats, strict=True)
                    if form is region.form
                ]
            )
            for (start, size), tensor in zip(
                (region.values, region.scales, region.zeros), pack(rows, region.form, group_size, moment), strict=True
            ):
                found.packed[start : start + size] = tensor.contiguous().view(torch.uint8).flatten()
        return found.train(layer.training)

    def _unpacked(self, region: _Region, dtype: torch.dtype) -> Tensor:
        """Rows of one format, in `dtype`."""

        def view(part: tuple[int, int], kind: torch.dtype) -> Tensor:
            shape = region.rows, part[1] // kind.itemsize // region.rows
            return self.packed[part[0] : part[0] + part[1]].view(kind).view(shape)

        stored = Packed(
            view(region.values, region.form.dtype), view(region.scales, torch.bfloat16), view(region.zeros, torch.uint8)
        )
        return unpack(stored, region.form, self.group_size, dtype)

    def _ordered(self, parts: list[Tensor], dim: int) -> Tensor:
        """Rows of the formats, put in the layer's order along `dim`."""
        pieces = [parts[part].narrow(dim, start, stop - start) for part, start, stop in self._pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that is computed with, unpacked: float32, or the bias's dtype."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self._ordered([self._unpacked(region, dtype) for region in self._regions], 0)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out], in the input's dtype."""
        if self.mode is QuantizationMode.DYNAMIC:
            scale = (input.detach().abs().amax(-1, keepdim=True) / _INT8_MAX).clamp_min(1e-20)
            input = input + ((input / scale).round() * scale - input).detach()
        elif self.input_scale is not None:
            scale = self.input_scale.to(input.dtype)
            input = input + ((input / scale).round().clamp(-_INT8_MAX, _INT8_MAX) * scale - input).detach()
        parts = [linear(input, self._unpacked(region, input.dtype)) for region in self._regions]
        out = self._ordered(parts, -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take on the formats of a state dict, and load its bytes."""
        if (codes := state_dict.get(f"{prefix}formats")) is not None and codes.shape == self.formats.shape:
            self.formats = codes.to(self.formats.device, torch.uint8).clone()
            self._arrange()
            self.packed = torch.zeros(self._size, dtype=torch.uint8, device=self.packed.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shares = ", ".join(f"{region.form.value} {region.rows}" for region in self._regions)
        return f"{self.in_features} -> {self.out_features}, rows by format: {shares}"

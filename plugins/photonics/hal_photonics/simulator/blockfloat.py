"""The functional level: a matrix product in adaptive block floating point, with the converters' resolution.

Along the reduction the operands are cut into tiles of K. Per row and tile there is one bfloat16 scale; what is left are
integer codes, multiplied exactly, read out by an analogue-to-digital converter and summed digitally:

    s_x = bf16(max_j |x_j|)    s_w = bf16(max_j |w_j|)    (0 -> 1)
    X = round(clamp(x / s_x, -1, 1) * (2^(bx-1) - 1))     W likewise with bw bits
    p = sum_j W X / ((2^(bw-1) - 1) (2^(bx-1) - 1))
    LSB = max(K, 32) / (2^(by-1) - 1)    code = clamp(round(G p / LSB + e), +-(2^(by-1) - 1))
    y = sum over tiles of code * LSB * s_x * s_w / G

Source: the number formats of Nature 640, 368 (2025); adaptive block floating point of Basumallik et al. 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .converters import Converters
from .integers import HeldWeights

#: Rows that are read out together; their codes fit a processor core's cache.
BLOCK = 256


def encode(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        values: [..., rows, K], float32. levels: largest code.

    Returns:
        (codes, scales): whole numbers as float32, [..., rows, K]; scales float32 [..., rows, 1], 0 for a row of zeros
        (its codes are 0, and nothing that the optics add to it counts).
    """
    scales = values.abs().amax(-1, keepdim=True).to(torch.bfloat16).float()
    divisor = torch.where(scales == 0, 1.0, scales)
    return (values / divisor).clamp_(-1, 1).mul_(levels).round_(), scales


def product(
    inputs: Tensor,
    weights: Tensor,
    converters: Converters,
    *,
    dither: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """inputs @ weights^T through the converters.

    Args:
        inputs: [batch, M, K]. weights: [batch, N, K]. float32.
        dither: draws e, uniform over one code; None for e = 0.

    Returns:
        ([batch, M, N] float32, share of the readouts that clipped).
    """
    c = converters
    total = inputs.new_zeros(*inputs.shape[:2], weights.shape[1])
    clipped = readouts = 0
    held = [_HeldTile(weights, tile, inputs.shape[1], c) for tile in c.tiles(inputs.shape[-1])]
    for start in range(0, inputs.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        for tile in held:
            x, x_scale = encode(inputs[:, rows, tile.place], c.input_levels)
            code = tile.weights.product(x).mul_(tile.factor)
            if dither is not None:
                code.add_(torch.rand(code.shape, generator=dither).sub_(0.5))
            code.round_()
            readouts += code.numel()
            # |x . w| <= |x| |w| shows for most blocks that nothing can clip.
            if code.numel() and float(x.norm(dim=-1).max()) * tile.longest + 1 > c.adc_levels:
                clipped += int((code.abs() > c.adc_levels).sum())
                code.clamp_(-c.adc_levels, c.adc_levels)
            total[:, rows].addcmul_(code.mul_(x_scale), tile.scale)
    return total, clipped / max(readouts, 1)


class _HeldTile:
    """The weights of one tile along the reduction, encoded.

    Attributes:
        place: of the tile. weights: their codes. factor: readout codes of a product of 1. scale: [batch, 1, N], of a
            readout code beside the input's. longest: norm of the longest row of codes, times the factor.
    """

    def __init__(self, weights: Tensor, place: slice, rows: int, c: Converters) -> None:
        codes, scale = encode(weights[..., place], c.weight_levels)
        lsb = c.lsb(codes.shape[-1])
        self.place, self.factor = place, c.gain / (c.input_levels * c.weight_levels * lsb)
        self.scale = (scale * (lsb / c.gain)).transpose(-1, -2).contiguous()
        self.longest = self.factor * float(codes.norm(dim=-1).max()) if codes.numel() else 0.0
        self.weights = HeldWeights(codes, rows, c)

"""How attention is cut into the tiles of the photonic core."""

from __future__ import annotations

from .simulator.converters import NARROWEST


def narrowed(window: tuple[int | None, int | None] | None, inputs: int) -> int:
    """The tile width of PV along the keys: as wide as the array, narrower for a window of fewer keys.

    A readout's range, and so its noise, belongs to a whole tile; most of a wide tile would lie outside the window.

    Args:
        window: (left, right) of the request. inputs: of the array.

    Returns:
        A power of two of at least `NARROWEST`, or `inputs`.
    """
    if window is None or None in window:
        return inputs
    keys = sum(side for side in window if side is not None) + 1
    return min(max(1 << (keys - 1).bit_length(), NARROWEST), inputs)

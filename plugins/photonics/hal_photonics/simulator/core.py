"""The photonic core: matrix products on a chip, at the functional level or through its driver with all its errors."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from hal_simulation import linear_size, matmul_size
from torch import Tensor

from hal_core.plugin_api import ContractError, listing

from ..profiles.figures import FIGURES, MOST_PASSES
from ..profiles.profile import Profile
from ..runtime.driver import Cells, Driver, Reading
from .blockfloat import encode, product
from .chip import SimulatedDriver
from .converters import Converters
from .held import HeldTiles, WeightTile
from .imperfections import by_core

Level = Literal["functional", "device"]


class Corrections(NamedTuple):
    """What a calibration measured, by physical place.

    Attributes:
        offset: [cores, columns], codes. column_gain: [columns], relative to the design.
        cell_gain, cell_offset: [columns, inputs]: a cell set to w gives cell_gain * w + cell_offset, in full scale.
        inverse: [inputs, 7] coefficients of x, x^2 ... x^7: the input to send for a wanted one, in full scale.
    """

    offset: Tensor
    column_gain: Tensor
    cell_gain: Tensor
    cell_offset: Tensor
    inverse: Tensor

    @classmethod
    def none(cls, profile: Profile) -> Corrections:
        """The corrections of a chip without errors."""
        cores, columns, inputs = (*(profile.count(f"array.{n}") for n in ("cores", "outputs")), profile.tile_inputs)
        inverse = torch.zeros(inputs, 7)
        inverse[:, 0] = 1
        ones = torch.ones(columns, inputs)
        return cls(torch.zeros(cores, columns), torch.ones(columns), ones, torch.zeros(columns, inputs), inverse)

    def sent_inputs(self, codes: Tensor, levels: int) -> Tensor:
        """The input codes [..., K] to send so that the given ones arrive."""
        coefficients = self.inverse[: codes.shape[-1]]
        x = codes / levels
        total = coefficients[:, 6] * x
        for power in range(5, -1, -1):
            total.add_(coefficients[:, power]).mul_(x)
        return total.clamp_(-1, 1).mul_(levels).round_()

    def sent_weights(self, codes: Tensor, levels: int) -> Tensor:
        """The weight codes [..., N, K] to load so that the cells hold the given ones."""
        columns = torch.arange(codes.shape[-2]) % len(self.column_gain)
        width = codes.shape[-1]
        wanted = (codes / levels).sub_(self.cell_offset[columns, :width]).div_(self.cell_gain[columns, :width])
        return wanted.clamp_(-1, 1).mul_(levels).round_()

    def read_outputs(self, codes: Tensor, ratio: float = 1.0) -> Tensor:
        """Codes [batch, rows, N] with offsets and column gains taken out, in place.

        Args:
            ratio: of the readouts' gain to that at which the offsets were measured.
        """
        columns = torch.arange(codes.shape[-1]) % self.offset.shape[1]
        for some, offset in by_core(codes, self.offset[:, columns]):
            some.sub_(offset, alpha=ratio)
        return codes.div_(self.column_gain[columns])


class PhotonicCore:
    """Matrix products by one chip.

        core = PhotonicCore(SimulatedDriver(profile))
        y = core.multiply(a, b, rng=(seed, offset))                 # a [..., M, K] @ b [..., K, N]
        y = core.multiply(a, b, level="functional")                 # the number format alone

    Attributes:
        driver: the chip. corrections: of a calibration, or None. readouts, clipped: counts since `reset_counts`.
    """

    def __init__(self, driver: Driver, corrections: Corrections | None = None) -> None:
        self.driver, self.corrections = driver, corrections
        self.converters = Converters.of(driver.profile)
        self.readouts = self.clipped = 0
        self._held = HeldTiles()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, profile: Profile) -> PhotonicCore:
        """A simulated chip without calibration."""
        return cls(SimulatedDriver(profile))

    @property
    def clip_rate(self) -> float:
        """The share of readouts at the rails."""
        return self.clipped / max(self.readouts, 1)

    def reset_counts(self) -> None:
        """Set `readouts` and `clipped` to 0."""
        with self._lock:
            self.readouts = self.clipped = 0

    def multiply(
        self,
        a: Tensor,
        b: Tensor,
        *,
        rng: tuple[int, int] | None = None,
        level: Level = "device",
        passes: int = 1,
        gain: float | None = None,
    ) -> Tensor:
        """a @ b.

        Args:
            a: [..., M, K], streamed. b: [..., K, N], held as weights. Leading dimensions as for torch.matmul.
            rng: (seed, offset) of the noise; None for a chip without noise (its static errors stay).
            level: "functional" for block floating point alone, "device" for the chip.
            passes: of the optics, averaged. gain: in front of the readouts; None for the profile's.

        Returns:
            [..., M, N], a's dtype.

        Raises:
            ContractError: a NaN or an infinity, with its position; operands whose shapes or dtypes do not fit; passes
                or a gain that no chip has; another level.
        """
        check_options(passes, gain)
        if level not in get_args(Level):
            raise ContractError(f"level {level!r} was given: use {listing(get_args(Level))}")
        matmul_size(a, b)
        check_operands(a=a, b=b)
        check_finite(a=a, b=b)
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        inputs = a.expand(*lead, *a.shape[-2:]).reshape(-1, *a.shape[-2:]).float()
        held = b.transpose(-1, -2)
        weights = held.expand(*lead, *held.shape[-2:]).reshape(-1, *held.shape[-2:]).float()
        result = self.product(inputs, weights, generator(rng), level, passes=passes, gain=gain)
        return result.view(*lead, a.shape[-2], b.shape[-1]).to(a.dtype)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rng: tuple[int, int] | None = None,
        passes: int = 1,
        gain: float | None = None,
    ) -> Tensor:
        """x [..., K] @ weight [N, K]^T + bias [N]; weight is held, the bias is added digitally.

        Args:
            rng: (seed, offset) of the noise; None for a chip without noise (its static errors stay).
            passes: of the optics, averaged. gain: in front of the readouts; None for the profile's.

        Returns:
            [..., N], x's dtype.

        Raises:
            ContractError: a NaN or an infinity in x or weight, with its position; operands that do not fit; passes or a
                gain that no chip has.
        """
        check_options(passes, gain)
        linear_size(x, weight, bias)
        check_operands(x=x, weight=weight)
        check_finite(x=x, weight=weight)
        rows = x.reshape(1, -1, x.shape[-1]).float()
        tiles = self._held.tiles(weight, lambda: self._loaded(weight))
        flat = self.stream(rows, weight.shape[0], tiles, generator(rng), passes=passes, gain=gain)
        result = flat.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
        return result if bias is None else result + bias.to(result.dtype)

    def product(
        self,
        inputs: Tensor,
        weights: Tensor,
        noise: torch.Generator | None,
        level: Level = "device",
        *,
        tiles: Sequence[slice] | None = None,
        passes: int = 1,
        gain: float | None = None,
    ) -> Tensor:
        """inputs [batch, M, K] @ weights [batch, N, K]^T, float32, finite.

        Args:
            noise: where noise is drawn from, in a fixed order; None for none.
            tiles: the cut along K, each tile at most as wide as the array; None for tiles as wide as the array.
            passes: of the optics, averaged. gain: in front of the readouts; None for the profile's.

        Returns:
            [batch, M, N], float32.
        """
        if level == "functional":
            c = self.converters
            return product(inputs, weights, c if gain is None else c._replace(gain=gain))[0]
        places = list(self.converters.tiles(inputs.shape[-1])) if tiles is None else tiles
        loaded = (self.load(weights, place) for place in places)
        return self.stream(inputs, weights.shape[1], loaded, noise, passes=passes, gain=gain)

    def _loaded(self, weight: Tensor) -> list[WeightTile]:
        """All tiles of a weight [N, K]."""
        held = weight.detach().float().unsqueeze(0)
        return [self.load(held, place) for place in self.converters.tiles(weight.shape[-1])]

    def load(self, weights: Tensor, place: slice) -> WeightTile:
        """The tile `place` along K of weights [batch, N, K], programmed."""
        codes, scales = encode(weights[..., place], self.converters.weight_levels)
        return WeightTile(place, self.program(codes), scales)

    def program(self, codes: Tensor) -> Cells:
        """The cells of weight codes [batch, N, width], corrected."""
        if self.corrections is not None:
            codes = self.corrections.sent_weights(codes, self.converters.weight_levels)
        return self.driver.load(codes)

    def stream(
        self,
        inputs: Tensor,
        outputs: int,
        tiles: Iterable[WeightTile],
        noise: torch.Generator | None,
        *,
        passes: int = 1,
        gain: float | None = None,
    ) -> Tensor:
        """Stream inputs through tiles of weights; sums over the tiles are digital. Arguments as for `product`.

        Args:
            inputs: [batch, M, K]. outputs: N of every tile.

        Returns:
            [batch, M, N], float32.
        """
        c = self.converters
        total = inputs.new_zeros(inputs.shape[0], inputs.shape[1], outputs)
        for tile in tiles:
            x, x_scale = encode(inputs[..., tile.place], c.input_levels)
            # A row or column of zeros has scale 0: the controller knows its result, whatever the optics read.
            scale = tile.scales * (c.lsb(x.shape[-1]) / (gain or c.gain))
            total.addcmul_(self._read(x, tile.cells, noise, passes, gain).codes.mul_(x_scale), scale.transpose(-1, -2))
        return total

    def read(
        self, x: Tensor, w: Tensor, noise: torch.Generator | None, passes: int = 1, gain: float | None = None
    ) -> Reading:
        """Corrected readouts [batch, M, N] of input codes [batch, M, K] and weight codes [batch, N, K] of one tile."""
        return self._read(x, self.program(w), noise, passes, gain)

    def _read(self, x: Tensor, cells: Cells, noise: torch.Generator | None, passes: int, gain: float | None) -> Reading:
        c, corrections = self.converters, self.corrections
        if corrections is not None:
            x = corrections.sent_inputs(x, c.input_levels)
        reading = self.driver.read(x, cells, noise=noise, averages=passes, gain=gain)
        if c.may_clip or gain is not None:
            with self._lock:
                self.readouts += reading.codes.numel()
                self.clipped += reading.clipped
        if corrections is None:
            return reading
        ratio = 1.0 if gain is None else gain / c.gain
        return reading._replace(codes=corrections.read_outputs(reading.codes, ratio))


def generator(rng: tuple[int, int] | None) -> torch.Generator | None:
    """The noise of (seed, offset): the same pair gives the same numbers in any thread. None for no noise.

    Raises:
        ContractError: `rng` is not a pair of whole numbers.
    """
    if rng is None:
        return None
    if not isinstance(rng, tuple | list) or len(rng) != 2 or not all(isinstance(part, int) for part in rng):
        raise ContractError(f"rng {rng!r} was given: pass (seed, offset), two whole numbers")
    seed, offset = rng
    mixed = (seed * 0x9E3779B97F4A7C15 + offset * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return torch.Generator().manual_seed((mixed ^ (mixed >> 27)) & (2**63 - 1))


def drawn(rng: tuple[int, int] | None) -> tuple[int, int]:
    """(seed, offset) as given, or drawn from torch's default generator."""
    if rng is not None:
        return rng
    seed, offset = torch.randint(0, 2**62, (2,)).tolist()
    return seed, offset


def check_options(passes: int, gain: float | None) -> None:
    """Raise ContractError for passes or a gain that no chip has."""
    if type(passes) is not int or not 1 <= passes <= MOST_PASSES:
        raise ContractError(f"passes {passes!r} was given: use a whole number from 1 to {MOST_PASSES}")
    kind = FIGURES["converters"]["gain"]
    number = isinstance(gain, int | float) and not isinstance(gain, bool)
    if gain is not None and not (number and kind.low <= gain <= kind.high):
        raise ContractError(f"gain {gain!r} was given: use a number from {kind.low:g} to {kind.high:g}, or None")


def check_operands(**operands: Tensor) -> None:
    """Raise ContractError unless all operands are floating-point tensors of one dtype in the host's memory."""
    for name, tensor in operands.items():
        if not tensor.is_floating_point() or tensor.device.type != "cpu":
            given = f"{name} of {str(tensor.dtype).removeprefix('torch.')} on {tensor.device} was given"
            raise ContractError(f"{given}: pass a floating-point tensor on the CPU")


def check_finite(**operands: Tensor) -> None:
    """Raise ContractError for the first NaN or infinity, with its operand and position."""
    for name, tensor in operands.items():
        if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # both pass a NaN on
            place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            value = tensor[tuple(place)].item()
            raise ContractError(f"{name} holds {value} at {place}: a converter has no code for it; pass finite values")


def not_finite(tensor: Tensor) -> Tensor | None:
    """Which heads of [batch, heads, length, dim] hold a NaN or an infinity, [batch, heads]; None for none."""
    if not tensor.numel():
        return None
    bad = ~(tensor.amax((-1, -2)).isfinite() & tensor.amin((-1, -2)).isfinite())  # both pass a NaN on
    return bad if bool(bad.any()) else None


def without(tensor: Tensor, heads: Tensor) -> Tensor:
    """A copy of [batch, heads, length, dim] in which some heads, [batch, heads], are 0."""
    return tensor.masked_fill(heads.unsqueeze(-1).unsqueeze(-1), 0)

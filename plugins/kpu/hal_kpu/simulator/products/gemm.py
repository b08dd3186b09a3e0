"""One matrix product, or one convolution, on one array: cycles as published array simulators count them, and more."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hal_core.plugin_api import ContractError

from ...profiles.profile import Profile, load
from ..array import DATAFLOWS, Dataflow, multiply
from ..cycle_accurate import run_cycle_accurate
from ..engines import tile_cycles
from ..fidelity import BEHAVIORAL, CYCLE_ACCURATE, FIDELITIES, check_fidelity
from ..stats import ExecutionStats
from ..transactional import run_transactional
from .lowering import lower_product
from .product import Product


@attrs.define(kw_only=True)
class GemmStats(ExecutionStats):
    """`ExecutionStats` of one product.

    Attributes:
        shape: (M, N, K) of one product. array: (rows, cols). dataflow: "os", "ws" or "is".
        compute_cycles: index of the last cycle with a firing PE, counted from 0, tiles one after the other and fed in
            time: what SCALE-Sim prints as "Total Cycles". From the PEs in CYCLE_ACCURATE, from the closed form in
                TRANSACTIONAL.
        drain_cycles: outputs leaving the array after the last firing of their tile, all tiles together; beside the next
            tile's compute but for the last one.
        cycles: the whole machine's, DRAM to DRAM.
        product: the values, [batch, M, N]; None in TRANSACTIONAL.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    array: tuple[int, int] = (0, 0)
    dataflow: str = "os"
    product: Any = attrs.field(default=None, repr=False)


def machine(rows: int, cols: int, profile: Profile | str | None = None) -> Profile:
    """One array of rows x cols with the memories of a profile (t32x32); its buffers grow with a larger array."""
    base = load(profile) if isinstance(profile, str) else profile or load("t32x32")
    if profile is not None:
        return base.with_array(rows, cols)
    tall = -(-max(rows, cols) // 32)
    larger = tall * tall
    return base.with_array(rows, cols).replace(
        buffers__l3=base["buffers.l3"] * larger, buffers__l2=base["buffers.l2"] * larger
    )


def simulate_gemm(
    M: int,  # noqa: N803
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    *,
    rows: int = 32,
    cols: int = 32,
    dataflow: Dataflow = "os",
    fidelity: int = CYCLE_ACCURATE,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    batch: int = 1,
    dtype: str = "float32",
    profile: Profile | str | None = None,
) -> GemmStats:
    """[M, K] by [K, N] on one rows x cols array.

    Args:
        a, b: operands, [M, K] and [K, N], or with a batch axis; drawn with a fixed seed where left out.
        dtype: of drawn operands, a NumPy name.
        profile: whose memories; None: t32x32's.

    Raises:
        ContractError: sizes below 1, an unknown dataflow or fidelity, operands of other shapes.
        BufferTooSmallError: the smallest tiles do not fit the profile's buffers.
    """
    _check(dataflow, M=M, N=N, K=K, rows=rows, cols=cols, batch=batch)
    left, right = _operands((batch, M, K), (batch, K, N), a, b, dtype)
    name = left.dtype.name
    product = Product(batch=batch, M=M, N=N, K=K, dtype=name, size=left.itemsize, out_size=left.itemsize)
    return _simulate(product, left, right, machine(rows, cols, profile), dataflow, check_fidelity(fidelity))


def simulate_conv2d(
    batch: int,
    in_channels: int,
    height: int,
    width: int,
    out_channels: int,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    rows: int = 32,
    cols: int = 32,
    dataflow: Dataflow = "os",
    fidelity: int = CYCLE_ACCURATE,
    x: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    dtype: str = "float32",
    profile: Profile | str | None = None,
) -> GemmStats:
    """A convolution as `groups` products [batch x positions, window] by [window, channels] on one rows x cols array.

    Args:
        x: [batch, in_channels, height, width]. weight: [out_channels, in_channels / groups, *kernel]. Drawn where left
            out.

    Returns:
        As `simulate_gemm`; product is [batch, out_channels, out_height, out_width].
    """
    pairs = [(item, item) if isinstance(item, int) else tuple(item) for item in (kernel, stride, padding, dilation)]
    size, step, pad, spacing = pairs
    _check(
        dataflow,
        batch=batch,
        in_channels=in_channels,
        height=height,
        width=width,
        out_channels=out_channels,
        rows=rows,
        cols=cols,
        groups=groups,
        kernel=min(size),
        stride=min(step),
        dilation=min(spacing),
    )
    if in_channels % groups or out_channels % groups:
        raise ContractError(
            f"{in_channels} to {out_channels} channels in {groups} groups: both are wanted as multiples"
        )
    extent = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((height, width), size, step, pad, spacing, strict=True)
    ]
    if min(extent) < 1 or min(pad) < 0:
        raise ContractError(f"a window of {size} over {height} x {width} padded by {pad} has no position: pad more")
    shapes = (batch, in_channels, height, width), (out_channels, in_channels // groups, *size)
    data, filters = _operands(*shapes, x, weight, dtype)
    gathered = _gather(data, size, step, pad, spacing, groups)
    matrix = filters.reshape(groups, out_channels // groups, -1).transpose(0, 2, 1)
    _, M, K = gathered.shape
    share = min(1.0, data.size / gathered.size)
    product = Product(
        batch=groups,
        M=M,
        N=matrix.shape[2],
        K=K,
        dtype=data.dtype.name,
        size=data.itemsize,
        out_size=data.itemsize,
        a_share=share,
    )
    done = _simulate(product, gathered, matrix, machine(rows, cols, profile), dataflow, check_fidelity(fidelity))
    if done.product is not None:
        shaped = done.product.reshape(groups, batch, extent[0], extent[1], -1).transpose(1, 0, 4, 2, 3)
        done.product = shaped.reshape(batch, out_channels, *extent)
    return done


def _simulate(
    product: Product, a: NDArray[Any], b: NDArray[Any], profile: Profile, dataflow: Dataflow, fidelity: int
) -> GemmStats:
    rows, cols, _ = profile.arrays(product.dtype)
    stats = GemmStats(
        clock_hz=profile["clock.frequency"],
        profile=profile.name,
        execution_backend=FIDELITIES[fidelity],
        shape=(product.M, product.N, product.K),
        array=(rows, cols),
        dataflow=dataflow,
    )
    if fidelity == BEHAVIORAL:
        wide = np.result_type(a, b, np.int32) if a.dtype.kind in "biu" else a.dtype
        stats.product = a.astype(wide) @ b.astype(wide)
        stats.add(None, "matmul")
        stats.count(product.macs, 0, product.dtype)
        return stats
    program = lower_product(product, profile, dataflow, fidelity == CYCLE_ACCURATE)
    if fidelity != CYCLE_ACCURATE:
        stats.add(run_transactional(program, profile), "matmul")
        tiles, steps, held = _tiles(product, rows, cols, dataflow)
        stats.compute_cycles = tiles * tile_cycles(rows, cols, steps, held) - 1
        stats.drain_cycles = tiles * rows if dataflow == "os" else 0
        return stats
    stats.add(run_cycle_accurate(program, profile), "matmul")
    wave = multiply(a, b, rows, cols, dataflow)
    stats.product, stats.active_macs = wave.product, wave.active_macs
    stats.compute_cycles, stats.drain_cycles = wave.compute_cycles, int(wave.drain_cycles.sum())
    return stats


def _tiles(product: Product, rows: int, cols: int, dataflow: Dataflow) -> tuple[int, int, int]:
    """(number of array tiles, vectors streamed through each, stationary rows)."""
    p = product
    down, right = {"os": (p.M, p.N), "ws": (p.K, p.N), "is": (p.K, p.M)}[dataflow]
    steps = {"os": p.K, "ws": p.M, "is": p.N}[dataflow]
    return p.batch * -(-down // rows) * -(-right // cols), steps, 0 if dataflow == "os" else rows


def _operands(
    left: tuple[int, ...], right: tuple[int, ...], a: ArrayLike | None, b: ArrayLike | None, dtype: str
) -> list[NDArray[Any]]:
    rng = np.random.default_rng(0)
    found = []
    for name, shape, given in (("first", left, a), ("second", right, b)):
        if given is None:
            kind = np.dtype(dtype)
            drawn = rng.integers(0, 100, shape) if kind.kind in "biu" else rng.standard_normal(shape)
            found.append(drawn.astype(kind))
            continue
        array = np.asarray(given)
        if array.shape != shape and array.shape != shape[1:]:
            raise ContractError(f"the {name} operand is {list(array.shape)}, {list(shape)} is wanted: reshape it")
        found.append(array.reshape(shape))
    if found[0].dtype != found[1].dtype:
        raise ContractError(f"operands of {found[0].dtype} and {found[1].dtype} were given: one dtype is wanted")
    return found


def _gather(x: NDArray[Any], size: Any, step: Any, pad: Any, spacing: Any, groups: int) -> NDArray[Any]:
    """[batch, channels, h, w] -> [groups, batch x positions, channels / groups x window]."""
    padded = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    reach = [d * (k - 1) + 1 for d, k in zip(spacing, size, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    view = view[:, :, :: step[0], :: step[1], :: spacing[0], :: spacing[1]]
    n, channels, high, wide = view.shape[:4]
    split = view.reshape(n, groups, channels // groups, high, wide, *size)
    return split.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, n * high * wide, -1)


def _check(dataflow: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ContractError(f"{name} = {value!r} was given: a whole number from 1 on is wanted")
    if dataflow not in DATAFLOWS:
        raise ContractError(f"dataflow {dataflow!r} was given: use 'os', 'ws' or 'is'")

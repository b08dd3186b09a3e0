"""Products lose the columns that values do not have, and keep the rest of their text."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def product(width: int, registers: int, operands: str) -> str:
    names = ",".join(f"%r{n}" for n in range(registers))
    return f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 {{{names}}}, {operands};"


def test_products_with_values_are_narrowed_and_others_are_not() -> None:
    from hal_cuda.kernels.hopper import narrow

    from_registers = "{%r901,%r902,%r903,%r904}, %rd46, %p13, 1, 1, 1"
    from_memory = "%rd23, %rd13, 0, 1, 1, 0, 1"
    keys = "%rd23, %rd13, 0, 1, 1, 0, 0"
    others = [product(128, 64, keys), product(64, 32, from_memory)]
    given = [product(128, 64, from_registers), "bar.sync 1;", product(128, 64, from_memory), *others]
    wanted = [product(96, 48, from_registers), "bar.sync 1;", product(96, 48, from_memory), *others]
    assert narrow.products("\n".join(given), 128, 96) == "\n".join(wanted)


@pytest.mark.parametrize(
    ("dim", "width"),
    [(104, 104), pytest.param(96, 96, marks=pytest.mark.slow), pytest.param(40, 40, marks=pytest.mark.slow)],
)
def test_the_kernel_multiplies_by_the_columns_that_there_are(dim: int, width: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    from hal_cuda.kernels.hopper.launch import compile_forward, config_of
    from hal_cuda.runtime import binaries
    from hal_cuda.tiling import hopper_tiles

    if not binaries.tested():
        pytest.skip(f"the kernel is for Triton {', '.join(binaries.TESTED_TRITON)}")
    config = config_of(
        hopper_tiles(dim, dim, 2048, 2048, False),
        dim_qk=dim,
        dim_v=dim,
        group=1,
        left=False,
        right=False,
        shifted=False,
        half=False,
        ragged=False,
        softcap=False,
        lse=False,
    )
    ptx = compile_forward("bf16", config).asm["ptx"]
    products = [line for line in ptx.splitlines() if "wgmma.mma_async" in line and line.endswith(", 1;")]
    values = {line.split(".m64n")[1].split("k16")[0] for line in products}
    assert values == {str(width)}

"""Products as wide as the values. Tensors in Triton are powers of two wide; the tensor cores take any multiple of 8
columns.

The kernel holds padded values and keeps accumulators behind the last column at zero. In its PTX the products then lose
those
columns: their accumulators leave the list of registers. Shared memory stays as it was, in groups of 64 columns one
after the other, of which the last is read in part. Values of two parts (136 to 184) stay padded.
"""

from __future__ import annotations

import re


def products(ptx: str, padded: int, columns: int) -> str:
    """PTX whose products with values, `padded` columns wide, are `columns` wide; a multiple of 8, at most padded.

    Products with keys, whose right side is not transposed, stay. So does PTX in which no product is found.
    """
    product = re.compile(rf"\.m64n{padded}k16(\S*) {{([^}}]*)}}, ([^;]*, 1);")

    def narrow(match: re.Match[str]) -> str:
        kinds, registers, operands = match.groups()
        kept = registers.split(",")[: columns // 2]  # a thread holds a quarter of each of its two rows
        return f".m64n{columns}k16{kinds} {{{','.join(kept)}}}, {operands};"

    return product.sub(narrow, ptx)

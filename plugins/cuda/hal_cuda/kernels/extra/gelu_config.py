"""How the Hopper kernel of gelu(X W^T + bias) cuts its work."""

from __future__ import annotations

from typing import NamedTuple


class GeluConfig(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        columns: of a tile. depth: of a step along K. stages: shared-memory stages of steps.
        parts: pieces in which a consumer writes its rows, each `columns / parts` wide; shared memory holds `buffers`
            of them for each consumer.
        together: row tiles that are worked on at a time, so that their parts of X and W stay in the second-level cache.
        tanh: the tanh approximation of GELU. bias: there is one. w_rows: W is stored [K, N] and not [N, K].
        consumers: warpgroups that multiply.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    parts: int = 4
    buffers: int = 2
    together: int = 8
    tanh: bool = False
    bias: bool = True
    w_rows: bool = False
    consumers: int = 2

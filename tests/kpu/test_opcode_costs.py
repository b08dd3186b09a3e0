"""Every opcode is charged for: its work lowers to movement that costs simulated cycles."""

from __future__ import annotations

import pytest
import torch
from hal_kpu.profiles.profile import load
from hal_kpu.runtime.timing import time_work
from hal_kpu.simulator.fidelity import TRANSACTIONAL
from hal_kpu.simulator.opcodes.specs import TensorSpec
from hal_kpu.simulator.opcodes.table import OPCODES

X = torch.rand(4, 6) + 0.5
BITS = torch.arange(24).reshape(4, 6)
IMAGE, WEIGHT = torch.rand(1, 2, 6, 6), torch.rand(3, 2, 3, 3)
CONV = {
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "transposed": False,
    "output_padding": (0, 0),
    "groups": 1,
}
POOL = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
PLACES = torch.zeros(4, 6, dtype=torch.int64)
SAMPLES = {
    "matmul": ((X, X.T.contiguous()), {}),
    "grouped_matmul": ((X, torch.rand(3, 6, 5), torch.tensor([1, 2, 4], dtype=torch.int32)), {}),
    "convolution": ((IMAGE, WEIGHT), CONV),
    "convolution_input_grad": ((torch.rand(1, 3, 4, 4), IMAGE, WEIGHT), CONV),
    "convolution_weight_grad": ((torch.rand(1, 3, 4, 4), IMAGE, WEIGHT), CONV),
    "not": ((BITS,), {}),
    "and": ((BITS, BITS), {}),
    "or": ((BITS, BITS), {}),
    "xor": ((BITS, BITS), {}),
    "shift_left": ((BITS,), {"scalar": 1}),
    "shift_right": ((BITS,), {"scalar": 1}),
    "compare": ((X, X), {"predicate": "lt"}),
    "where": ((X > 1, X, X), {}),
    "cast": ((X,), {"dtype": "float16"}),
    "prod": ((X,), {"axis": 0}),
    "argmax": ((X,), {"axis": 0}),
    "argmin": ((X,), {"axis": 0}),
    "scan": ((X,), {"axis": 0, "kind": "add"}),
    "sort": ((X,), {"axis": 0}),
    "softmax": ((X,), {"axis": 1}),
    "max_pool": ((IMAGE,), POOL | {"dilation": (1, 1)}),
    "avg_pool": ((IMAGE,), POOL),
    "avg_pool_grad": ((torch.rand(1, 2, 3, 3), IMAGE), POOL),
    "reshape": ((X,), {"shape": (24,)}),
    "transpose": ((X,), {"permutation": (1, 0)}),
    "broadcast": ((X,), {"shape": (3, 4, 6)}),
    "slice": ((X,), {"axis": 0, "start": 1, "stop": 3}),
    "slice_update": ((X, X[1:3].contiguous()), {"axis": 0, "start": 1, "stop": 3}),
    "concat": ((X, X), {"axis": 0}),
    "pad": ((X,), {"widths": (1, 1)}),
    "reverse": ((X,), {"axes": (0,)}),
    "gather": ((X, PLACES), {"axis": 0}),
    "scatter": ((X, PLACES, X), {"axis": 0, "combine": "add"}),
    "index": ((X, PLACES[0]), {"axes": (0,)}),
    "index_put": ((X, X[0], PLACES[0]), {"axes": (0,)}),
    "strided": ((X,), {"shape": (3, 2), "strides": (6, 1)}),
    "fill": ((), {"shape": (4, 6), "scalar": 1, "dtype": "float32"}),
    "iota": ((), {"length": 6, "dtype": "int64"}),
    "random": ((), {"shape": (4, 6), "kind": "normal", "dtype": "float32"}),
}


def spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec("t", tensor.shape, str(tensor.dtype).removeprefix("torch."))


@pytest.mark.parametrize("name", OPCODES)
def test_an_opcode_costs_cycles(name):
    """A reshape alone is free: the same bytes under another shape."""
    opcode = OPCODES[name]
    inputs, attrs = SAMPLES.get(name, ((X,) * opcode.arity[1], {}))
    results = opcode.value(inputs, attrs)
    work = opcode.work([spec(tensor) for tensor in inputs], [spec(tensor) for tensor in results], attrs)
    run = time_work(work, load("t64"), TRANSACTIONAL)
    if name == "reshape":
        assert run is None
    else:
        assert run is not None
        assert run.cycles > 0
        assert run.memory.bytes >= sum(result.nbytes for result in results)

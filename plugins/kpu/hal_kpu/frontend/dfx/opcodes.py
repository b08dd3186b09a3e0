"""`DFXOpCode`: every opcode a DFX program may hold, by name, and which of them DFX 1.0 has."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class DFXOpCode(enum.StrEnum):
    """Opcodes. Each member equals its text, so that "relu" and DFXOpCode.RELU are the same opcode."""

    # movement between memory levels, and control: DFX 1.0
    LOAD = "load"
    STORE = "store"
    PREFETCH = "prefetch"
    COPY = "copy"
    BARRIER = "barrier"
    NOP = "nop"
    # operators: DFX 1.0
    MATMUL = "matmul"
    LINEAR = "linear"
    CONV2D = "conv2d"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    SOFTMAX = "softmax"
    LAYER_NORM = "layer_norm"
    BATCH_NORM = "batch_norm"
    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    NEG = "neg"
    EXP = "exp"
    LOG = "log"
    SQRT = "sqrt"
    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    MAXPOOL2D = "maxpool2d"
    AVGPOOL2D = "avgpool2d"
    ADAPTIVE_AVGPOOL2D = "adaptive_avgpool2d"
    RESHAPE = "reshape"
    TRANSPOSE = "transpose"
    CONCAT = "concat"
    FLATTEN = "flatten"
    FUSED_MATMUL_BIAS_RELU = "fused_matmul_bias_relu"
    FUSED_MATMUL_BIAS_GELU = "fused_matmul_bias_gelu"
    FUSED_MATMUL_BIAS_SILU = "fused_matmul_bias_silu"
    FUSED_MATMUL_RELU = "fused_matmul_relu"
    # the machine's general operations: DFX 1.1
    GROUPED_MATMUL = "grouped_matmul"
    CONVOLUTION = "convolution"
    CONVOLUTION_INPUT_GRAD = "convolution_input_grad"
    CONVOLUTION_WEIGHT_GRAD = "convolution_weight_grad"
    ABS = "abs"
    SIGN = "sign"
    FLOOR = "floor"
    CEIL = "ceil"
    ROUND = "round"
    TRUNC = "trunc"
    NOT = "not"
    RECIPROCAL = "reciprocal"
    RSQRT = "rsqrt"
    EXPM1 = "expm1"
    LOG1P = "log1p"
    SIN = "sin"
    COS = "cos"
    ASIN = "asin"
    ACOS = "acos"
    ATAN = "atan"
    SINH = "sinh"
    COSH = "cosh"
    ASINH = "asinh"
    ACOSH = "acosh"
    ATANH = "atanh"
    ERF = "erf"
    MAXIMUM = "maximum"
    MINIMUM = "minimum"
    POW = "pow"
    ATAN2 = "atan2"
    FMOD = "fmod"
    REMAINDER = "remainder"
    FLOOR_DIVIDE = "floor_divide"
    AND = "and"
    OR = "or"
    XOR = "xor"
    SHIFT_LEFT = "shift_left"
    SHIFT_RIGHT = "shift_right"
    COMPARE = "compare"
    WHERE = "where"
    CAST = "cast"
    PROD = "prod"
    REDUCE_MAX = "reduce_max"
    REDUCE_MIN = "reduce_min"
    ARGMAX = "argmax"
    ARGMIN = "argmin"
    SCAN = "scan"
    SORT = "sort"
    MAX_POOL = "max_pool"
    AVG_POOL = "avg_pool"
    AVG_POOL_GRAD = "avg_pool_grad"
    BROADCAST = "broadcast"
    SLICE = "slice"
    SLICE_UPDATE = "slice_update"
    PAD = "pad"
    REVERSE = "reverse"
    GATHER = "gather"
    SCATTER = "scatter"
    INDEX = "index"
    INDEX_PUT = "index_put"
    STRIDED = "strided"
    FILL = "fill"
    IOTA = "iota"
    RANDOM = "random"

    def is_fused(self) -> bool:
        """Whether it is several operators in one."""
        return self.startswith("fused_")


#: Names of types as DFX 1.0 writes them.
SHORT_DTYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "bool": "bool",
}
LONG_DTYPES = {short: name for name, short in SHORT_DTYPES.items()}

_PRODUCT = frozenset({"M", "K", "N"})
_AXIS = frozenset({"axis", "keepdims"})
_WINDOW = frozenset({"kernel_size", "stride", "padding"})
_FUSED = _PRODUCT | {"fused_from"}
_NOTHING: frozenset[str] = frozenset()
#: What DFX 1.0 has: opcode -> (attributes, most operands).
VOCABULARY: Mapping[str, tuple[frozenset[str], int]] = {
    **dict.fromkeys(("load", "store", "prefetch", "copy", "neg", "exp", "log", "sqrt"), (_NOTHING, 1)),
    **dict.fromkeys(("relu", "gelu", "silu", "sigmoid", "tanh"), (_NOTHING, 1)),
    **dict.fromkeys(("add", "sub", "mul", "div"), (_NOTHING, 2)),
    **dict.fromkeys(("sum", "mean", "max", "min"), (_AXIS, 1)),
    **dict.fromkeys(("maxpool2d", "avgpool2d"), (_WINDOW, 1)),
    **dict.fromkeys(("barrier", "nop"), (_NOTHING, 1 << 20)),
    "matmul": (_PRODUCT, 2),
    "linear": (_PRODUCT, 3),
    "conv2d": (frozenset({"stride", "padding", "dilation", "groups"}), 3),
    "softmax": (frozenset({"axis"}), 1),
    "layer_norm": (frozenset({"normalized_shape", "eps"}), 3),
    "batch_norm": (frozenset({"eps", "training"}), 5),
    "adaptive_avgpool2d": (frozenset({"output_size"}), 1),
    "reshape": (frozenset({"shape"}), 1),
    "transpose": (frozenset({"axes"}), 1),
    "concat": (frozenset({"dim"}), 1 << 20),
    "flatten": (frozenset({"start_dim", "end_dim"}), 1),
    **dict.fromkeys(("fused_matmul_bias_relu", "fused_matmul_bias_gelu", "fused_matmul_bias_silu"), (_FUSED, 3)),
    "fused_matmul_relu": (_FUSED, 2),
}


class _Op(Protocol):
    @property
    def opcode(self) -> str: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def attrs(self) -> Mapping[str, Any]: ...


def version_of(ops: Iterable[_Op], dtypes: Iterable[str]) -> str:
    """ "1.0" where DFX 1.0 can say it all, else "1.1"."""
    for op in ops:
        attributes, most = VOCABULARY.get(op.opcode, (_NOTHING, -1))
        if len(op.inputs) > most or op.attrs.keys() - attributes:
            return "1.1"
    return "1.0" if set(dtypes) <= SHORT_DTYPES.keys() else "1.1"

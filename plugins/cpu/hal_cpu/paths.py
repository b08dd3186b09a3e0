"""Which kernel serves a request, decided from its static fields and from what was measured, without torch.

Two rules meet here. `torch_path` chooses among the kernels that are made of torch's operators. Where the optional
package hal-cpu-native is there, `compiled_path` says which of its kernels could serve the request instead, and `gain`
what that is worth by `hal calibrate`, or by a first guess for this kind of processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .discovery import Machine, this_machine

TorchPath = Literal["native", "packed", "fused", "decode", "blocks", "tiled"]
CompiledPath = Literal["compiled", "streamed"]
Path = TorchPath | CompiledPath
#: Torch's time over that of a compiled kernel, by "<path> <dtype>"; of block plans by "compiled blocks <dtype>", of
#: additive masks by "compiled additive <dtype>", of forward and backward together by "compiled backward <dtype>"; of
#: the streamed path by whether key heads are shared: (multiply-accumulates of a measured call, gain), smallest call
#: first.
Gains = Mapping[str, Sequence[tuple[float, float]]]

#: Gains from which a compiled kernel is taken: below, the difference is within what a measurement misses by.
LEAST_GAIN = 1.05
#: Rows of one block of the compiled path.
BLOCK_ROWS = 32

#: Query rows that share a key head (group times len_q) up to which packing them into one product pays.
MOST_PACKED_ROWS = 128
#: Rows up to which all scores of a call are held at once.
MOST_DECODE_ROWS = 32
#: Bytes of key and value from which float16 is better widened chunk by chunk than given to torch's kernel.
FEWEST_WIDENED_BYTES = 1 << 20
#: Smallest blocks of a plan that are multiplied as blocks, and the most scores of the rows of one block.
SMALLEST_BLOCK = 8
MOST_BLOCK_SCORES = 1 << 22
#: Smallest blocks of a plan that the compiled kernel is asked to skip by: it works on whole rows of 32.
SMALLEST_COMPILED_BLOCK = 16


_Offer = Literal["measured", "always", "never"]
_offer: _Offer = "measured"
_gains: Gains | None = None


def path_of(request: AttentionRequest) -> Path:
    """The path of a request: a compiled kernel's where it is there, right and faster, else `torch_path`."""
    compiled = compiled_path(request)
    if compiled is None or (_offer != "always" and gain(request, compiled) < LEAST_GAIN):
        return torch_path(request)
    return compiled


def compiled_path(request: AttentionRequest) -> CompiledPath | None:
    """The path by which hal-cpu-native could serve a request, None where it cannot or is not there.

    compiled: flash tiles over blocks of rows and keys. streamed: few rows, keys and values read once.
    """
    if not compiled_kernels():
        return None
    if (
        (request.grads and not _differentiates(request))
        or request.dtype not in ("float32", "bfloat16", "float16")
        or request.dropout
        or request.packed
        or request.page_size is not None
        or request.used
        or request.cache_dtype is not None
        or (request.block_plan is not None and min(request.block_plan[:2]) < SMALLEST_COMPILED_BLOCK)
        or request.tiling is not None
        or not request.last_dim_contiguous
        or not 0 < request.effective_scale < float("inf")
    ):
        return None
    from hal_cpu_native.call import DECODE_ROWS, DECODE_UNIT, MOST_HEAD_DIM, UNIT

    dims = (request.dim_qk, request.dim_v)
    if not all(0 < dim <= MOST_HEAD_DIM and dim % UNIT == 0 for dim in dims):
        return None
    rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
    few = rows <= DECODE_ROWS and not any(dim % DECODE_UNIT for dim in dims)
    return "streamed" if few and request.block_plan is None and not request.grads else "compiled"


def _differentiates(request: AttentionRequest) -> bool:
    """Whether the compiled backward is asked. An additive mask may make a log-sum-exp too coarse to start from, and of
    a block plan it is not known before the call whether heads that share a key head share its pattern.
    """
    return "mask" not in request.grads and request.mask is not MaskKind.ADDITIVE and request.block_plan is None


def compiled_kernels() -> bool:
    """Whether compiled kernels may be taken: they are there, and no measurement of the others is under way."""
    return _offer != "never" and native_module()


def native_module() -> bool:
    """Whether hal-cpu-native is installed and runs on this processor."""
    return not why_no_native_module()


def why_no_native_module() -> str:
    """Why it is not, in a sentence with the fix; "" where it is."""
    try:
        from hal_cpu_native.library import load
    except ImportError:
        return "not installed, so torch's kernels serve every call -> pip install hal-cpu-native"
    return load().why


def gain(request: AttentionRequest, path: CompiledPath) -> float:
    """Torch's time over a compiled kernel's for requests like this one; 0 where nothing is known.

    The lower of the two measured calls between which the request's work lies; of the largest beyond it; less what the
    last block of rows wastes. Calls with less work than the smallest that was measured are left to torch.
    """
    kind = _kind(request, path)
    measured = (first_guess(this_machine()) if _gains is None else _gains).get(f"{path}{kind} {request.dtype}", ())
    macs = request.visible_macs
    if not measured or macs < measured[0][0]:
        return 0.0
    below = max((entry for entry in measured if entry[0] <= macs), key=lambda entry: entry[0])
    above = min((entry for entry in measured if entry[0] > macs), key=lambda entry: entry[0], default=below)
    if path == "streamed":
        return min(below[1], above[1])
    rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
    return min(below[1], above[1]) * rows / (-(-rows // BLOCK_ROWS) * BLOCK_ROWS)  # the last block's rows are filled up


def _kind(request: AttentionRequest, path: CompiledPath) -> str:
    """What sets a call's gain apart from that of the path's plain calls."""
    if path == "streamed":
        return " shared" if request.heads_q != request.heads_kv else ""
    if request.block_plan is not None:
        return " blocks"
    if request.grads:
        return " backward"
    return " additive" if request.mask is MaskKind.ADDITIVE else ""


def first_guess(machine: Machine) -> Gains:
    """Gains until `hal calibrate` has run: where every processor of the kind that was measured gained, and less than it
    did. docs/benchmarks/cpu_native.md has the measurements; processors of other kinds are left to torch.
    """
    if "avx512f" not in machine.simd:
        return {}
    streamed = {
        "streamed shared float32": [(1e6, 1.5)],
        "streamed bfloat16": [(1e6, 1.2)],
        "streamed shared bfloat16": [(1e6, 1.5)],
        "streamed float16": [(1e6, 1.5)],
        "streamed shared float16": [(1e6, 2.0)],
    }
    if machine.vendor != "AuthenticAMD":
        return streamed
    prefill = {"compiled float32": [(1e8, 1.1)], "compiled float16": [(3e7, 1.5)]}
    if "avx512_bf16" in machine.simd:
        prefill["compiled bfloat16"] = [(3e7, 1.5)]
    # Torch has no kernel that skips blocks: what these are compared with gathers them first.
    blocks = {name.replace("compiled", "compiled blocks"): [(1.6e7, 1.5)] for name in prefill}
    return streamed | prefill | blocks


def use_gains(gains: Gains | None) -> None:
    """Choose by these measurements from now on; None: by the first guess."""
    global _gains
    _gains = gains


@contextmanager
def offering(compiled: _Offer) -> Iterator[None]:
    """Inside the block compiled kernels are taken never, wherever they can serve, or by their measured gain: in every
    thread, for measurements and tests. Each path is right, so calls of other threads only change their speed.
    """
    global _offer
    before, _offer = _offer, compiled
    try:
        yield
    finally:
        _offer = before


def considered(request: AttentionRequest) -> str:
    """The path of a request and those that were not taken, in one line for `explain`."""
    path, torchs, compiled = path_of(request), torch_path(request), compiled_path(request)
    if compiled is None:
        return f"path {path}; compiled kernels " + ("do not take it" if native_module() else why_no_native_module())
    known = "first guess" if _gains is None else "measured"
    worth = gain(request, compiled)
    compared = f"{worth:.3g} times {torchs} at least ({known})" if worth else f"no gain known at this size ({known})"
    return f"path {path}; {compiled}: {compared}; {LEAST_GAIN} is needed"


def torch_path(request: AttentionRequest) -> TorchPath:
    """The path among kernels of torch's operators, from static fields alone. A packed sequence is asked about by
    itself.

    native: torch's scaled_dot_product_attention. packed: the same with the heads of a group as rows. fused: torch's
    kernel with its log-sum-exp. decode: few query rows, arranged around reading the keys. blocks: a block plan, many
    query blocks at once. tiled: everything else.
    """
    if _multiplies_blocks(request):
        return "blocks"
    special = bool(
        request.softcap is not None
        or request.window is not None
        or request.cache_dtype is not None
        or request.page_size is not None
        or request.used
        or request.block_plan is not None
        or request.dropout
        or request.tiling is not None
        or "mask" in request.grads
        or request.grad_lse
        or request.effective_scale <= 0  # torch's kernel multiplies the mask's -inf by it
    )
    masked, causal = request.mask is not MaskKind.NONE, sees_less(request)
    shifted = causal and (request.causal is Causal.BOTTOM_RIGHT or request.diagonal != 0)
    tiled = special or (masked and (causal or request.lse))
    rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
    if not (request.grads or request.dropout or request.block_plan or request.tiling):
        if rows <= MOST_DECODE_ROWS and (tiled or (shifted and rows) or (not causal and _worth_streaming(request))):
            return "decode"
        if not tiled and not causal and not request.lse and rows <= MOST_PACKED_ROWS and _worth_packing(request):
            return "packed"
    if tiled:
        return "tiled"
    return "fused" if request.lse or shifted else "native"


def _multiplies_blocks(request: AttentionRequest) -> bool:
    """Whether a block plan is run as products over gathered blocks: no mask, no dropout, no cache of another form."""
    if request.block_plan is None:
        return False
    block_q, block_k, most = request.block_plan
    most = min(most, -(-request.len_k // max(block_k, 1)))
    scores = block_q * (request.heads_q // max(request.heads_kv, 1)) * block_k * most
    return (
        min(block_q, block_k) >= SMALLEST_BLOCK
        and scores <= MOST_BLOCK_SCORES
        and request.mask is MaskKind.NONE
        and not request.dropout
        and request.cache_dtype is None
        and request.page_size is None
    )


def sees_less(request: AttentionRequest) -> bool:
    """Whether causal hides anything: the last row of a bottom-right diagonal reads every key."""
    if request.causal is Causal.NONE:
        return False
    return not (request.causal is Causal.BOTTOM_RIGHT and request.len_q == 1 and request.diagonal >= 0)


def _worth_packing(request: AttentionRequest) -> bool:
    """Grouped heads, or the one bfloat16 row that torch multiplies by a slow path."""
    return request.heads_q != request.heads_kv or doubles(request)


def doubles(request: AttentionRequest) -> bool:
    """Whether a single query row is computed twice: torch's product of one bfloat16 row takes twice that of two."""
    return request.dtype == "bfloat16" and request.len_q == 1 and request.heads_q == request.heads_kv


def _worth_streaming(request: AttentionRequest) -> bool:
    """Whether widening a float16 cache chunk by chunk beats torch's kernel, which multiplies float16 slowly."""
    size = request.batch * request.heads_kv * request.len_k * (request.dim_qk + request.dim_v)
    return widens(request) and size * 2 >= FEWEST_WIDENED_BYTES


def widens(request: AttentionRequest) -> bool:
    """Whether float16 is computed in float32: without float16 products torch's kernel takes twice float32's time."""
    return request.dtype == "float16" and not this_machine().multiplies_float16


def reads_in_place(request: AttentionRequest) -> bool:
    """Whether keys and values are read where they lie, with nothing converted or gathered."""
    plain = request.dtype in ("float32", "float64") and request.cache_dtype is None and request.page_size is None
    return plain and request.last_dim_contiguous

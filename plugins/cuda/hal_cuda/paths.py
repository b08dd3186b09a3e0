"""Which kernel serves a request: decided from the request and the rates, never by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .cost import Choice, Rates, seconds
from .discovery import Chip
from .kernels.fp8.wish import wish_of
from .kernels.skipping.wish import threshold_of
from .runtime import binaries
from .tiling import WARPGROUP_ROWS, masked_tiles_of, packs, parts, value_parts

#: Torch's own attention backends, which are candidates beside the kernels of this package.
TORCH_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def candidates(request: AttentionRequest, chip: Chip) -> list[str]:
    """Every path that is right for a request."""
    if request.tiling is not None:  # torch's paths cut by themselves, the Hopper kernel has sizes of its own
        return ["portable"]
    if wish_of(request) is not None:  # asked for, so nothing else is right
        return ["fp8"]
    if threshold_of(request) is not None:
        return ["skipping"]
    if request.dtype == "float64":
        return ["composed"]
    hopper = hopper_takes(request, chip) and (not request.grads or hopper_differentiates(request))
    masked = not request.grads and masked_takes(request, chip)
    own = ["hopper"] if hopper else ["masked"] if masked else []
    return [*own, "portable", *torch_names(request, chip)]


def choose(
    request: AttentionRequest, chip: Chip, rates: Rates, allowed: Callable[[str], bool] = lambda path: True
) -> Choice:
    """The fastest path. `allowed` narrows the candidates, for measurements of some of them alone.

    The masked Hopper kernel is chosen where it was measured.
    """
    able = [path for path in candidates(request, chip) if allowed(path)]
    known = [path for path in able if path != "masked" or rates.knows(path, request)]
    timed = [(path, seconds(path, request, rates, chip)) for path in known or able]
    timed.sort(key=lambda item: item[1])
    if len(timed) > 1 and timed[0][0] == "composed":  # memory of all scores: only where nothing else is right
        timed = [*timed[1:], timed[0]]
    return Choice(timed[0][0], tuple(timed))


def path_of_lengths(path: str, request: AttentionRequest) -> str:
    """The path that serves a request of exact lengths which is bound to `path`: torch's backends disagree about the
    diagonal of unequal lengths, so those go to another one.
    """
    return (
        path
        if path not in TORCH_BACKENDS or torch_takes_lengths(path, request, request.len_q, request.len_k)
        else "portable"
    )


def torch_takes_lengths(path: str, request: AttentionRequest, len_q: int, len_k: int) -> bool:
    """Whether a backend of torch takes these lengths: cuDNN and FlashAttention disagree about the diagonal of unequal
    ones, and cuDNN refuses one query with one key.
    """
    if path == "efficient":
        return True
    return len_q == len_k != 1 if request.causal is not Causal.NONE else len_q * len_k != 1


def hopper_runs(chip: Chip) -> bool:
    """Whether the kernel runs on a chip, under this version of Triton."""
    return chip.capability == (9, 0) and binaries.tested() and not binaries.INTERPRETED


def hopper_takes(request: AttentionRequest, chip: Chip) -> bool:
    """Whether the kernel is right for a request; tensors must also suit the copy engine (`fits`)."""
    return (
        hopper_runs(chip)
        and request.dtype in ("float16", "bfloat16")
        and request.mask is MaskKind.NONE
        and not request.dropout
        and (not request.packed or _fills_tiles(request))
        and request.page_size is None
        and not request.used
        and request.cache_dtype is None
        and request.block_plan is None
        and request.last_dim_contiguous
        and max(request.dim_qk, request.dim_v) <= 256
        and request.dim_qk % 8 == 0
        and request.dim_v % 8 == 0
        and 1e-6 <= request.effective_scale <= 1e6
        and not packs(request, request.len_q)
    )


def hopper_differentiates(request: AttentionRequest) -> bool:
    """Whether the Hopper backward is right for a request that the Hopper forward takes: it takes no packed lengths, and
    above a head size of 128 it adds the query's gradient up in any order.
    """
    return not request.packed and not (request.deterministic and max(request.dim_qk, request.dim_v) > 128)


def hopper_assists(request: AttentionRequest, chip: Chip) -> bool:
    """Whether the Hopper backward may serve a request whose forward is portable, with a mask, a block plan or
    dropout; calls that
    it does not take go on to the portable backward.
    """
    bare = replace(request, mask=MaskKind.NONE, mask_batch=1, mask_heads=1, block_plan=None, dropout=0.0)
    beside = request.mask is not MaskKind.NONE or request.block_plan is not None or request.dropout > 0
    return beside and hopper_takes(bare, chip) and hopper_differentiates(request)


def masked_takes(request: AttentionRequest, chip: Chip) -> bool:
    """Whether the masked Hopper kernel is right for a request. Single masks may not suit it, which then go to the
    portable kernel (see `HopperMaskedPath`).
    """
    r = request
    few = min(r.len_q, r.len_k) <= WARPGROUP_ROWS  # which the short kernel or small tiles serve better
    if few or r.packed or (r.mask is MaskKind.NONE and r.block_plan is None):
        return False
    bare = replace(r, mask=MaskKind.NONE, mask_batch=1, mask_heads=1, block_plan=None)
    return hopper_takes(bare, chip) and masked_tiles_of(r) is not None


def forward_path(path: str, request: AttentionRequest, chip: Chip) -> str:
    """The path of the forward where `path` serves forward and backward together."""
    return "hopper" if path == "portable" and request.grads and hopper_takes(request, chip) else path


def _fills_tiles(request: AttentionRequest) -> bool:
    """Whether packed sequences have rows enough for tiles, and head sizes of one part."""
    return request.len_q > WARPGROUP_ROWS and not parts(request.dim_qk)[1] and not value_parts(request.dim_v)[1]


def torch_takes(request: AttentionRequest) -> bool:
    """Whether a fused backend of torch may be right for a request, which has no feature of this package's own."""
    return (
        request.causal in (Causal.NONE, Causal.TOP_LEFT)
        and not request.diagonal
        and request.window is None
        and request.softcap is None
        and not request.dropout
        and not request.packed
        and request.page_size is None
        and not request.used
        and request.cache_dtype is None
        and request.block_plan is None
        and not request.lse
        and not request.deterministic
        and request.dim_qk % 8 == request.dim_v % 8 == 0
        and max(request.dim_qk, request.dim_v) <= 256
        and request.last_dim_contiguous
    )


def torch_names(request: AttentionRequest, chip: Chip) -> list[str]:
    """Torch backends that take a request on a chip.

    cuDNN and FlashAttention where every row reads a key: they have no rule for rows that do not. The efficient kernels,
    which have the rule of this project and also take boolean masks and float32, where gradients are asked for.
    """
    r = request
    if not torch_takes(r) or not chip.torch_attention:
        return []
    names = []
    if r.dtype in ("float16", "bfloat16") and r.mask is MaskKind.NONE:
        wide = max(r.dim_qk, r.dim_v) > 128 and chip.capability != (9, 0)
        names = [] if wide or not torch.backends.cuda.cudnn_sdp_enabled() else ["cudnn"]
        names += ["flash"] if r.dim_qk == r.dim_v else []
        names = [name for name in names if torch_takes_lengths(name, r, r.len_q, r.len_k)]
    masked = r.mask is MaskKind.BOOLEAN and r.causal is Causal.NONE
    if r.grads and r.heads_q == r.heads_kv and (r.mask is MaskKind.NONE or masked):
        names.append("efficient")
    return names


def lends_to_cudnn(request: AttentionRequest, chip: Chip) -> bool:
    """Whether cuDNN's operators are right for calls of a request under gradients that own kernels serve, at some of its
    lengths: the log-sum-exp is no matter, which they give and take.
    """
    r = replace(request, lse=False)
    alike = bool(r.grads) and r.grads <= {"q", "k", "v"} and r.heads_q == r.heads_kv
    return alike and "cudnn" in torch_names(r, chip)


def bind_torch(name: str, request: AttentionRequest) -> Callable[..., Tensor]:
    """A callable (query, key, value, mask) of one of torch's backends.

    Equal head counts call the backend's operator, which takes a third of the host time of choosing it by `sdpa_kernel`.
    """
    several = request.heads_q != request.heads_kv
    causal, scale, grads = request.causal is not Causal.NONE, request.scale, bool(request.grads)
    if several or name == "efficient":
        # Not torch.nn.functional's name: hal.attention may have taken its place.
        attend, backend = torch._C._nn.scaled_dot_product_attention, TORCH_BACKENDS[name]

        def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            with sdpa_kernel(backend):
                return attend(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=several)

        return grouped
    if name == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default

        def by_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            out: Tensor = cudnn(query, key, value, None, grads, 0.0, causal, False, scale=scale)[0]
            return out

        return by_cudnn
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default

    def by_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = flash(query, key, value, 0.0, causal, False, scale=scale)[0]
        return out

    return by_flash

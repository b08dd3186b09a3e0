"""transformers' attention masks for hal: boolean, none where nothing is hidden, marked where sequences are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

#: Model types that attend with other lengths than the mask was asked for: without one, causal attention would be
#: aligned to the wrong key. They always get a mask.
ALWAYS_A_MASK = frozenset({"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"})

#: Model types that append additive columns to the mask, which a boolean one would turn around: they get an additive
#: one.
ADDITIVE = frozenset({"deepseek_v4"})

#: Model types that join masks of several kinds: each mask has a row for every query, also where rows are alike.
EVERY_ROW = frozenset({"t5gemma2", "t5gemma2_decoder"})

_PACKED = "_hal_packed"
#: Model types by what their attention layers say: none is causal; one may be taken for causal, or all are.
_never_causal, _never_full = set[str](), set[str]()


class Packed(NamedTuple):
    """Sequences packed along the length of a batch of 1, as a mask describes them.

    Attributes:
        cu_seqlens: int32 [sequences + 1]; None for one sequence. longest: the length of the longest.
        causal: whether rows read earlier keys alone. window: keys that a row reads, itself included, or None.
    """

    cu_seqlens: Tensor | None
    longest: int
    causal: bool
    window: int | None


def attention_mask(**arguments: Any) -> Tensor | None:
    """transformers' mask for torch's attention: boolean [batch, 1, len_q, len_k] (True: may read), or None.

    None stands for causal or full attention without padding. A decoding step over a padded batch has [batch, 1, 1,
    len_k], and so has a padded encoder, whose rows are all alike: nothing of the size len_q * len_k is made. The mask
    of packed sequences is marked with their limits (`packed_in`). Model types in `ADDITIVE` get an additive mask.
    """
    kind = getattr(arguments.get("config"), "model_type", None)
    if kind in ADDITIVE:
        additive: Tensor | None = eager_mask(**arguments)
        return additive
    function = arguments.get("mask_function")
    alike = function is bidirectional_mask_function and kind not in EVERY_ROW
    if alike and not arguments.get("allow_is_causal_skip", True):
        arguments |= {"q_length": 1} if "q_length" in arguments else {}  # transformers 5.0 has another argument here
    if kind in ALWAYS_A_MASK or kind in _never_causal:
        arguments["allow_is_causal_skip"] = False
    if kind in _never_full:
        arguments["allow_is_bidirectional_skip"] = False
    mask: Tensor | None = sdpa_mask(**arguments)
    aligned = arguments.get("q_offset", 0) is arguments.get("kv_offset", 0)  # small integers; a tensor is not read
    if mask is not None and function is not None and aligned:
        _mark(mask, function, arguments.get("attention_mask"))
    return mask


def note_layers(model_type: str, causal: Sequence[bool | None]) -> None:
    """Record what the attention layers of a model say: `is_causal` of each, None where it has no such attribute.

    No mask is read as causal attention by a layer that is causal or does not say, and as full attention by one that is
    not. Where a model asks for the other kind than its layers say, it must be given a mask.
    """
    never_full = None in causal or False not in causal
    for kinds, belongs in ((_never_causal, {*causal} == {False}), (_never_full, never_full)):
        (kinds.add if belongs else kinds.discard)(model_type)


def packed_in(mask: Tensor, positions: Tensor | None, length: int, given: bool) -> Packed | None:
    """The packed sequences of `length` together that a mask, or positions where it hides no padding, describe.

    None where the mask says anything besides that it is causal and has a window. A mask of one sequence a batch entry,
    and one of a model whose limits of sequences were `given`, has None for the limits.
    """
    if torch.compiler.is_compiling() or mask.shape[2:] != (length, length):
        return None
    said = _said(mask)
    if said is None or given or said.cu_seqlens is not None:
        return said
    found = packed_at(positions, length) if mask.shape[0] == 1 else None
    return said if found is None else found._replace(window=said.window)


def packed_at(positions: Tensor | None, length: int) -> Packed | None:
    """The packed sequences that positions [1, length] describe by starting again; None where they do not.

    transformers reads them only where it has no cache, and a model asked for its default has one. What was found is
    kept on the tensor, which all layers are given: an accelerator is waited for once a forward pass.
    """
    if positions is None or positions.shape != (1, length) or length < 2 or not _is_readable(positions):
        return None
    version = -1 if positions.is_inference() else positions._version  # may be written to before the next pass
    read, found = getattr(positions, _PACKED, (None, None))
    if read != version or version < 0:
        starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
        edges = torch.nn.functional.pad(torch.nn.functional.pad(starts, (1, 0)), (0, 1), value=length)
        found = Packed(edges.to(torch.int32), int(edges.diff().max()), True, None) if len(starts) else None
        setattr(positions, _PACKED, (version, found))
    return found


def _is_readable(tensor: Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not while a trace or a CUDA graph is recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    if type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def dense_mask(packed: Packed) -> Tensor:
    """Packed sequences as a boolean mask [1, 1, length, length], for devices that run no packed sequences."""
    assert packed.cu_seqlens is not None
    index = torch.repeat_interleave(packed.cu_seqlens.diff())
    rows, keys = torch.arange(len(index), device=index.device)[:, None], torch.arange(len(index), device=index.device)
    mask = (index[:, None] == index) & ((keys <= rows) | (not packed.causal))
    if packed.window is not None:
        mask = mask & (keys > rows - packed.window)
    return mask[None, None]


def says_packed(mask: Tensor) -> bool:
    """Whether a mask itself hides the keys of other packed sequences."""
    said = _said(mask)
    return said is not None and said.cu_seqlens is not None


def forget_packed(mask: Tensor) -> None:
    """Take the mark off, so that the mask is applied as it is."""
    setattr(mask, _PACKED, None)


def _said(mask: Tensor) -> Packed | None:
    """What a mask is marked with, if it was not written to since."""
    version, said = getattr(mask, _PACKED, None) or (0, None)
    return said if mask.is_inference() or version == mask._version else None


def _mark(mask: Tensor, function: Callable[..., Any], padding: Tensor | None) -> None:
    """Mark a mask whose function says nothing but packed sequences, or one, causal or not, and a sliding window.

    padding: boolean [batch, len_k], or None. One that hides a key is not among what a mark can say; reading it waits
    for an accelerator once a mask, as transformers does for masks without a window.
    """
    if not _is_readable(mask) or mask.shape[2] != mask.shape[3]:
        return
    parts = [(_owner(part), part) for part in _parts(function)]
    owners = [owner for owner, _ in parts]
    known = {_SEQUENCES, _REMAPPED, _WINDOW, _CAUSAL, _FULL}
    if not known.issuperset(owners) or not {_CAUSAL, _FULL}.intersection(owners):
        return
    causal, windows = _CAUSAL in owners, [_freed(part)["sliding_window"] for owner, part in parts if owner == _WINDOW]
    if windows and not causal:
        return
    window = min(windows, default=None)
    if padding is not None and not (_is_readable(padding) and padding.ndim == 2 and bool(padding.all())):
        return
    said = None
    if owners.count(_SEQUENCES) == 1 and mask.shape[0] == 1:
        index = _freed(parts[owners.index(_SEQUENCES)][1])["packed_sequence_mask"]
        lengths = torch.bincount(index[0])
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        said = Packed(edges, int(lengths.max()), causal, window)
    elif causal and not {_SEQUENCES, _REMAPPED}.intersection(owners):
        said = Packed(None, mask.shape[3], causal, window)
    if said is not None:
        setattr(mask, _PACKED, (0 if mask.is_inference() else mask._version, said))


_SEQUENCES = packed_sequence_mask_function.__name__
_REMAPPED = "remap_positions_for_packed_sequence"  # not in every transformers 5
_WINDOW = sliding_window_overlay.__name__
_JOINED, _CAUSAL, _FULL = "and_masks", causal_mask_function.__name__, bidirectional_mask_function.__name__


def _owner(function: Callable[..., Any]) -> str:
    """The name of a mask function of transformers, or of the function that made it."""
    return function.__qualname__.partition(".<locals>")[0] if function.__module__ == sdpa_mask.__module__ else ""


def _freed(function: Callable[..., Any]) -> dict[str, Any]:
    """What a mask function has closed over, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _parts(function: Callable[..., Any]) -> Any:
    """The functions that a mask function joins by "and", remapped ones included."""
    owner = _owner(function)
    if owner == _JOINED:
        for part in _freed(function)["mask_functions"]:
            yield from _parts(part)
        return
    yield function
    if owner == _REMAPPED:
        yield from _parts(_freed(function)["mask_function"])

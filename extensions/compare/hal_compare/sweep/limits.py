"""What a model and the memory allow, looked at before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hal_nn.hardware import available_memory, estimate_memory

from hal_core import AttentionRequest, Device, HalError
from hal_core.plugin_api import registry

from ..models import Model
from .token_texts import TextMaker

#: Share of the memory that a sweep plans with; the rest is fragmentation, and what others allocate.
USABLE = 0.9


def most_tokens(model: Model) -> int | None:
    """Tokens of the longest text that the model takes; None for no limit."""
    positions = model.positions
    embeddings = getattr(getattr(model.network, "embeddings", None), "position_embeddings", None)
    first = getattr(embeddings, "padding_idx", None)
    if positions is not None and first is not None:  # RoBERTa's positions begin behind the padding's
        positions -= first + 1
    stated = getattr(model.tokenizer, "model_max_length", None)
    limits = [limit for limit in (positions, stated) if limit is not None and limit < 1 << 40]
    return min(limits) if limits else None


def check_lengths(model: Model, lengths: Sequence[int], maker: TextMaker) -> None:
    """Raise HalError for lengths that the model does not take."""
    most = most_tokens(model)
    if most is not None and (long := [length for length in lengths if length > most]):
        raise HalError(
            f"--lengths {_listed(long)} was given: {model.name} takes texts of {most} tokens at most, ask for those"
        )
    if short := [length for length in lengths if length < maker.shortest]:
        raise HalError(
            f"--lengths {_listed(short)} was given: {model.name} puts {maker.shortest - 1} special tokens around a "
            f"text, ask for {maker.shortest} or more"
        )


def check_memory(
    model: Model, workloads: Sequence[tuple[int, int]], texts: Sequence[int], devices: Sequence[Device]
) -> int:
    """Raise HalError where the largest workload does not fit into the memory of this host.

    Args:
        workloads: (length, batch). texts: how many there are of each, whose float64 runs are kept.
        devices: whose own estimates of an attention call are added.

    Returns:
        Bytes that the largest one is expected to need.
    """
    available = int(available_memory(torch.device("cpu")) * USABLE)
    most, refused = 0, []
    for (length, batch), count in sorted(
        zip(workloads, texts, strict=True), key=lambda one: one[0][0] ** 2 * one[0][1], reverse=True
    ):
        needed = bytes_needed(model, length, batch, count)
        if needed <= available:
            needed += max((attention_bytes(model, device, length, batch) for device in devices), default=0)
        most = max(most, needed)
        if needed <= available:  # what is smaller fits too
            break
        refused.append((length, batch, needed))
    if refused:
        length, batch, needed = refused[0]
        more = "" if len(refused) == 1 else f", and {len(refused) - 1} more of the combinations do not fit"
        raise HalError(
            f"{length} tokens in batches of {batch} need about {needed / 1e9:.3g} GB, and {available / 1e9:.3g} GB may "
            f"be used{more}: ask for shorter texts or smaller batches"
        )
    return most


def attention_bytes(model: Model, device: Device, length: int, batch: int) -> int:
    """What a device says that one attention call of the model allocates; 0 where it refuses the call."""
    told = model.describe()
    heads, heads_kv, dim = (told[name] for name in ("heads", "key_value_heads", "head_dim"))
    if not all(isinstance(size, int) for size in (heads, heads_kv, dim)):
        return 0  # layers differ, or the model says nothing
    request = AttentionRequest(batch, heads, heads_kv, length, length, dim, dim, model.dtype)
    try:
        return registry.backend_of(device).estimate(request, device).memory
    except Exception:  # how it fails is for the row to say
        return 0


def bytes_needed(model: Model, length: int, batch: int, texts: int) -> int:
    """Bytes that a workload takes at its peak: the model and its float64 reference, and that reference's kept runs.

    The model's step is run on fake tensors, which allocate nothing.
    """
    found = estimate_memory(model.network, batch, sequence_length=length, training=False)
    wider = 8 / model.network.dtype.itemsize
    step = float(found) - found.weights
    config = model.network.config.get_text_config()
    layers, width = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "hidden_size"))
    kept = texts * length * (layers + 1) * width * 8
    logits = batch * length * (config.vocab_size if model.kind != "embedding" else 0) * 8
    return int(found.weights * (1 + wider) + step * wider + kept + 2 * logits)


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers[:5])) + (",..." if len(numbers) > 5 else "")

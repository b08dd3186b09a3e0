"""`hal bench`: a device's attention beside torch's own, interleaved in one run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .calibration import write_whole
from .errors import ContractError
from .registry import registry
from .request import DTYPE_BYTES


def bench(
    device: str, lengths: Sequence[int], shape: tuple[int, int, int], dtype: str, causal: bool,
    progress: Callable[[str, float], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Time `hal.attention` and a bound call on a device beside torch's scaled_dot_product_attention, on the same tensors.

    Args:
        device: device id or backend name. lengths: tokens, queries and keys alike. shape: (batch, heads, head_dim).
        dtype, causal: the call. progress: called with a text and the share done.

    Returns:
        One dict per length: the device, its fidelity, and for "torch", "hal" and "bound" the median and 95th percentile in
        milliseconds and the calls timed.

    Raises:
        ContractError: an unknown dtype. UnsupportedError: the device cannot run the call.
    """
    import torch

    from .attention import attention, bind
    from .testing import BenchmarkRunner

    if dtype not in DTYPE_BYTES:
        raise ContractError(f"dtype {dtype!r} was given: use one of {', '.join(DTYPE_BYTES)}")
    found = registry.find(device)[0]
    session: Any = registry.session(found.id)
    runner = BenchmarkRunner(device=found.reads[0], synchronize=getattr(session, "synchronize", None))
    records = []
    for i, length in enumerate(lengths):
        progress(f"{length} tokens", i / len(lengths))
        size = (shape[0], shape[1], length, shape[2])
        tensors: list[Any] = [torch.randn(size, device=found.reads[0]).to(getattr(torch, dtype)) for _ in range(3)]
        named: dict[str, Any] = {"is_causal": causal, "backend": found.id}
        sdpa: Any = torch.nn.functional.scaled_dot_product_attention
        peer, ours = partial(sdpa, *tensors, is_causal=causal), partial(attention, *tensors, **named)
        with torch.no_grad():
            bound = partial(bind(*tensors, **named), *tensors)
            timed = runner.compare({"torch": peer, "hal": ours, "bound": bound}).results
        record: dict[str, Any] = {"device": found.id, "fidelity": str(found.fidelity), "length": length}
        for name, r in timed.items():
            record |= {f"{name}_p50_ms": r.p50, f"{name}_p95_ms": r.p95, f"{name}_calls": r.n_timed}
        records.append(record)
    return records


def write_csv(records: Sequence[dict[str, Any]], path: str) -> None:
    """Write records, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    write_whole(Path(path), text.getvalue())

"""`hal bench`: a device's attention against torch's own, interleaved in one run."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from .errors import ContractError
from .registry import registry
from .request import DTYPE_BYTES


@attrs.frozen(kw_only=True)
class BenchReport:
    """A printed table and the figures behind it.

    Attributes:
        columns, rows: the table, as text. notes: lines below it. records: one dict per length.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    records: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"title": self.title, "notes": self.notes, "records": self.records}

    def write_csv(self, path: str) -> None:
        """Write the records, whole or not at all."""
        unfinished = Path(f"{path}.{os.getpid()}.tmp")
        try:
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self.records[0]))
                writer.writeheader()
                writer.writerows(self.records)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def bench(
    device: str,
    lengths: Sequence[int],
    batch: int,
    heads: int,
    head_dim: int,
    dtype: str,
    causal: bool,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> BenchReport:
    """Time `hal.attention` on a device beside torch's scaled_dot_product_attention on the same tensors.

    Args:
        device: device id or backend name. lengths: tokens, queries and keys alike.
        batch, heads, head_dim, dtype, causal: the call. progress: called with a text and the share done.

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
        shape = (batch, heads, length, head_dim)
        query, key, value = (torch.randn(shape, device=found.reads[0]).to(getattr(torch, dtype)) for _ in range(3))
        with torch.no_grad():
            bound = bind(query, key, value, is_causal=causal, backend=found.id)
            peer = torch.nn.functional.scaled_dot_product_attention
            comparison = runner.compare(
                {
                    "torch": partial(peer, query, key, value, is_causal=causal),
                    "hal": partial(attention, query, key, value, is_causal=causal, backend=found.id),
                    "bound": partial(bound, query, key, value),
                }
            )
        record: dict[str, Any] = {"device": found.id, "fidelity": str(found.fidelity), "length": length}
        for name, result in comparison.results.items():
            record |= {f"{name}_p50_ms": result.p50, f"{name}_p95_ms": result.p95, f"{name}_calls": result.n_timed}
        records.append(record)
    progress("done", 1.0)
    rows = tuple(
        (
            str(r["length"]), f"{r['torch_p50_ms']:.4g}", f"{r['hal_p50_ms']:.4g}", f"{r['bound_p50_ms']:.4g}",
            f"{r['torch_p50_ms'] / r['hal_p50_ms']:.2f}x", str(r["hal_calls"]),
        )
        for r in records
    )  # fmt: skip
    call = f"batch {batch}, {heads} heads, head_dim {head_dim}, {dtype}" + (", causal" if causal else "")
    return BenchReport(
        title=f"{found.id} ({found.fidelity}: {found.model}), {call}",
        columns=("tokens", "torch ms", "hal ms", "bound ms", "hal against torch", "calls"),
        rows=rows,
        notes=(f"medians, interleaved; torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}",),
        records=tuple(records),
    )

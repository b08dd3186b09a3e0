"""Hold each CUDA kernel to float64 on this GPU and write plugins/cuda/verified.json; or list what changed since the last time.

    python benchmarks/cuda_verify.py            check on the GPU and write
    python benchmarks/cuda_verify.py --changed  no GPU: kernels whose source is not the one that was checked
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / "plugins" / "cuda"
_HOPPER = ("hopper", "pipeline", "softmax")
#: Kernel and the files of hal_cuda/kernels whose text its check vouches for.
KERNELS = {
    "hopper.forward": _HOPPER, "hopper.forward_packed": (*_HOPPER, "tiles"), "attend.attend": ("attend",),
    "attend.merge": ("attend",), "attend.keep_mask": ("attend",), "plan.list_once": ("plan",),
}  # fmt: skip


def source_hash(files: tuple[str, ...]) -> str:
    texts = ((ROOT / "hal_cuda" / "kernels" / f"{file}.py").read_bytes() for file in files)
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def changed() -> list[str]:
    """Kernels that no check on a GPU has seen as they are now."""
    path = ROOT / "verified.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [name for name, files in KERNELS.items() if known.get(name, {}).get("source") != source_hash(files)]


def measure() -> dict[str, float]:
    """Root mean square over 5 seeds of each kernel's relative error against float64."""
    import torch
    from cuda_attention import DEVICE, Bench, normal

    from hal_core import AttentionRequest, Causal, SequenceTables

    bench = Bench()

    def exact(query: Any, key: Any, value: Any) -> Any:
        """Bottom-right causal attention in float64."""
        len_q, len_k = query.shape[2], key.shape[2]
        wide = [t.double().repeat_interleave(8 // t.shape[1], 1) for t in (query, key, value)]
        reach = torch.arange(len_k, device="cuda") <= torch.arange(len_q, device="cuda")[:, None] + len_k - len_q
        scores = (wide[0] @ wide[1].mT * 128**-0.5).masked_fill(~reach, -torch.inf)
        return torch.softmax(scores, -1) @ wide[2]

    def error(path: str, heads_kv: int, len_q: int, len_k: int) -> float:
        total = 0.0
        for seed in range(5):
            torch.manual_seed(seed)
            query, key, value = normal(1, 8, len_q, 128), normal(1, heads_kv, len_k, 128), normal(1, heads_kv, len_k, 128)
            request = AttentionRequest(
                batch=1, heads_q=8, heads_kv=heads_kv, len_q=len_q, len_k=len_k, dim_qk=128, dim_v=128, dtype="bfloat16",
                device=DEVICE, causal=Causal.BOTTOM_RIGHT,
            )  # fmt: skip
            want = exact(query, key, value)
            total += float((bench.own(path, request)(query, key, value).double() - want).norm() / want.norm()) ** 2
        return (total / 5) ** 0.5

    def packed() -> float:
        total, ends_q, ends_k = 0.0, [0, 300, 1300, 1500], [0, 700, 1700, 2400]
        tables = SequenceTables(*(torch.tensor(ends, dtype=torch.int32, device="cuda") for ends in (ends_q, ends_k)))
        request = AttentionRequest(
            batch=3, heads_q=8, heads_kv=4, len_q=1000, len_k=1000, dim_qk=128, dim_v=128, dtype="bfloat16", device=DEVICE,
            causal=Causal.BOTTOM_RIGHT, packed=True,
        )  # fmt: skip
        for seed in range(5):
            torch.manual_seed(seed)
            query, key, value = normal(1, 8, 1500, 128), normal(1, 4, 2400, 128), normal(1, 4, 2400, 128)
            got = bench.own("hopper", request)(query, key, value, None, None, tables)
            want = torch.cat([
                exact(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d])
                for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
            ], 2)  # fmt: skip
            total += float((got.double() - want).norm() / want.norm()) ** 2
        return (total / 5) ** 0.5

    def dropped() -> float:
        """Share of weights dropped, less the share asked for."""
        from hal_cuda.portable import dropout_pattern

        keep = dropout_pattern(bench.chip, (2, 2, 1000, 1000), 0.25, (1, 2), "cuda")
        return abs(0.75 - float(keep.float().mean()))

    def listed() -> float:
        """Share of random plans' rows whose list is not that of the host."""
        from hal_cuda.plans import listed_once

        from hal_core import BlockPlan

        indices = torch.randint(0, 40, (2, 3, 50, 200), dtype=torch.int32, device="cuda")
        counts = torch.randint(0, 201, (2, 3, 50), dtype=torch.int32, device="cuda")
        once = listed_once(BlockPlan(128, 128, indices, counts), bench.chip)
        given = [indices.view(-1, 200).tolist(), counts.view(-1).tolist()]
        got = [once.indices.view(-1, 200).tolist(), once.counts.view(-1).tolist()]
        wrong = [list(dict.fromkeys(row[:n])) != kept[:m] for row, n, kept, m in zip(*given, *got, strict=True)]
        return sum(wrong) / len(wrong)

    checks: dict[str, Callable[[], float]] = {
        "attend.attend": lambda: error("portable", 4, 500, 1000), "attend.merge": lambda: error("portable", 2, 1, 20000),
        "attend.keep_mask": dropped, "plan.list_once": listed,
    }  # fmt: skip
    if bench.chip.capability == (9, 0):
        checks["hopper.forward"] = lambda: error("hopper", 4, 1500, 2000)
        checks["hopper.forward_packed"] = packed
    return {name: check() for name, check in checks.items()}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--changed", action="store_true", help="list kernels that changed since they were checked")
    if options.parse_args().changed:
        for name in changed():
            print(f"{name} changed since its last check on a GPU")
        return 1 if changed() else 0
    import torch

    path = ROOT / "verified.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, error in measure().items():
        known[name] = {
            "source": source_hash(KERNELS[name]), "device": torch.cuda.get_device_name(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "error": float(f"{error:.3g}"),
        }  # fmt: skip
        print(name, known[name])
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

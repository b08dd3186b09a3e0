"""What share of 25 small models the KPU's torch.compile backend runs, and how far outputs and gradients are from eager.

The models of tests/kpu/model_zoo.py: configurations of transformers with random weights. Cycles are simulated, of one
inference at the TRANSACTIONAL fidelity on the profile t64.

    python benchmarks/kpu_models.py [--record] [--only NAME ...]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from record import parser, publish

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kpu"))

from model_zoo import TRANSFORMERS, build, floats

COLUMNS = [
    "model",
    "operators",
    "on the host",
    "MACs",
    "output error",
    "gradient error",
    "operators, training",
    "on the host, training",
    "cycles",
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=None, help="names of models")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name) for name in given.only or TRANSFORMERS]
    notes = [
        "Errors are norms relative to eager float32. A gradient that is zero but for rounding, as a key's bias has, is "
        "compared with a ten-thousandth of the norm of all gradients. Cycles are simulated "
        "(transactional, t64, one operation after the other).",
    ]
    publish(given, "kpu_coverage", "Models on the KPU", COLUMNS, rows, notes, section="Models")


def measured(name: str) -> list[str]:
    """One line of the table."""
    import hal_kpu

    model, inputs = build(name, seed=0)
    torch._dynamo.reset()
    with torch.no_grad():
        want = floats(model(**inputs))
        got = floats(torch.compile(model, backend="kpu_transactional")(**inputs))
    inference = hal_kpu.get_last_stats()
    error = max(float((one - other).norm() / other.norm()) for one, other in zip(got, want, strict=True))
    gradient = gradient_error(model, inputs)
    training = hal_kpu.get_last_stats()
    return [
        name,
        f"{inference.nodes}",
        f"{inference.nodes - inference.kpu_nodes}",
        f"{inference.macs:,}",
        f"{error:.1e}",
        f"{gradient:.1e}",
        f"{training.nodes}",
        f"{training.nodes - training.kpu_nodes}",
        f"{inference.cycles:,}",
    ]


def gradient_error(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """The worst parameter's, in training mode, for a random weighting of the outputs."""
    torch._dynamo.reset()
    other = copy.deepcopy(model.train())
    for run in (torch.compile(model, backend="kpu"), other):
        draw = torch.Generator().manual_seed(0)
        sum((out * torch.randn(out.shape, generator=draw)).sum() for out in floats(run(**inputs))).backward()
    pairs = [
        (p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True) if q.grad is not None
    ]
    floor = 1e-4 * float(torch.stack([want.norm() for _, want in pairs]).norm())
    return max(float((got - want).norm()) / max(float(want.norm()), floor) for got, want in pairs)


if __name__ == "__main__":
    main()

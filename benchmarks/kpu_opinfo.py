"""What share of PyTorch's own operator samples the KPU's torch.compile backend runs with nothing left to the host.

PyTorch describes its operators for its tests in `op_db`, with samples of arguments. The first float32 sample of each is
compiled with backend="kpu" and run. It counts where it reaches the backend as a graph with at least one operator; it
scores where every operator lowers to DFX opcodes and the values equal eager's. Needs `pip install expecttest`.

    python benchmarks/kpu_opinfo.py [--record] [--only NAME ...] [--list]
"""

from __future__ import annotations

import collections
import warnings
from typing import Any, NamedTuple

import torch
from record import parser, publish


class Outcome(NamedTuple):
    """One entry: its name, whether a graph came, what fell back, and how the values compare ("" where they agree)."""

    name: str
    graph: bool
    fallback: tuple[str, ...]
    difference: str


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=None, help="names of entries")
    options.add_argument("--list", action="store_true", help="print each entry that does not score")
    given = options.parse_args()
    from torch.testing._internal import common_methods_invocations as invocations

    # PyTorch seeds its generator inside some samples, which no graph can hold; here that is done outside of all of
    # them.
    invocations.wrapper_set_seed = lambda function, *args, **kwargs: function(*args, **kwargs)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries = [op for op in invocations.op_db if given.only is None or op.name in given.only]
    outcomes = [outcome for op in entries if (outcome := attempt(op)) is not None]
    through = [one for one in outcomes if one.graph]
    whole = [one for one in through if not one.fallback]
    right = [one for one in whole if not one.difference]
    if given.list:
        for one in outcomes:
            if not one.graph or one.fallback or one.difference:
                print(f"{one.name}: graph {one.graph}; host {'; '.join(one.fallback) or 'nothing'}; {one.difference}")
    left = collections.Counter(name for one in through for name in {text.split(":")[0] for text in one.fallback})
    rows = [
        ["entries of op_db", f"{len(entries)}", ""],
        ["with a float32 sample on the CPU that eager runs", f"{len(outcomes)}", ""],
        ["of those, through a graph", f"{len(through)}", ""],
        ["of those, no operator on the host", f"{len(whole)}", f"{len(whole) / max(len(through), 1):.1%}"],
        ["of those, values as eager's", f"{len(right)}", f"{len(right) / max(len(through), 1):.1%}"],
    ]
    notes = [
        "Values are computed by the opcodes' functions on the host; shares are of the entries that go through a graph.",
        "Entries that draw random numbers or give memory as it is (empty) are compared by shape and type.",
        "Left to the host most often: " + ", ".join(f"{name} ({count})" for name, count in left.most_common(25)) + ".",
    ]
    publish(
        given,
        "kpu_coverage",
        "Operators of PyTorch's own samples on the KPU",
        ["what", "entries", "share"],
        rows,
        notes,
    )


def attempt(op: Any) -> Outcome | None:
    """Compile and run the first float32 sample; None where there is none, or where eager does not run it."""
    from hal_kpu.frontend.fx.coverage import measure

    name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
    try:
        sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=False)))
        torch.manual_seed(0)
        want = op(sample.input, *sample.args, **sample.kwargs)
    except Exception:  # no such sample, or not on this machine
        return None
    torch._dynamo.reset()

    def run(*args: Any, **kwargs: Any) -> Any:
        return op.op(*args, **kwargs)

    with measure() as measurement:
        try:
            torch.manual_seed(0)
            got = torch.compile(run, backend="kpu", dynamic=False)(sample.input, *sample.args, **sample.kwargs)
        except Exception as error:  # Dynamo or a kernel gave up: no graph ran to its end
            return Outcome(
                name, False, (), f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            )
    coverage = measurement.coverage()
    fallback = tuple(f"{host}: {reason}" for host, reason, _ in coverage.fallback)
    return Outcome(
        name, coverage.nodes > 0, fallback, difference(got, want, not (_is_random(coverage) or "empty" in name))
    )


def _is_random(coverage: Any) -> bool:
    return "random" in dict(coverage.opcodes) or any(
        "rand" in name or "normal" in name for name, _, _ in coverage.fallback
    )


def difference(got: Any, want: Any, compared: bool) -> str:
    """How values differ; "" where they do not, within what float32 rounding explains.

    Shapes and types alone unless `compared`.
    """
    flat_got, flat_want = (torch.utils._pytree.tree_leaves(value) for value in (got, want))
    if len(flat_got) != len(flat_want):
        return f"{len(flat_got)} results for {len(flat_want)}"
    for one, other in zip(flat_got, flat_want, strict=True):
        if not isinstance(other, torch.Tensor):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype}{list(one.shape)} for {other.dtype}{list(other.shape)}"
        if not compared or other.layout != torch.strided:
            continue
        wide = torch.complex128 if other.is_complex() else torch.float64
        one, other = one.to(wide), other.to(wide)
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"values differ by {float((one - other).abs().nan_to_num().max()):.2g}"
    return ""


if __name__ == "__main__":
    main()

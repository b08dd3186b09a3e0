"""Comparisons that nobody ran: rows with chosen figures, for tests of what is said and drawn about them."""

from __future__ import annotations

from typing import Any

from hal_compare.result import Accuracy, Comparison, Costs, Figure, Group, Row

from hal_core import Basis, Device, Fidelity, Provenance

LINEAR, COMPILED = "attention and linear layers", "the whole model, by torch.compile"
PROFILES = ("2025", "2025-raw", "2025-2ghz", "envise", "mars", "2025-128")


def figure(middle: float, spread: float = 0.0, *, modelled: bool = False) -> Figure:
    """A figure with an interval of `middle` x (1 ± spread)."""
    basis = Basis.MODELLED if modelled else Basis.MEASURED
    provenance = Provenance.ASSUMED if modelled else Provenance.MEASURED_SILICON
    source = "a test's profile" if modelled else "this host's clock"
    return Figure(middle, middle * (1 - spread), middle * (1 + spread), basis, provenance, source)


def row(
    name: str,
    error: float,
    seconds: float,
    joules: float | None = None,
    *,
    kind: Fidelity = Fidelity.HARDWARE,
    model: str = "fake",
    scope: str = "attention",
    spread: float = 0.0,
    baseline: bool = False,
    repeats: int = 3,
) -> Row:
    """A row that ran. A simulated device's figures are modelled, its time and energy with ±50%."""
    modelled = kind is Fidelity.SIMULATED
    device = None
    if not baseline:
        identity = name.partition(" ")[0]
        device = Device(id=identity, family=identity.partition(":")[0], vendor="Vendor", model=model, fidelity=kind)
    wide = 0.5 if modelled else 0.03
    time, rest = figure(seconds, wide, modelled=modelled), figure(1.8, 0.2)
    inside = figure(seconds * 40 if modelled else seconds, 0.03)
    found = Accuracy(
        worst=figure(error, spread, modelled=modelled),
        mean=figure(error * 0.8, spread, modelled=modelled),
        cosine=figure(1 - error / 9, modelled=modelled),
        cosine_mean=figure(1 - error / 20, modelled=modelled),
        layers=tuple(error * (layer + 1) / 7 for layer in range(7)),
        agreement=figure(1.0 if error < 1e-3 else 0.853, modelled=modelled),
        decisions=75,
    )
    costs = Costs(
        wall=figure(rest.middle + inside.middle, 0.1),
        inside=inside,
        remainder=rest,
        on_device=time if modelled else inside,
        total=rest.plus(time),
        energy=None if joules is None else figure(joules, wide, modelled=modelled),
        macs=37_700_000 if scope == "attention" else 2_100_000_000,
        calls=12,
    )
    return Row(
        name=name,
        device=device,
        place="cpu",
        baseline=baseline,
        scope=scope,
        repeats=repeats,
        accuracy=found,
        costs=costs,
        groups={"texts.txt": costs},
    )


def absent(name: str) -> Row:
    """A row of a device that is not there."""
    reason = f"{name.partition(':')[0]} is installed but has no device: no driver is installed: install the driver"
    return Row(name=name, device=None, place="", refusals=(reason,))


def comparison(*rows: Row, **changes: Any) -> Comparison:
    """The rows in a comparison of a small embedding model."""
    model = {
        "name": "minilm",
        "architecture": "BertModel",
        "kind": "embedding",
        "modality": "text",
        "parameters": 22_700_000,
        "layers": 6,
        "heads": 12,
        "key_value_heads": 12,
        "head_dim": 32,
        "hidden_size": 384,
        "stored_dtype": "float32",
        "dtype": "float32",
        "pooling": "mean",
        "note": "",
    }
    group = Group(
        name="texts.txt",
        sha256="5e" * 32,
        texts=75,
        tokens=5502,
        longest=496,
        cut=0,
        macs=2_760_000_000,
        attention_macs=353_000_000,
    )
    facts: dict[str, Any] = {
        "command": f"hal compare minilm --all --text {'/a/long/path' * 12}/texts --report out/report-all.html",
        "created": "2026-11-30T20:00:00+00:00",
        "versions": {"python": "3.11", "hal-core": "0.2.0"},
        "machine": {"system": "Linux", "processor": "a processor with a name of some length at 2.4 GHz"},
        "model": model,
        "groups": (group,),
        "batches": 10,
        "batch_size": 8,
        "repeats": 3,
        "rows": rows,
    }
    return Comparison(**{**facts, **changes})


def every_family() -> Comparison:
    """As many rows as a run of every device and variant has, with their usual figures."""
    emulated, simulated = Fidelity.EMULATED, Fidelity.SIMULATED
    rows = [
        row("torch sdpa", 9.7e-7, 0.248, baseline=True),
        row("cpu:0", 9.6e-7, 0.240, model="AMD EPYC", repeats=1),
        row("kpu:0", 9.6e-7, 0.0212, 0.0353, kind=simulated, model="T64"),
        row("kpu:0 +linear", 1.1e-6, 0.31, 0.41, kind=simulated, model="T64", scope=LINEAR),
        row("kpu:0 compiled", 1.2e-6, 0.33, 0.44, kind=simulated, model="T64", scope=COMPILED),
    ]
    for number, profile in enumerate(PROFILES):
        error, name = 0.3 + 0.03 * number, f"lightmatter:{number}"
        photonic: dict[str, Any] = {"kind": simulated, "model": profile, "spread": 0.03}
        rows.append(row(name, error, 0.05 + 0.01 * number, 1.5 + 0.4 * number, **photonic))
        wide = row(f"{name} +linear", 2 * error, 0.5 + 0.2 * number, 15.0 + 3 * number, scope=LINEAR, **photonic)
        rows.append(wide)
    rows += [
        row("luminous:0", 0.34, 0.0404, 2.02, kind=simulated, model="bank", spread=0.02),
        row("opencl:0", 9.9e-7, 0.345, kind=emulated, model="pthread-skylake-avx512-AMD EPYC"),
        row("photonic:0", 0.33, 0.047, 1.47, kind=simulated, model="generic", spread=0.04),
        row("vulkan:0", 1.1e-6, 1.39, kind=emulated, model="llvmpipe (LLVM 15.0.6, 256 bits)"),
        absent("cuda:0"),
    ]
    return comparison(*rows)

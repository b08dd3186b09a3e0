"""Where an activator and an inhibitor form patterns: the map that theory gives, and simulated growth on it.

    python examples/geometric/turing_map.py [--device vulkan:0] [--out turing.png]

For each decay of the inhibitor the critical ratio of diffusions is a curve. Fields of small noise are simulated on both
sides of it; whether they grow, and at what rate, is compared with the dispersion relation of the kernel's steps.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from hal_geometric import flow, pattern
from torch import Tensor

REACTION, EPSILON, DU, DT = 0.3, 2.5, 0.3, 0.3
DECAYS = (0.6, 0.7, 0.8, 0.9)
#: Multiples of the critical ratio.
TIMES = (0.8, 1.2)


def kinetics(decay: float) -> dict[str, float]:
    return {"reaction": REACTION, "epsilon": EPSILON, "decay": decay}


def predicted(decay: float, dv: float, side: int) -> float:
    """Growth per unit time of the fastest mode of a side x side grid, by Euler's steps."""
    wave = 2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64)
    modes = pattern.mode_of(wave.view(-1, 1), wave)
    return float(pattern.dispersion(pattern.jacobian(0.0, **kinetics(decay)), DU, dv, modes, DT).max())


def grown(decay: float, dv: float, side: int, steps: int, device: str | None) -> tuple[float, Tensor]:
    """(growth of the fastest mode per unit time over the second half, the field at the end)."""
    generator = torch.Generator().manual_seed(0)
    u, v = (1e-5 * torch.randn(side, side, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"dt": DT, "diffusion_u": DU, "diffusion_v": dv, "device": device, **kinetics(decay)}
    u, v = flow.react(u, v, steps=steps, **options)
    late, _ = flow.react(u, v, steps=steps, **options)
    wave = 2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64)
    modes = pattern.mode_of(wave.view(-1, 1), wave)
    rates = pattern.dispersion(pattern.jacobian(0.0, **kinetics(decay)), DU, dv, modes, DT)
    place = rates.argmax()
    powers = [pattern.structure_factor(x, device=device).double().flatten()[place] for x in (u, late)]
    return float((powers[1] / powers[0]).log() / (2 * steps * DT)), late


def run(side: int = 32, steps: int = 200, device: str | None = None) -> list[dict[str, float]]:
    rows = []
    for decay in DECAYS:
        ratio = pattern.critical_ratio(pattern.jacobian(0.0, **kinetics(decay)))
        for times in TIMES:
            dv = times * ratio * DU
            rate, _ = grown(decay, dv, side, steps, device)
            row = {"decay": decay, "ratio": times * ratio, "critical": ratio, "growth": rate}
            rows.append(row | {"predicted": predicted(decay, dv, side)})
    return rows


def picture(path: str, rows: list[dict[str, float]], device: str | None = None) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    decays = torch.linspace(0.5, 0.99, 100)
    curve = [pattern.critical_ratio(pattern.jacobian(0.0, **kinetics(float(d)))) for d in decays]
    axes[0].plot(decays, curve, color="black")
    axes[0].fill_between(decays, curve, 12, alpha=0.2)
    for row in rows:
        axes[0].plot(row["decay"], row["ratio"], "^" if row["growth"] > 0 else "v", color="tab:red")
    axes[0].set(xlabel="decay", ylabel="Dv / Du", ylim=(0, 12), title="shaded: patterns form. Triangles: simulated")
    axes[1].plot([r["predicted"] for r in rows], [r["growth"] for r in rows], "o")
    axes[1].axline((0, 0), slope=1, color="grey", linewidth=0.7)
    axes[1].set(xlabel="predicted growth", ylabel="simulated growth", title="growth of the fastest mode, 1 / time")
    ratio = pattern.critical_ratio(pattern.jacobian(0.0, **kinetics(0.8)))
    generator = torch.Generator().manual_seed(1)
    u, v = (0.01 * torch.randn(64, 64, generator=generator) for _ in range(2))
    options: dict[str, Any] = {"dt": DT, "diffusion_u": DU, "diffusion_v": 1.3 * ratio * DU, **kinetics(0.8)}
    u, _ = flow.react(u, v, steps=6000, device=device, **options)
    axes[2].imshow(u)
    axes[2].set_title(f"u at decay 0.8, wavelength {float(pattern.wavelength(u, device=device)):.1f} cells")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu:0")
    parser.add_argument("--out", help="write a picture here")
    options = parser.parse_args(arguments)
    rows = run(device=options.device)
    for row in rows:
        side = "above" if row["ratio"] > row["critical"] else "below"
        print(
            f"decay {row['decay']:.1f}, Dv/Du {row['ratio']:5.2f} {side} {row['critical']:.2f}: "
            f"growth {row['growth']:+.4f}, predicted {row['predicted']:+.4f}"
        )
    if options.out:
        picture(options.out, rows, options.device)
    return rows


if __name__ == "__main__":
    main()

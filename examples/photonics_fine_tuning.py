"""Noise-aware fine-tuning: a small network loses accuracy on an uncalibrated photonic chip, and training recovers it.

    python examples/photonics_fine_tuning.py

The chip is simulated (lightmatter:1, the 2025 crossbar as it was measured, uncalibrated). In training the forward pass
runs on the chip and the gradients are those of the exact layers (the straight-through estimator), so the weights learn
to live with its gains, offsets and noise.
"""

from __future__ import annotations

import torch
from hal_photonics import to_optics
from sklearn.datasets import load_digits
from torch import nn

DEVICE = "lightmatter:1"


def train(network: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()


def main() -> dict[str, float]:
    """Accuracy in float32, on the chip, and on the chip after fine-tuning."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train_x, train_y = images[order[360:]], labels[order[360:]]
    test_x, test_y = images[order[:360]], labels[order[:360]]

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(test_x).argmax(1) == test_y).double().mean())

    hidden = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
    network = nn.Sequential(*hidden, nn.Linear(64, 10))
    train(network, train_x, train_y, epochs=25, rate=2e-3)
    optical = to_optics(network, DEVICE)
    found = {"float32": accuracy(network), "on the chip": accuracy(optical)}
    train(optical, train_x, train_y, epochs=5, rate=1e-3)
    found["fine-tuned"] = accuracy(optical)
    return found


if __name__ == "__main__":
    for name, share in main().items():
        print(f"{name:12} {share:.1%}")

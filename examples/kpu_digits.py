"""Train an MLP and a CNN on handwritten digits through torch.compile(backend="kpu"), and compare with eager PyTorch.

    python examples/kpu_digits.py                 scikit-learn's digits, 1797 images of 8 x 8, in its wheel
    python examples/kpu_digits.py --mnist FOLDER  MNIST, 28 x 28, where its files are in FOLDER

Values are computed at the BEHAVIORAL fidelity; the coverage table says what share of the work the KPU's opcodes did.
"""

from __future__ import annotations

import argparse
import copy

import hal_kpu
import torch
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits (not MNIST): a fifth of each class is kept for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def mnist(folder: str, limit: int = 6000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first images of MNIST."""
    parts = (hal_kpu.load_mnist(split, limit=limit, root=folder) for split in ("train", "test"))
    (train, train_labels), (test, test_labels) = parts
    return (
        torch.tensor(train).reshape(-1, 1, 28, 28),
        torch.tensor(train_labels),
        torch.tensor(test).reshape(-1, 1, 28, 28),
        torch.tensor(test_labels),
    )


def mlp(size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (size // 2) ** 2, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Forward and backward run on the KPU; the optimizer steps on the host."""
    compiled = torch.compile(model.train(), backend="kpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            if len(batch) < 64:
                continue  # batches of one size: one compile
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--mnist", metavar="FOLDER", help="train on MNIST from this folder")
    options.add_argument("--epochs", type=int, default=12)
    given = options.parse_args()
    torch.manual_seed(0)
    train_images, train_labels, images, labels = mnist(given.mnist) if given.mnist else digits()
    print(f"{'MNIST' if given.mnist else 'digits'}: {len(train_labels)} images to train, {len(labels)} to test")
    for name, build in (("MLP", mlp), ("CNN", cnn)):
        model = build(images.shape[-1])
        train(model, train_images, train_labels, given.epochs)
        eager = predict(copy.deepcopy(model).eval(), images)
        compiled = predict(torch.compile(model.eval(), backend="kpu"), images)
        coverage = hal_kpu.get_last_stats()
        accuracy = float((compiled == labels).float().mean())
        print(f"{name}: {accuracy:.2%} right on the KPU; predictions equal to eager's: {torch.equal(compiled, eager)}")
        operators = f"{coverage.kpu_nodes} of {coverage.nodes} operators"
        print(f"  {operators}, {coverage.kpu_macs:,} of {coverage.macs:,} MACs on the KPU")


if __name__ == "__main__":
    main()

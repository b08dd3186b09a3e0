"""Training, judging and fine-tuning the two networks that are trained here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hal_photonics import to_optics
from torch import Tensor, nn
from torch.nn import functional

from . import images, source_text
from .optics import Products

#: Examples of a batch when a network is judged.
_JUDGED = 50


class Task(NamedTuple):
    """A trained network with its data.

    Attributes:
        inputs, labels: for training. test_inputs, test_labels: never trained on. vary: changes a training batch.
    """

    name: str
    network: nn.Module
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    vary: Callable[[Tensor], Tensor]
    smoothing: float


def digits(weights: Path | None) -> Task:
    """The residual network on scikit-learn's digits."""
    return _trained(Task("digits", images.ResidualNetwork(), *images.digits(), _shifted, 0.0), weights, 12, 64, 4e-3)


def cifar(folder: Path, weights: Path | None) -> Task:
    """The residual network, wider, on the first 5,000 images of CIFAR-10."""
    network = images.ResidualNetwork(channels=3, width=16)
    return _trained(Task("CIFAR-10", network, *images.cifar(folder), _shifted, 0.0), weights, 15, 64, 4e-3)


def text(weights: Path | None) -> Task:
    """The two-layer text classifier."""
    task = Task("text", source_text.TextClassifier(), *source_text.data(), source_text.window, 0.1)
    return _trained(task, weights, 36, 32, 2e-3)


def _shifted(x: Tensor) -> Tensor:
    across, down = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (across, down), (2, 3))


def _trained(task: Task, weights: Path | None, epochs: int, batch: int, rate: float) -> Task:
    """The task with its network trained, or read where it was trained before."""
    file = None if weights is None else weights / f"{task.name}.pt"
    if file is not None and file.exists():
        task.network.load_state_dict(torch.load(file, weights_only=True))
        return task._replace(network=task.network.eval())
    torch.manual_seed(0)
    network = type(task.network)() if task.name != "CIFAR-10" else task.network
    train(task._replace(network=network), network, epochs=epochs, batch=batch, rate=rate)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), file)
    return task._replace(network=network)


def train(task: Task, network: nn.Module, *, epochs: int, batch: int, rate: float, decay: float = 0.05) -> None:
    """Train a network on the task, in place: AdamW, one cycle of the rate. It is in eval mode afterwards."""
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)
    steps = epochs * (len(task.inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(task.inputs))[: len(task.inputs) // batch * batch].view(-1, batch):
            out = network(task.vary(task.inputs[chosen]))
            loss = functional.cross_entropy(out, task.labels[chosen], label_smoothing=task.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def accuracy(task: Task, network: nn.Module) -> float:
    """The share of the test that a network gets right."""
    right = 0
    with torch.no_grad():
        for x, y in zip(task.test_inputs.split(_JUDGED), task.test_labels.split(_JUDGED), strict=True):
            right += int((network(x).argmax(1) == y).sum())
    return right / len(task.test_labels)


def on_products(task: Task, products: Products, *, digital: tuple[str, ...] = (), network: Any = None) -> nn.Module:
    """A copy of the network whose layers and attention are computed by `products`."""
    changed = to_optics(
        copy.deepcopy(task.network if network is None else network), products, digital=digital, passes=products.passes
    )
    if isinstance(changed, source_text.TextClassifier):
        changed.attend = products.attend
    return changed


def fine_tuned(task: Task, products: Products, *, epochs: int, batch: int, rate: float) -> nn.Module:
    """The network after training with the chip's own products in the forward pass (straight-through gradients)."""
    network = on_products(task, products)
    torch.manual_seed(1)
    train(task, network, epochs=epochs, batch=batch, rate=rate, decay=0.0)
    return network

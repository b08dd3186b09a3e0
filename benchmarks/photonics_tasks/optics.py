"""Ways to compute a network's products: with white noise, in block floating point, and on a simulated chip."""

from __future__ import annotations

import math
from typing import Any

import torch
from hal_photonics import Settings
from hal_photonics.calibrate import calibrate
from hal_photonics.kernels.straight_through import valued
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.chip import SimulatedDriver
from hal_photonics.simulator.core import PhotonicCore
from torch import Tensor
from torch.nn import functional


class Products:
    """Products of linear layers and attention, exact here; subclasses change `raw`. Sums signal and error.

    Attributes:
        passes: of attention's products; a layer has its own.
    """

    def __init__(self, passes: int = 1) -> None:
        self.passes = passes
        self.signal = self.error = 0.0

    def raw(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        """x [batch, rows, K] @ weight [batch, N, K]^T."""
        return x @ weight.transpose(-1, -2)

    def _counted(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        found, exact = self.raw(x, weight, settings), x @ weight.transpose(-1, -2)
        self.signal += float(torch.linalg.vector_norm(exact)) ** 2
        self.error += float(torch.linalg.vector_norm(found - exact)) ** 2
        return found

    def __call__(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        """Of one layer: x [rows, K] @ weight [N, K]^T."""
        return self._counted(x.unsqueeze(0), weight.unsqueeze(0), settings)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Products:
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with both products this way and a digital softmax; its gradient is that of exact attention."""
        settings = Settings(passes=self.passes)
        with torch.no_grad():
            flat = [t.flatten(0, 1) for t in (q, k, v)]
            scores = self._counted(flat[0], flat[1], settings) / math.sqrt(q.shape[-1])
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            out = self._counted(weights, flat[2].transpose(1, 2), settings) / weights.sum(-1, keepdim=True)
            found = out.view(q.shape)
        if torch.is_grad_enabled() and q.requires_grad:
            return valued(found, functional.scaled_dot_product_attention(q, k, v))
        return found

    @property
    def snr(self) -> float:
        """Signal over error of all products so far, dB."""
        return 10 * math.log10(self.signal / self.error) if self.error else math.inf


class WhiteNoise(Products):
    """Gaussian noise, independent of everything, at a signal-to-noise ratio of every product."""

    def __init__(self, decibels: float) -> None:
        super().__init__()
        self.share = 10 ** (-decibels / 20)

    def raw(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        exact = super().raw(x, weight, settings)
        rms = exact.square().mean((-1, -2), keepdim=True).sqrt()  # of each product of the batch
        return torch.randn_like(exact).mul_(rms * self.share).add_(exact)


class OnChip(Products):
    """A simulated chip, calibrated or not; level "functional" is its number format alone."""

    def __init__(self, profile: Profile, *, calibrated: bool, level: Any = "device", passes: int = 1) -> None:
        super().__init__(passes)
        driver = SimulatedDriver(profile)
        self.core = PhotonicCore(driver, calibrate(driver, seed=profile.chip)[0] if calibrated else None)
        self.noise, self.level = torch.Generator().manual_seed(1), level

    def raw(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        return self.core.product(x, weight, self.noise, self.level, passes=settings.passes, gain=settings.gain)

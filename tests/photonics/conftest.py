"""Fixtures of the photonic tests: one thread, because many small products gain nothing from more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hal_photonics.backend import BUNDLED
from hal_photonics.profiles.profile import Profile, load


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def generic() -> Profile:
    return load(BUNDLED / "generic.toml")


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

"""What is stored by `hal calibrate` was measured on a device that did nothing else; no GPU is needed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda.calibrate import ATTEMPTS, steady

from hal_core import DeviceUnavailableError

STEADY = [1.0e-3, 1.1e-3, 0.9e-3, 1.0e-3, 1.05e-3, 1.0e-3, 0.95e-3, 1.0e-3, 40e-3]  # one call was held up
BUSY = [8e-3, 8e-3, 9e-3, 120e-3, 60e-3, 518e-3, 8e-3, 300e-3, 90e-3]


def test_times_of_a_busy_machine_are_refused_in_a_sentence() -> None:
    with pytest.raises(DeviceUnavailableError, match=r"8 and 518 ms.*idle; nothing was stored"):
        steady(lambda: list(BUSY))


def test_a_measurement_is_repeated_until_it_is_steady() -> None:
    drawn = [STEADY, *[BUSY] * (ATTEMPTS - 1)]
    assert steady(lambda: drawn.pop()) == pytest.approx(1.0e-3)
    assert not drawn

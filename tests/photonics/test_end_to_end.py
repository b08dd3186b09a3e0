"""The end-to-end benchmark's data, products and verdicts; its record holds the accuracies."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytest.importorskip("hal_photonic_lightmatter", reason="hal-photonic-lightmatter is not installed")
pytest.importorskip("hal_compare", reason="hal-compare is not installed")
sys.path.insert(0, str(BENCHMARKS))
try:
    import photonics_end_to_end as benchmark
    from photonics_tasks import images, optics, source_text, training
finally:
    sys.path.remove(str(BENCHMARKS))


def test_a_file_of_the_library_is_in_training_or_in_the_test() -> None:
    classes, found = source_text.pieces()
    assert len(classes) == source_text.CLASSES
    assert all(len(files) >= 3 for files in found.values())
    x, y, test_x, test_y = source_text.data()
    assert set(y.tolist()) == set(test_y.tolist()) == set(range(source_text.CLASSES))
    seen = {tuple(row) for row in x.tolist()}
    assert sum(tuple(row) in seen for row in test_x.tolist()) <= 0.02 * len(test_x)  # boilerplate may repeat
    changed = source_text.window(x[:16])
    assert changed.shape == (16, source_text.LENGTH)
    assert changed[:, 0].eq(2).all()


def test_cifars_binary_files_are_read(tmp_path: Path) -> None:
    for name, count in (("data_batch_1.bin", 20), ("test_batch.bin", 6)):
        rows = np.zeros((count, 3073), np.uint8)
        rows[:, 0], rows[:, 1:] = np.arange(count) % 10, 255
        rows.tofile(tmp_path / name)
    x, y, test_x, test_y = images.cifar(tmp_path, most=15)
    assert x.shape == (15, 3, 32, 32)
    assert test_x.shape == (3, 3, 32, 32)
    assert y.tolist() == [i % 10 for i in range(15)]
    assert test_y.tolist() == [0, 1, 2]
    assert float(x.max()) == 0.5


@pytest.mark.parametrize("decibels", [10, 18])
def test_white_noise_has_the_ratio_that_it_says(decibels: int) -> None:
    products = optics.WhiteNoise(decibels)
    torch.manual_seed(0)
    task = training.Task("digits", images.ResidualNetwork().eval(), *images.digits(), lambda x: x, 0.0)
    training.accuracy(
        task._replace(test_inputs=task.test_inputs[:60], test_labels=task.test_labels[:60]),
        training.on_products(task, products),
    )
    assert products.snr == pytest.approx(decibels, abs=0.1)
    exact = optics.Products()
    q = torch.randn(2, 2, 8, 4)
    torch.testing.assert_close(exact.attend(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert exact.snr == math.inf


def test_verdicts_say_what_holds_and_what_is_missed() -> None:
    def row(how: str, kept: float) -> benchmark.Row:
        return benchmark.Row("digits", how, 17.0, 0.9 * kept, kept, 2)

    how = "Lightmatter 2025, calibrated"
    rows = [row("float32", 1), row("white noise, 10 dB", 0.8), row("white noise, 18 dB", 0.99), row(how, 0.92)]
    rows += [row(f"{how}, 5% of channels digital", 0.98), row(f"{how}, 4 passes", 0.96)]
    rows += [row(f"{how}, fine-tuned with its noise", 1.0)]
    said = benchmark.verdicts(rows)
    assert "so it counts" in said[0]
    assert [line.rsplit(" ", 1)[1] for line in said[1:]] == ["missed.", "holds.", "missed.", "holds."]

"""FP8 training under FSDP2: two processes, gloo, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from hal_precision import FP8TrainingEngine, convert_model_to_fp8  # noqa: E402
from torch import nn  # noqa: E402

from hal_core import ContractError  # noqa: E402


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("scaling", [("rowwise", "dynamic"), ("tensorwise", "delayed")], ids=" ".join)
def test_losses_are_equal_with_and_without_sharding(scaling: tuple[str, str], tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("shard_worker.py"))
    workers = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(tmp_path / "store"), *scaling], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    found = json.loads(outputs[0])
    (plain, skipped), (sharded, skipped_sharded) = found["plain"], found["sharded"]
    assert found["held"] == pytest.approx(0.5), "each process holds half of the parameters"
    assert skipped == skipped_sharded == 1, "the step with the infinite input, in every process"
    assert sharded == pytest.approx(plain, rel=1e-6, nan_ok=True)
    assert sharded[-1] < sharded[0]


def test_a_model_that_is_sharded_already_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    trainer = FP8TrainingEngine(model).setup_fp8_training()
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(placements=())]))
    with pytest.raises(ContractError, match=r"convert_model_to_fp8\(model\) .* first, then fully_shard"):
        convert_model_to_fp8(model)
    with pytest.raises(ContractError, match=r"torch\.distributed\.checkpoint"):
        trainer.save_checkpoint(tmp_path / "x", torch.optim.SGD([torch.zeros(1, requires_grad=True)]))

"""The example code of the plan for adaptive attention tiling, run with its imports changed: its classes, their methods
and what it builds from them, on the CPU and on Vulkan.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from hal_geometric import AdaptiveTiling, QuantumGeometricCore, content_order

import hal_core as hal
from hal_core.protocols import MemoryManager, TilingStrategy
from hal_core.registry import registry
from hal_core.testing import relative_error, request_of

#: The plan's blocks. Its TensorMemoryManager is `hal_core.MemoryManager`; its AttentionBackend is an open session.
PLAN = """
class AttentionBackend(Protocol):
    def prepare_attention(self, query, key, value, tile_size) -> Dict[str, Any]: ...
    def compute_attention(self, prepared_inputs, mask=None) -> torch.Tensor: ...
    def optimize_tiling(self, sequence_length, batch_size, num_heads) -> Dict[str, int]: ...

class TensorMemoryManager(Protocol):
    def allocate(self, shape, dtype) -> Any: ...
    def free(self, tensor) -> None: ...
    def to_backend(self, tensor) -> Any: ...
    def to_torch(self, tensor) -> torch.Tensor: ...

class TilingStrategy(Protocol):
    def compute_optimal_tile_size(self, sequence_length, available_memory, backend_constraints) -> int: ...
    def split_into_tiles(self, tensor, tile_size) -> List[torch.Tensor]: ...

class QuantumGeometricCore:
    def compute_pattern_flow(self, tensor) -> torch.Tensor: ...
    def analyze_arithmetic_dynamics(self, pattern) -> torch.Tensor: ...
    def apply_motivic_structure(self, tensor) -> torch.Tensor: ...
"""
METHODS = [
    (each.name, method.name, [one.arg for one in method.args.args[1:]])
    for each in ast.parse(PLAN).body
    if isinstance(each, ast.ClassDef)
    for method in each.body
    if isinstance(method, ast.FunctionDef)
]
#: Arguments that have another name here.
RENAMED = {
    "prepared_inputs": "prepared",
    ("TensorMemoryManager", "free"): "buffer",
    ("TensorMemoryManager", "to_torch"): "buffer",
}


@pytest.fixture(params=["cpu:0", "vulkan:0"])
def plan_device(request: pytest.FixtureRequest) -> str:
    try:
        registry.find(request.param)
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))
    return str(request.param)


@pytest.mark.parametrize(("name", "method", "arguments"), METHODS, ids=lambda one: one if isinstance(one, str) else "")
def test_the_plans_methods_are_there_with_their_arguments_in_order(
    plan_device: str, name: str, method: str, arguments: list[str]
) -> None:
    with hal.session(plan_device) as session:
        owner: Any = {
            "AttentionBackend": session,
            "TensorMemoryManager": session.memory,
            "TilingStrategy": AdaptiveTiling(),
            "QuantumGeometricCore": QuantumGeometricCore(),
        }[name]
        given = [*inspect.signature(getattr(owner, method)).parameters][: len(arguments)]
    wanted = [RENAMED.get(one, RENAMED.get((name, method), one)) for one in arguments]
    assert given == wanted


def test_the_plans_attention_runs_through_its_three_calls(plan_device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 96, 64, generator=generator) for _ in range(3))
    with hal.session(plan_device) as session:
        tiles = session.optimize_tiling(96, 1, 2)
        assert all(isinstance(number, int) and number > 0 for number in tiles.values())
        prepared = session.prepare_attention(
            query, key, value, tile_size=next(iter(tiles.values())), request=request_of(query, key, value)
        )
        out = session.compute_attention(prepared).out
    assert relative_error(out, hal.testing.reference(query, key, value).out) <= 1e-5


def test_the_plans_memory_manager_holds_tensors(plan_device: str) -> None:
    tensor = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    with hal.session(plan_device) as session:
        manager: MemoryManager = session.memory
        held, empty = manager.to_backend(tensor), manager.allocate((5, 6), "float32")
        assert torch.equal(manager.to_torch(held), tensor)
        assert manager.to_torch(empty).shape == (5, 6)
        manager.free(held)
        manager.free(empty)


def test_the_plans_tiling_strategy_cuts_and_serves_attention(plan_device: str, seed: int) -> None:
    strategy: TilingStrategy = AdaptiveTiling(1e-4, block=32, device=plan_device)
    size = strategy.compute_optimal_tile_size(128, 1 << 20, {})
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, 2, 128, 64, generator=generator) for _ in range(3)]
    tiles = strategy.split_into_tiles(tensors[0], size)
    assert torch.equal(torch.cat(tiles, 2), tensors[0])
    order = content_order(tensors[1], size)
    out = hal.attention(
        tensors[0], order.apply(tensors[1]), order.apply(tensors[2]), tiling=strategy, backend=plan_device
    )
    assert relative_error(out, hal.testing.reference(*tensors).out) <= 1e-3


def test_the_plans_core_runs_with_the_arguments_of_its_text(plan_device: str, seed: int) -> None:
    core, generator = QuantumGeometricCore(plan_device), torch.Generator().manual_seed(seed)
    tensor = torch.randn(2, 16, 16, generator=generator)
    flowed = core.compute_pattern_flow(tensor)  # the plan's geometric flow shader
    assert flowed.shape == tensor.shape
    assert float(flowed.std()) < float(tensor.std())
    assert core.analyze_arithmetic_dynamics(tensor.softmax(-1)).shape == (2, 4)
    assert core.apply_motivic_structure(tensor).shape == tensor.shape
    ring = torch.ones(5, 5)
    ring[2, 2] = 0
    assert hal.kernel("euler_characteristic", plan_device)(ring, torch.tensor([0.5])).tolist() == [
        0
    ]  # its pattern shader


def test_the_plans_vulkan_backend_holds_shaders_memory_and_commands(plan_device: str) -> None:
    if not plan_device.startswith("vulkan"):
        pytest.skip("of the Vulkan backend")
    from hal_vulkan import VulkanCommandBuffer, VulkanMemoryPool, VulkanShaderManager

    with hal.session(plan_device) as session:
        hal.kernel("vector_add", plan_device)(torch.ones(3), torch.ones(3))
        recorder = session.recorder
        assert isinstance(recorder.shaders, VulkanShaderManager)
        assert isinstance(recorder.pool, VulkanMemoryPool)
        with recorder.call("add vectors") as commands:
            assert isinstance(commands, VulkanCommandBuffer)
            commands.finish()

"""What a GPU is, for people and for scripts."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import ContractError, DeviceUnavailableError


def device_info(device_id: int = 0) -> dict[str, Any]:
    """Facts of a CUDA device, as CUDA numbers it.

    Returns:
        name; compute_capability (major, minor); multiprocessors; warp_size; max_threads_per_multiprocessor;
        registers_per_multiprocessor; total_memory, l2_cache, shared_memory_per_block and shared_memory_per_block_optin
        (the most that a block may ask for), in bytes; memory_bus_width in bits; clock_rate and memory_clock_rate in
        kHz; uuid. Facts that this version of torch does not report are left out.

    Raises:
        DeviceUnavailableError: no GPU. ContractError: no device of this number.
    """
    import torch

    from ...discovery import find

    if not torch.cuda.is_available():
        reason = find().reason or "torch finds no CUDA device"
        raise DeviceUnavailableError(f"device_info needs a GPU: {reason}")
    if not 0 <= device_id < torch.cuda.device_count():
        raise ContractError(f"device_info was given device {device_id}: use 0 to {torch.cuda.device_count() - 1}")
    facts = torch.cuda.get_device_properties(device_id)
    named = {
        "name": "name",
        "multiprocessors": "multi_processor_count",
        "warp_size": "warp_size",
        "max_threads_per_multiprocessor": "max_threads_per_multi_processor",
        "registers_per_multiprocessor": "regs_per_multiprocessor",
        "total_memory": "total_memory",
        "l2_cache": "L2_cache_size",
        "shared_memory_per_block": "shared_memory_per_block",
        "shared_memory_per_block_optin": "shared_memory_per_block_optin",
        "memory_bus_width": "memory_bus_width",
        "clock_rate": "clock_rate",
        "memory_clock_rate": "memory_clock_rate",
    }
    found = {name: getattr(facts, attribute) for name, attribute in named.items() if hasattr(facts, attribute)}
    found["compute_capability"] = (facts.major, facts.minor)
    if hasattr(facts, "uuid"):
        found["uuid"] = str(facts.uuid)
    return found

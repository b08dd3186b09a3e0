"""Flows and the Euler characteristic by the optional package hal-cpu-native, its workspace from the session."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory import ScratchMemory, Workspace

#: Kernels of `hal_compute.extra_kernels` by their names in hal-cpu-native.
NAMES = {"reaction_diffusion_step": "reaction_diffusion", "ricci_flow_step": "ricci", "euler_characteristic": "euler"}


def run(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    sizes: Sequence[int],
    numbers: Sequence[float],
    repeats: int,
    memory: ScratchMemory,
) -> None:
    """Fill `outputs`. Arguments are those of `hal_compute.extra_kernels.Runner`; sizes: height, width and more."""
    import hal_cpu_native as native

    given = [t.detach().contiguous() for t in inputs]
    threads, shape = torch.get_num_threads(), (given[0].numel() // (sizes[0] * sizes[1]), sizes[0], sizes[1])
    needed = native.fields_workspace_bytes(NAMES[name], shape, threads)
    with Workspace(memory) as workspace:
        room = workspace.take((needed,), torch.bool)
        if name == "reaction_diffusion_step":
            fields = outputs[0], outputs[1]
            native.reaction_diffusion(
                given[0], given[1], numbers, steps=repeats, out=fields, workspace=room, threads=threads
            )
        elif name == "ricci_flow_step":
            native.ricci(given[0], numbers[0], steps=repeats, out=outputs[0], workspace=room, threads=threads)
        else:
            parts = outputs[0].view(*given[0].shape[:-2], *outputs[0].shape[-2:])
            native.euler(given[0], given[1], out=parts, workspace=room, threads=threads)

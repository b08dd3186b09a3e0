"""The template's device registered at run time instead of installed: the same checks, the same calls."""

import sys
from pathlib import Path

import torch

import hal_core as hal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "plugin_template"))
    hal.register(hal.BackendSpec(name="template", target="hal_template.backend:TemplateBackend"))
    query, key, value = torch.randn(1, 8, 128, 64), torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64)
    with hal.use("template"), hal.meter() as meter:
        out, lse = hal.attention(query, key, value, is_causal=True, enable_gqa=True, return_lse=True)
    record = meter.records["template:0"]
    print(f"{tuple(out.shape)} on {record.device.id} ({record.device.fidelity}), {record.wall * 1e3:.2f} ms")

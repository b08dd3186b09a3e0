"""`torch.nn.functional.scaled_dot_product_attention = hal.attention`: it takes the place of torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
{first}
import hal_core as hal
from hal_core.testing import reference, relative_error
{second}
F.scaled_dot_product_attention = hal.attention
torch.manual_seed(0)
failures, backward = [], False
bounds = {{}}
for device in hal.devices():
    relative = hal.capabilities(device.id).numerics["float32"].relative
    bounds.setdefault(device.id.partition(":")[0], (device.id, max(relative, 1e-5)))
for name, bound in bounds.values():
    hal.configure(backend=name)
    for heads, dim_v, len_q, mask, causal in (
        (2, 16, 9, None, True), (4, 16, 9, None, False), (2, 8, 1, None, False), (2, 16, 9, torch.randn(9, 9), False)
    ):
        q, k, v = torch.randn(1, heads, len_q, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, dim_v)
        given = {{"attn_mask": mask, "is_causal": causal, "enable_gqa": heads > 2}}
        got = F.scaled_dot_product_attention(q, k, v, **given)
        want = reference(q, k, v, mask, is_causal=causal, enable_gqa=heads > 2).out
        if not relative_error(got, want) <= bound:
            failures.append(f"{{name}} forward {{heads, dim_v, len_q, causal}}: {{relative_error(got, want)}}")
    if "backward" not in hal.capabilities(name).features:
        continue
    leaves = [torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3)]
    F.scaled_dot_product_attention(*leaves, is_causal=True).sum().backward()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = (wide[0] @ wide[1].mT / 4).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    (scores.softmax(-1) @ wide[2]).sum().backward()
    for leaf, want in zip(leaves, wide):
        if not relative_error(leaf.grad, want.grad) <= 10 * bound:
            failures.append(f"{{name}} gradient: {{relative_error(leaf.grad, want.grad)}}")
    backward = True
print(failures, len(bounds))
sys.exit(bool(failures) or not backward)
"""

#: When the name is replaced: before any plugin is imported, or after every device has run once.
MOMENTS = {
    "before": ("F.scaled_dot_product_attention = lambda *given, **named: hal.attention(*given, **named)", ""),
    "after": ("", "x = torch.randn(1, 2, 4, 16)\nfor each in hal.devices(): hal.attention(x, x, x, backend=each.id)"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_hal_attention_takes_the_place_of_torchs_own(moment: str) -> None:
    script = SCRIPT.format(first=MOMENTS[moment][0], second=MOMENTS[moment][1])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-1500:]}"

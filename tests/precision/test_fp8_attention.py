"""Attention with keys and values in FP8."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import hal_nn  # noqa: E402
from hal_precision import FP8AttentionConfig  # noqa: E402

from hal_core import ContractError  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402


@pytest.mark.parametrize("causal", [False, True])
def test_fp8_keys_and_values_stay_near_full_precision(causal: bool) -> None:
    torch.manual_seed(0)
    layer = hal_nn.create_attention(FP8AttentionConfig(64, 4, num_kv_heads=2, causal=causal)).eval()
    x = torch.randn(2, 24, 64)
    with torch.no_grad():
        out = layer(x)
    shape = (2, 24, -1, 16)
    q, k, v = (each(x).view(shape).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    want = layer.out_proj(want.transpose(1, 2).flatten(2))
    assert 1e-4 < relative_error(out, want) < 0.05
    trained = layer.train()(x)
    assert relative_error(trained, out) < 1e-5, "training rounds alike"
    trained.sum().backward()
    assert float(layer.k_proj.weight.grad.abs().sum()) > 0


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ContractError, match="no dropout"):
        hal_nn.create_attention(FP8AttentionConfig(64, 4, dropout=0.1))
    with pytest.raises(ContractError, match="FP8AttentionConfig"):
        hal_nn.create_attention(hal_nn.AttentionConfig(64, 4, pattern="fp8"))

"""Modules on [batch, length, embed_dim]: one set of weights, the devices they may run on, and their masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hal_nn import (
    AttentionLayer,
    FlashAttention3,
    FusedGELU,
    GlobalConfig,
    HybridFlashAttention,
    OptimizedLinear,
    PhotonicAttention,
    PhotonicFlashAttention,
)
from torch import Tensor, nn

import hal_core as hal

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
PHOTONIC = [device.id for device in hal.devices() if device.family == "photonic"]
needs_photonics = pytest.mark.skipif(not PHOTONIC, reason="no photonic device is here")


def alike(module: nn.Module) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    return theirs


@pytest.mark.parametrize("kind", [PhotonicFlashAttention, FlashAttention3, AttentionLayer])
def test_self_and_cross_attention_are_torch_s_on_the_same_weights(kind: Any) -> None:
    module = kind(16, 4).eval()
    theirs, key = alike(module).eval(), torch.randn(2, 9, 16)
    assert isinstance(module(X), Tensor)
    torch.testing.assert_close(module(X), theirs(X, X, X)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(X, key), theirs(X, key, key)[0], atol=1e-5, rtol=1e-5)
    out, weights = module(X, key, need_weights=True)
    assert out.shape == X.shape
    wanted = theirs(X, key, key, average_attn_weights=False)[1]
    torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=1e-5)
    assert module.last_device_used is not None


@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_of_every_kind_hide_what_they_say(need_weights: bool) -> None:
    module = PhotonicFlashAttention(16, 4)
    theirs = alike(module)
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    rows = torch.ones(6, 6, dtype=torch.bool).tril()

    def run(mask: Tensor, **options: Any) -> Tensor:
        found = module(X, attention_mask=mask, need_weights=need_weights, **options)
        return found[0] if need_weights else found

    want = theirs(X, X, X, key_padding_mask=padding == 0)[0]
    for mask in (padding, padding.bool(), padding[:, None, None].bool()):
        torch.testing.assert_close(run(mask), want, atol=1e-5, rtol=1e-5)
    want = theirs(X, X, X, attn_mask=~rows)[0]
    added = torch.zeros(6, 6).masked_fill(~rows, float("-inf"))
    for mask in (rows, rows[None, None], added):
        torch.testing.assert_close(run(mask), want, atol=1e-5, rtol=1e-5)
    both = theirs(X, X, X, attn_mask=~rows, key_padding_mask=padding == 0)[0]
    torch.testing.assert_close(run(padding, is_causal=True), both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        ([[1, 1]], "attention_mask is a list: pass"),
        (torch.ones(2, 5, dtype=torch.int64), r"attention_mask \[2, 5\] torch.int64 was given: pass"),
        (torch.ones(6, 6, dtype=torch.int64), r"attention_mask \[6, 6\] torch.int64 was given: pass"),
        (torch.ones(3, 6, 6), r"attention_mask \[3, 6, 6\]"),
    ],
)
def test_a_mask_of_the_wrong_kind_is_one_sentence(mask: Any, sentence: str) -> None:
    with pytest.raises(hal.ContractError, match=sentence):
        PhotonicFlashAttention(16, 4)(X, attention_mask=mask)


def test_a_mask_that_may_be_over_batch_or_rows_is_refused() -> None:
    with pytest.raises(hal.ContractError, match=r"may be over either: pass \[batch, 1, 1, len_k\]"):
        PhotonicFlashAttention(16, 4)(torch.randn(6, 6, 16), attention_mask=torch.ones(6, 6).bool())


BAD: dict[str, tuple[Any, str]] = {
    "heads": (lambda: PhotonicFlashAttention(16, 3), "embed_dim 16 and num_heads 3 were given"),
    "heads of a layer": (lambda: AttentionLayer(16, 5), "embed_dim 16 and num_heads 5 were given"),
    "threshold": (lambda: PhotonicFlashAttention(16, 4, photonic_threshold=-1), "photonic_threshold -1 was given"),
    "an electronic device": (lambda: PhotonicAttention(16, 4, device="cpu:0"), "name a photonic device"),
    "a text of devices": (lambda: HybridFlashAttention(16, 4, devices="cpu"), "pass a list of backends"),
    "no devices": (lambda: HybridFlashAttention(16, 4, devices=[]), r"devices \[\] was given"),
    "rank": (lambda: PhotonicFlashAttention(16, 4)(X[0]), r"query has shape \[6, 16\]: pass \[batch, length, 16\]"),
    "batches": (lambda: PhotonicFlashAttention(16, 4)(X, X[:1]), "all one batch"),
    "level": (lambda: OptimizedLinear(4, 4, optimization_level="fast"), "optimization_level 'fast' was given"),
    "form of GELU": (lambda: FusedGELU("erf"), "approximate 'erf' was given"),
    "setting": (lambda: GlobalConfig().updated(colour=1), "unknown setting 'colour'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what: str) -> None:
    call, sentence = BAD[what]
    with pytest.raises(hal.ContractError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


@needs_photonics
def test_the_same_weights_run_on_a_photonic_device() -> None:
    module = PhotonicFlashAttention(16, 4).eval()
    photonic = PhotonicAttention(16, 4).eval()
    photonic.load_state_dict(module.state_dict())
    with torch.no_grad():
        wanted, found = module(X), photonic(X)
    assert photonic.last_device_used == PHOTONIC[0]
    assert photonic.last_energy_mj is not None
    assert photonic.last_energy_mj > 0
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    assert module.last_energy_mj is None


@needs_photonics
def test_a_threshold_sends_long_sequences_to_a_photonic_device() -> None:
    module = PhotonicFlashAttention(16, 4, photonic_threshold=5).eval()
    with torch.no_grad():
        module(X)
        assert module.last_device_used == PHOTONIC[0]
        module(X[:, :4])
    assert module.last_device_used == "cpu:0"


@needs_photonics
def test_flash_attention_3_is_never_photonic() -> None:
    module = FlashAttention3(16, 4).eval()
    with torch.no_grad(), hal.use(PHOTONIC[0]), pytest.raises(hal.UnsupportedError, match="runs on electronic devices"):
        module(X)
    with pytest.raises(hal.ContractError, match="use PhotonicFlashAttention"):
        FlashAttention3(16, 4, device=PHOTONIC[0])


def test_hybrid_degrades_and_recovers_when_it_decides() -> None:
    module = HybridFlashAttention(16, 4, devices=["kpu", "cpu"])
    if "kpu:0" not in {device.id for device in hal.devices()}:
        pytest.skip("kpu:0 is not here")
    with torch.no_grad():
        module.eval()(X)
        narrow = copy.deepcopy(module).double()
        narrow(X.double())  # kpu:0 has no float64
        assert narrow.last_device_used == "cpu:0"
        assert (narrow.degraded, narrow.recovered) == (1, 0)
        narrow.float()(X)
    assert dict(narrow.device_counts) == {"kpu:0": 2, "cpu:0": 1}
    assert (narrow.degraded, narrow.recovered) == (1, 1)
    assert dict(module.device_counts) == {"kpu:0": 1}


def test_hybrid_passes_over_devices_that_are_not_here() -> None:
    module = HybridFlashAttention(16, 4, devices=["nothing:0", "cpu:0"])
    module(X)
    assert (module.last_device_used, module.degraded) == ("cpu:0", 1)
    with pytest.raises(hal.DeviceUnavailableError, match="none is here: name one of"):
        HybridFlashAttention(16, 4, devices=["nothing:0", "nowhere"])(X)


@pytest.mark.parametrize("level", ["conservative", "balanced", "aggressive"])
def test_the_linear_layer_is_torch_s(level: str) -> None:
    theirs, mine = nn.Linear(16, 8), OptimizedLinear(16, 8, optimization_level=level)
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(X.transpose(0, 1)), theirs(X.transpose(0, 1)))
    with torch.no_grad():
        found, wanted = mine(X), theirs(X)
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) <= (2**-7 if level == "aggressive" else 1e-6)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_torch_s(form: str) -> None:
    torch.testing.assert_close(FusedGELU(form)(X), nn.functional.gelu(X, approximate=form))


def test_the_global_configuration_is_hal_configure_s() -> None:
    try:
        applied = GlobalConfig(device="cpu:0", memory_limit=1 << 40).apply()
        assert GlobalConfig.current() is applied
        assert hal.explain(X[None], X[None], X[None]).policy.names == ("cpu:0",)
        with pytest.raises(hal.UnknownBackendError):
            applied.updated(device="nothing").apply()
        assert GlobalConfig.current() is applied
    finally:
        GlobalConfig.reset()
    assert GlobalConfig.current() == GlobalConfig()

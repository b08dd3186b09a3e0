"""Every call of a model's linear layers reaches the device that they were put on."""

from __future__ import annotations

import torch
from hal_compare.lanes import LinearOnDevice, linear_names, put_linear_layers
from torch import nn


def linear_layers(network: nn.Module) -> list[LinearOnDevice]:
    return [module for module in network.modules() if isinstance(module, LinearOnDevice)]


def test_a_layer_of_several_names_runs_on_the_device_under_each(device):
    device("fake", linear_error=1e-3)
    layer = nn.Linear(8, 8)
    network = nn.ModuleDict({"first": layer, "second": nn.Sequential(layer)})
    put_linear_layers(network, "fake:0")
    network["second"](torch.randn(2, 8))
    network["first"](torch.randn(2, 8))
    assert network["second"][0] is network["first"]
    assert [found.macs for found in linear_layers(network)] == [2 * 2 * 8 * 8]


def test_torchs_fast_path_of_encoders_does_not_pass_the_device_by(device):
    device("fake", linear_error=1e-2)
    network = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        exact = network(x)
        put_linear_layers(network, "fake:0", frozenset(n for n in linear_names(network) if "attn" in n))
        found = network(x)
    assert [layer.macs for layer in linear_layers(network)] == [10 * 16 * 32, 10 * 32 * 16]
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 1e-1

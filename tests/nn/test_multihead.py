"""PhotonicMultiHeadAttention is nn.MultiheadAttention: results, weights, gradients, errors, state, on any device."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hal_nn import PhotonicMultiHeadAttention
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import hal_core as hal

EMBED, HEADS, BATCH, LEN_Q, LEN_K = 16, 4, 3, 5, 6
MASKS = (None, "boolean", "float", "per head", "causal")
PADDING = (None, "boolean", "float")
#: batch_first, add_bias_kv, add_zero_attn, kdim, bias, attn_mask, key_padding_mask, weights, cross, batched
GRID = list(
    itertools.product(
        (False, True),
        (False, True),
        (False, True),
        (None, 12),
        (False, True),
        MASKS,
        PADDING,
        (None, "mean", "heads"),
        (False, True),
        (True, False),
    )
)
CASES = GRID[::17]  # every value of each argument, and most pairs


def test_the_grid_is_large() -> None:
    assert len(CASES) >= 300
    assert all(len({case[place] for case in CASES}) == len({case[place] for case in GRID}) for place in range(10))


def pair(**keywords: Any) -> tuple[nn.MultiheadAttention, PhotonicMultiHeadAttention]:
    theirs, mine = nn.MultiheadAttention(EMBED, HEADS, **keywords), PhotonicMultiHeadAttention(EMBED, HEADS, **keywords)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def outcome(module: nn.Module, tensors: list[Tensor], arguments: dict[str, Any]) -> Any:
    """(result, weights, gradients of inputs and parameters), or the error."""
    leaves = {id(t): t.clone().requires_grad_() for t in tensors}
    module.zero_grad()
    try:
        out, weights = module(*(leaves[id(t)] for t in tensors), **arguments)
    except (AssertionError, RuntimeError) as error:
        return type(error), str(error)
    loss = (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    loss.backward()
    return [out, weights, *(t.grad for t in leaves.values()), *(p.grad for p in module.parameters())]


def assert_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert found == wanted
        return
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_results_weights_gradients_and_errors_are_torch_s(case: Any) -> None:
    first, bias_kv, zero, kdim, bias, mask, padding, weights, cross, batched = case
    generator = torch.Generator().manual_seed(GRID.index(case))
    theirs, mine = pair(batch_first=first, add_bias_kv=bias_kv, add_zero_attn=zero, kdim=kdim, vdim=kdim, bias=bias)

    def draw(length: int, size: int) -> Tensor:
        shape = (BATCH, length, size) if first else (length, BATCH, size)
        return torch.randn(shape if batched else (length, size), generator=generator)

    query = draw(LEN_Q, EMBED)
    key = draw(LEN_K, kdim or EMBED) if cross or kdim else query
    len_k, batch = LEN_K if cross or kdim else LEN_Q, BATCH if batched else 1
    masks = {
        "boolean": torch.rand(LEN_Q, len_k, generator=generator) > 0.7,
        "float": torch.randn(LEN_Q, len_k, generator=generator),
        "per head": torch.rand(batch * HEADS, LEN_Q, len_k, generator=generator) > 0.7,
        "causal": torch.ones(LEN_Q, len_k, dtype=torch.bool).triu(1),
    }
    hidden = torch.zeros(batch, len_k, dtype=torch.bool)
    hidden[-1, 3:] = True
    paddings = {"boolean": hidden, "float": torch.randn(batch, len_k, generator=generator)}
    for drawn in masks.values():
        drawn[..., 0] = 0  # every row reads a key: torch gives NaN where it reads none
    chosen = paddings.get(padding)
    arguments = {
        "attn_mask": masks.get(mask),
        "key_padding_mask": chosen if chosen is None or batched else chosen[0],
        "need_weights": weights is not None,
        "average_attn_weights": weights == "mean",
        "is_causal": mask == "causal",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of masks of two kinds
        wanted, found = (outcome(module, [query, key, key], arguments) for module in (theirs, mine))
        assert_equal(found, wanted)
        if isinstance(wanted, list):
            with torch.no_grad():
                fused, ours = (module.eval()(query, key, key, **arguments)[0] for module in (theirs, mine))
            torch.testing.assert_close(ours, fused, atol=1e-5, rtol=1e-5)


X = torch.ones(LEN_Q, BATCH, EMBED)
BAD: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "rank 4": ((X[None],) * 3, {}),
    "key of rank 2": ((X, X[0], X), {}),
    "a mask of rank 1": ((X, X, X), {"attn_mask": torch.zeros(LEN_Q)}),
    "a mask of another size": ((X, X, X), {"attn_mask": torch.zeros(LEN_Q, LEN_Q + 1)}),
    "a mask for too few heads": ((X, X, X), {"attn_mask": torch.zeros(BATCH, LEN_Q, LEN_Q)}),
    "an integer mask": ((X, X, X), {"attn_mask": torch.zeros(LEN_Q, LEN_Q, dtype=torch.int64)}),
    "integer padding": ((X, X, X), {"key_padding_mask": torch.zeros(BATCH, LEN_Q, dtype=torch.int64)}),
    "padding of another batch": ((X, X, X), {"key_padding_mask": torch.zeros(BATCH + 1, LEN_Q).bool()}),
    "padding of another length": ((X, X, X), {"key_padding_mask": torch.zeros(BATCH, LEN_Q + 1).bool()}),
    "padding of rank 3": ((X, X, X), {"key_padding_mask": torch.zeros(BATCH, LEN_Q, 1).bool()}),
    "causal without a mask": ((X, X, X), {"is_causal": True}),
    "another width": ((X[..., :8],) * 3, {}),
    "key and value that differ": ((X, X, X[:2]), {}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_give_torch_s_error(what: str) -> None:
    tensors, arguments = BAD[what]
    theirs, mine = pair()
    with pytest.raises((AssertionError, RuntimeError)) as wanted:
        theirs(*tensors, **arguments)
    with pytest.raises(type(wanted.value)) as found:
        mine(*tensors, **arguments)
    assert str(found.value) == str(wanted.value)


def test_a_bias_of_another_dtype_is_promoted_as_in_torch() -> None:
    theirs, mine = pair(batch_first=True)
    x = torch.randn(2, LEN_Q, EMBED)
    for module in (theirs, mine):
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.half())
    torch.testing.assert_close(mine.eval()(x, x, x)[0], theirs.eval()(x, x, x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [(0, 4), (16, 0), (16, 3)])
def test_bad_sizes_give_torch_s_error(given: tuple[int, int]) -> None:
    with pytest.raises((ValueError, AssertionError)) as wanted:
        nn.MultiheadAttention(*given)
    with pytest.raises(type(wanted.value), match=str(wanted.value)[:20]):
        PhotonicMultiHeadAttention(*given)


@pytest.mark.parametrize("keywords", [{}, {"bias": False}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True}])
def test_state_dict_keys_are_the_same_both_ways(keywords: dict[str, Any]) -> None:
    theirs, mine = pair(**keywords)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(mine)))
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), mine.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu:0", "vulkan:0", "opencl:0", "kpu:0", "photonic:0"])
def test_one_set_of_weights_runs_on_every_device(device: str) -> None:
    if device not in {found.id for found in hal.devices()}:
        pytest.skip(f"{device} is not here")
    theirs, mine = pair(batch_first=True)
    x = torch.randn(2, LEN_Q, EMBED)
    assert mine.last_device_used is None
    with torch.no_grad(), hal.use(device):
        found, weights = mine(x, x, x)
    wanted, wanted_weights = theirs(x, x, x)
    tolerance = hal.capabilities(device).numerics["float32"].relative
    assert float((found - wanted).norm() / wanted.norm()) <= max(tolerance * 2, 1e-5)
    torch.testing.assert_close(weights, wanted_weights, atol=1e-5, rtol=1e-5)
    assert mine.last_device_used == device
    assert mine.last_decision is not None
    assert (mine.last_energy_mj is None) == (device in ("cpu:0", "vulkan:0", "opencl:0"))
    assert mine.last_latency_ms is not None
    assert mine.last_latency_ms > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", ["pruned", "parametrized"])
@pytest.mark.parametrize("cross", [False, True])
def test_weights_that_are_computed_are_used(what: str, cross: bool, bias: bool) -> None:
    modules = pair(batch_first=True, bias=bias)
    x = torch.randn(BATCH, LEN_Q, EMBED)
    other = torch.randn(BATCH, LEN_K, EMBED) if cross else x
    for module in modules:
        if what == "pruned":
            prune.l1_unstructured(module, "in_proj_weight", 0.5)
            prune.l1_unstructured(module.out_proj, "weight", 0.5)
        else:
            parametrize.register_parametrization(module, "in_proj_weight", nn.Tanh())
            parametrize.register_parametrization(module.out_proj, "weight", nn.Tanh())
            if bias:
                parametrize.register_parametrization(module, "in_proj_bias", nn.Tanh())
                parametrize.register_parametrization(module.out_proj, "bias", nn.Tanh())
    expected, found = (module(x, other, other) for module in modules)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_device_that_was_set_holds() -> None:
    import hal_nn

    _, mine = pair()
    with pytest.raises(hal.UnknownBackendError):
        hal_nn.set_device(mine, "nothing:0")
    hal_nn.set_device(mine, "cpu:0")
    with hal.use("photonic:0"):
        mine(X, X, X)
    assert mine.last_device_used == "cpu:0"


def test_weights_under_dropout_are_those_that_the_result_was_made_of() -> None:
    _, mine = pair(dropout=0.5, batch_first=True)
    x = torch.randn(2, LEN_Q, EMBED)
    out, weights = mine(x, x, x, average_attn_weights=False)
    assert bool((weights == 0).any())
    value = mine._projected(x, x, x)[2].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    wanted = nn.functional.linear(
        (weights @ value).transpose(1, 2).flatten(-2), mine.out_proj.weight, mine.out_proj.bias
    )
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_a_row_without_a_key_gives_the_projection_of_nothing() -> None:
    _, mine = pair(batch_first=True)
    x, hidden = torch.randn(2, LEN_Q, EMBED), torch.zeros(2, LEN_Q, dtype=torch.bool)
    hidden[1] = True
    for need_weights in (False, True):
        out, weights = mine(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        torch.testing.assert_close(out[1], mine.out_proj.bias.expand(LEN_Q, -1))
        assert weights is None or not bool(weights[1].any())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_runs_it(training: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True)
    mine = copy.deepcopy(layer)
    mine.self_attn = PhotonicMultiHeadAttention(EMBED, HEADS, batch_first=True)
    mine.self_attn.load_state_dict(layer.self_attn.state_dict())
    x, hidden = torch.randn(2, LEN_Q, EMBED), torch.zeros(2, LEN_Q, dtype=torch.bool)
    hidden[1, 3:] = True
    options = {"src_key_padding_mask": hidden} if padded else {}
    with torch.set_grad_enabled(training), hal.use("cpu:0"):
        wanted, found = (one.train(training)(x, **options) for one in (layer, mine))
        stack, ours = (nn.TransformerEncoder(one, 2).train(training) for one in (layer, mine))
        both = [one(x, **options) for one in (stack, ours)]
    kept = ~hidden if padded else torch.ones_like(hidden)
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1][kept], both[0][kept], atol=1e-5, rtol=1e-5)
    assert mine.self_attn.last_device_used == "cpu:0"
    assert all(one.self_attn.last_device_used == "cpu:0" for one in ours.layers)


@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}, {"need_weights": False}])
def test_nested_tensors_give_what_torch_s_fast_path_gives(options: dict[str, bool]) -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    mine = PhotonicMultiHeadAttention(8, 2, batch_first=True).eval()
    mine.load_state_dict(theirs.state_dict())
    x = torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(2, 8)])
    with torch.no_grad():
        wanted, found = theirs(x, x, x, **options), mine(x, x, x, **options)
    assert (wanted[1] is None) == (found[1] is None)
    for one, other in zip(wanted, found, strict=True):
        if one is not None:
            one, other = (t.to_padded_tensor(0.0) if t.is_nested else t for t in (one, other))
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        mine(x, x, x, attn_mask=torch.zeros(4, 4))


def test_an_encoder_built_before_it_was_put_in_runs_it_on_nested_tensors() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True), 2).eval()
    x, hidden = torch.randn(2, LEN_Q, EMBED), torch.zeros(2, LEN_Q, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=hidden)
        for layer in encoder.layers:
            mine = PhotonicMultiHeadAttention(EMBED, HEADS, batch_first=True)
            mine.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = mine.eval()
        found = encoder(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found[~hidden], wanted[~hidden], atol=1e-5, rtol=1e-5)
    assert mine.last_device_used is not None


def test_it_compiles_and_is_traced() -> None:
    _, mine = pair(batch_first=True)
    x = torch.randn(2, LEN_Q, EMBED)
    wanted = mine(x, x, x, need_weights=False)[0]
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], wanted, atol=1e-5, rtol=1e-5)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = mine

        def forward(self, t: Tensor) -> Tensor:
            return self.attention(t, t, t, need_weights=False)[0]  # type: ignore[no-any-return]

    traced = torch.jit.trace(Layer(), (x,))
    longer = torch.randn(3, LEN_Q + 4, EMBED)
    torch.testing.assert_close(
        traced(longer), mine(longer, longer, longer, need_weights=False)[0], atol=1e-5, rtol=1e-5
    )


def test_eight_threads_give_what_one_gives() -> None:
    _, mine = pair(batch_first=True)
    inputs = [torch.randn(1 + i % 3, 2 + i % 7, EMBED) for i in range(100)]
    with torch.no_grad():
        wanted = [mine(x, x, x)[0] for x in inputs]

        def run(_: int) -> bool:
            with torch.no_grad():
                return all(torch.equal(mine(x, x, x)[0], want) for x, want in zip(inputs, wanted, strict=True))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(8)))


@pytest.mark.parametrize("shapes", [((0, 4, 8), (0, 4, 8)), ((2, 0, 8), (2, 5, 8))])
def test_nothing_gives_nothing_and_its_weights(shapes):
    query, key = (torch.randn(shape) for shape in shapes)
    ours, theirs = PhotonicMultiHeadAttention(8, 2, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
    got, want = ours(query, key, key), theirs(query, key, key)
    assert [t.shape for t in got] == [t.shape for t in want]

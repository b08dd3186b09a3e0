"""The kernels beside attention on a GPU: fresh inputs against float64, and how calls live with streams and memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hal_core import DeviceUnavailableError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
FUNCTIONS = [
    "vector_add",
    "reduce_sum",
    "reduce_max",
    "fused_gelu_linear",
    "rope_precompute_freqs",
    "rope_forward",
    "paged_kv_cache_append",
    "paged_kv_cache_read",
    "PagedKVCache",
    "flash_attention_forward",
]
TWINS = [f"triton_{name}" for name in FUNCTIONS[1:]]


@pytest.fixture
def kernels(gpu: str, request: pytest.FixtureRequest) -> Any:
    """`hal_cuda.kernels`, where what a test names can run."""
    import hal_cuda.kernels

    name = getattr(request, "param", "")
    if not name.startswith("triton_"):
        try:
            from hal_cuda.kernels.cupy.module import cupy

            cupy()
        except DeviceUnavailableError as absent:
            pytest.skip(str(absent))
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return hal_cuda.kernels


@pytest.mark.parametrize(
    ("kernels", "name"), [(name, name) for name in FUNCTIONS + TWINS], indirect=["kernels"], ids=FUNCTIONS + TWINS
)
def test_every_case_of_a_kernel_agrees_with_float64(kernels: Any, name: str, seed: int) -> None:
    from cuda_extra import cases, worst_error

    torch.manual_seed(seed)
    found = [each for each in cases() if each[0].startswith(name)]
    assert found
    with torch.no_grad():
        errors = {about: (worst_error(call(), meant()), bound) for about, call, meant, bound in found}
    wrong = {about: pair for about, pair in errors.items() if not pair[0] <= pair[1]}
    assert wrong == {}


def test_device_info_is_the_drivers(gpu: str, kernels: Any) -> None:
    info = kernels.device_info(0)
    assert info["name"] == torch.cuda.get_device_name(0)
    assert info["compute_capability"] == torch.cuda.get_device_capability(0)
    assert info["total_memory"] == torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(ValueError, match="use 0 to"):
        kernels.device_info(torch.cuda.device_count())


@pytest.mark.parametrize("language", ["", "triton_"])
def test_a_kernel_runs_on_the_current_stream(kernels: Any, language: str) -> None:
    """On another stream a kernel waits for what was queued there, and not for the default stream."""
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    call = getattr(kernels, f"{language}reduce_sum")
    call(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        got = call(x)
    stream.synchronize()
    assert float(got) == 1 << 20


@pytest.mark.parametrize("language", ["", "triton_"])
def test_a_kernel_can_be_captured_in_a_graph(kernels: Any, language: str) -> None:
    q, k = torch.randn(1, 4, 64, 64, device="cuda"), torch.randn(1, 2, 64, 64, device="cuda")
    call = getattr(kernels, f"{language}rope_forward_fused")
    call(q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(q, k)
    q.normal_()
    graph.replay()
    assert torch.equal(got[0], call(q, k)[0])


@pytest.mark.parametrize("language", ["", "triton_"])
def test_offsets_beyond_32_bits_are_read_and_written(kernels: Any, language: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("30 GiB of free memory are needed")
    rows, length = 3, (1 << 30) + 8
    x = torch.zeros(rows, length, device="cuda", dtype=torch.float16)
    x[2, -5:] = 1.0
    assert getattr(kernels, f"{language}reduce_sum")(x).tolist() == [0.0, 0.0, 5.0]
    assert float(getattr(kernels, f"{language}reduce_sum")(x, 0)[-1]) == 1.0
    assert float(getattr(kernels, f"{language}reduce_max")(x)) == 1.0
    del x
    pool = torch.zeros(1 << 19, 2, 2, 16, 128, device="cuda", dtype=torch.float16)  # 2^32 elements
    keys = torch.randn(2, 2, 128, device="cuda", dtype=torch.float16)
    slots = torch.tensor([(1 << 23) - 1, 5], dtype=torch.int32, device="cuda")
    getattr(kernels, f"{language}paged_kv_cache_append")(pool, slots, keys, keys)
    table = torch.tensor([[(1 << 19) - 1, 0]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([32], dtype=torch.int32, device="cuda")
    got = getattr(kernels, f"{language}paged_kv_cache_read")(pool, table, lengths, 32)
    for found in got:
        assert torch.equal(found[0, :, [15, 21]].transpose(0, 1), keys)


@pytest.mark.parametrize("language", ["", "triton_"])
def test_a_sum_has_the_same_bits_every_time(kernels: Any, language: str) -> None:
    x = torch.randn(1 << 24, device="cuda")
    call = getattr(kernels, f"{language}reduce_sum")
    first = call(x)
    assert all(torch.equal(call(x), first) for _ in range(20))


def test_another_device_than_the_current_one(kernels: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    x, w = torch.randn(300, 128, device="cuda:1").half(), torch.randn(256, 128, device="cuda:1").half()
    assert torch.cuda.current_device() == 0
    for language in ("", "triton_"):
        assert torch.allclose(getattr(kernels, f"{language}reduce_sum")(x), x.sum(-1), atol=0.1)
        got = getattr(kernels, f"{language}fused_gelu_linear")(x, w)
        assert torch.allclose(got, torch.nn.functional.gelu(x @ w.T), atol=0.1)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt2_gives_the_same_patched(kernels: Any, backend: str, dtype: torch.dtype, seed: int) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=256, n_positions=200, vocab_size=500)
    model = transformers.GPT2LMHeadModel(config).eval().to("cuda", dtype)
    tokens = torch.randint(0, 500, (3, 150), device="cuda")
    with torch.no_grad():
        want = model(tokens).logits.float()
        kernels.patch_gpt2_model(model, backend)
        got = model(tokens).logits.float()
        assert model.config._attn_implementation == "hal_cuda"
        made = model.generate(tokens[:, :20], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (3, 25)
    assert float((got - want).norm() / want.norm()) <= (1e-4 if dtype == torch.float32 else 2e-2)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradient = model.transformer.h[1].mlp.c_fc.weight.grad.clone()
    model.zero_grad()
    kernels.unpatch_gpt2_model(model)
    model(tokens, labels=tokens).loss.backward()
    assert float((gradient - model.transformer.h[1].mlp.c_fc.weight.grad).norm() / gradient.norm()) <= 5e-2


def test_the_example_of_the_readme_runs(gpu: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    readme = Path(__file__).resolve().parents[2] / "plugins" / "cuda" / "README.md"
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    (example,) = (block.partition("```")[0] for block in blocks if "import kernels" in block)
    found: dict[str, Any] = {}
    exec(example, found)
    assert found["y"].shape == (300, 512)
    assert torch.equal(found["keys"][0], found["k"][0])

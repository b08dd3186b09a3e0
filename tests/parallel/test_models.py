"""Hugging Face models whose sequence is cut over ranks: loss, gradients and generated tokens of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("parallel")
HERE = str(Path(__file__))


def build(kind: str = "llama", **more: Any) -> Any:
    import hal_nn
    import transformers

    hal_nn.register_huggingface()
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    names = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}
    config = getattr(transformers, f"{names[kind]}Config")(**sizes | more, attn_implementation="hal")
    torch.manual_seed(5)
    return getattr(transformers, f"{names[kind]}ForCausalLM")(copy.deepcopy(config)).eval()


def tokens(batch: int = 2, length: int = 22) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(9))


def loss_and_gradients(mesh: Any, rank: int, world: int, kind: str, layout: str, given: dict[str, Any]) -> list[float]:
    """Errors of the loss and of each gradient, averaged over the ranks, against one process."""
    import hal_parallel

    more = given.pop("config", {})
    model = build(kind, **more)
    batch = {"input_ids": tokens(), "labels": tokens()} | {n: torch.tensor(v) for n, v in given.items()}
    want = model(**batch, use_cache=False).loss
    want.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with hal_parallel.context(mesh, layout=layout):
        got = model(**batch).loss
        got.backward()
    errors = [float((got - want).abs())]
    for parameter, right in zip(model.parameters(), wanted, strict=True):
        torch.distributed.all_reduce(parameter.grad, group=mesh)
        errors.append(float((parameter.grad / world - right).norm() / max(float(right.norm()), 1e-2)))
    assert float((model(**batch, use_cache=False).loss - want).abs()) == 0  # as before outside the context
    return errors


def generated(mesh: Any, rank: int, world: int, kind: str, batch: int, options: dict[str, Any]) -> list[Any]:
    import hal_parallel

    model, prompt = build(kind, **options.pop("config", {})), tokens(batch, 13)
    mask = torch.ones_like(prompt)
    if batch > 1:
        mask[0, :4] = 0  # padded on the left
    options = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0, "attention_mask": mask} | options
    want = model.generate(prompt, **options)
    with hal_parallel.context(mesh):
        got = model.generate(prompt, **options, return_dict_in_generate=True)
    cache = got.past_key_values
    return [got.sequences.tolist(), want.tolist(), None if cache is None else cache.layers[0].keys.shape[2]]


PACKED = [[*range(9), *range(5), *range(8)]]
MASK = [[1] * 22, [1] * 15 + [0] * 7]


@pytest.mark.parametrize(
    ("kind", "layout", "given"),
    [
        ("llama", "zigzag", {}),
        ("llama", "striped", {"attention_mask": MASK}),
        (
            "llama",
            "contiguous",
            {"input_ids": tokens(1).tolist(), "labels": tokens(1).tolist(), "position_ids": PACKED},
        ),
        ("mistral", "zigzag", {"config": {"sliding_window": 6}}),
        ("gemma2", "zigzag", {"config": {"sliding_window": 6, "head_dim": 8}}),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(ranks, kind, layout, given):
    for errors in ranks.run("called", 4, code=f"{HERE}:loss_and_gradients", kind=kind, layout=layout, given=given):
        assert max(errors) < 2e-5


@pytest.mark.parametrize(
    ("kind", "batch", "options"),
    [("llama", 1, {}), ("llama", 2, {}), ("mistral", 1, {"config": {"sliding_window": 6}})],
)
def test_generate_gives_the_tokens_of_one_process(ranks, kind, batch, options):
    for got, want, held in ranks.run("called", 4, code=f"{HERE}:generated", kind=kind, batch=batch, options=options):
        assert got == want
        assert held == 4 + 3, "a rank holds its quarter of the prompt and of the new tokens"  # 13 and 10, rounded up

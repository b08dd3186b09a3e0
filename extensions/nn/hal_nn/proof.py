"""Whether a model gives the same before and after a change, on a sample input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hal_core as hal
from hal_core import HalError

from .deferred import Scores

#: Largest relative error that rounding explains, by the dtype of an output.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def run(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The floating-point outputs of a model on a sample, in eval mode, without gradients, by name.

    Args:
        sample: a tensor, a sequence of positional arguments, or a mapping of named ones. Copies are passed.
    """
    given = _copied(sample)
    args = tuple(given) if isinstance(given, Sequence) else () if isinstance(given, Mapping) else (given,)
    with _eval(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(*args, **given) if isinstance(given, Mapping) else model(*args)
    return tensors(output)


def _copied(sample: Any) -> Any:
    if isinstance(sample, Tensor):
        return sample.detach().clone()
    if isinstance(sample, Mapping):
        return {name: _copied(one) for name, one in sample.items()}
    return type(sample)(_copied(one) for one in sample) if type(sample) in (tuple, list) else sample


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def tensors(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors of an output, in tuples, lists and mappings too.

    Caches are left out, and attention weights that a model of transformers returns, which hal never holds.
    """
    if isinstance(output, Tensor):
        return {"output": output} if output.is_floating_point() else {}
    pairs: Any = enumerate(output) if isinstance(output, tuple | list) else ()
    pairs = output.items() if hasattr(output, "items") else pairs
    found: dict[str, Tensor] = {}
    for name, value in pairs:
        if str(name).endswith("attentions"):
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            found[str(name)] = value
        elif "past" not in str(name) and not isinstance(value, Tensor):
            found |= {f"{name}.{inner}": one for inner, one in tensors(value).items()}
    return found


def difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], mask: Tensor | None = None) -> float:
    """The largest ||got - want|| / ||want|| over the outputs.

    Attention weights that a converted layer returns are left out, and so are positions that a padding mask [batch,
    length] hides, of outputs that have them. Infinite where the outputs are others, values are finite in one and not in
    the other, or none is finite.
    """
    if got.keys() != want.keys() or not any(bool(theirs.isfinite().any()) for theirs in want.values()):
        return float("inf")
    largest = 0.0
    for name, theirs in want.items():
        ours = got[name]
        if isinstance(ours, Scores):  # weights, which hal never holds
            continue
        if ours.shape != theirs.shape:
            return float("inf")
        if mask is not None and theirs.ndim >= 2 and theirs.shape[:2] == mask.shape:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        finite = theirs.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return float("inf")
        ours, theirs = ours[finite].double(), theirs[finite].double()
        if float(theirs.norm()) > 0:
            largest = max(largest, float((ours - theirs).norm() / theirs.norm()))
    return largest


def allowed(outputs: Mapping[str, Tensor], devices: Sequence[str]) -> float:
    """The largest error that rounding and the devices explain: of a device, four times what it declares for a call."""
    dtypes = {value.dtype for value in outputs.values()}
    largest = max((ROUNDING.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)
    for device in devices:
        numerics = hal.capabilities(device).numerics
        declared = [numerics[name].relative for dtype in dtypes if (name := str(dtype)[6:]) in numerics]
        largest = max([largest, *(4 * relative for relative in declared)])
    return largest


def padding_mask(sample: Any) -> Tensor | None:
    """The padding mask of a sample of transformers' models; None where it has none."""
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def default_sample(model: nn.Module) -> dict[str, Tensor] | None:
    """Token ids for a model of transformers that takes them; None for any other model."""
    config, parameter = getattr(model, "config", None), next(model.parameters(), None)
    if getattr(model, "main_input_name", None) != "input_ids" or parameter is None or config is None:
        return None
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 4:
        return None
    length = min(12, getattr(text, "max_position_embeddings", None) or 12)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(vocabulary - 1, 4), (2, length), generator=generator).to(parameter.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})


def checked_sample(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The outputs before a change.

    Raises:
        HalError: the model does not run on the sample, or gives no floating-point tensor.
    """
    try:
        before = run(model, sample)
    except HalError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise HalError(
            f"{type(model).__name__} does not run on the sample ({type(error).__name__}: {what}): pass a tensor, a "
            "sequence of arguments, or a dict of named arguments that its forward takes"
        ) from error
    if not before:
        raise HalError(
            f"{type(model).__name__} gives no floating-point tensor on the sample: pass one on which it does"
        )
    return before

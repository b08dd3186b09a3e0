"""What rounding a block of rows costs: entropy of its weights, and Fisher information on calibration data.

For a row i, an input x and the gradient g_i of a log-likelihood with respect to the row's output, rounding the row by
d_i changes that log-likelihood by g_i (x . d_i) to first order, and the expected loss by half the expected square of it
to second order: the Fisher information along the rounding error. Labels are drawn from the model's own distribution
(not taken from the data), which makes it the Fisher information and not the empirical one.

Source: Martens 2020 (New insights on the natural gradient), sections 5 and 9.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hal_core import ContractError

from .config import AllocationStrategy, PrecisionConfig
from .formats import PrecisionFormat, pack, unpack

Readout = Callable[[Any], Tensor]
#: Rounding errors of all formats are kept between batches up to this many bytes; beyond it they are made anew.
_CACHE_BYTES = 1 << 30
_BINS = 256
_LEARNED_BITS = 4
#: Batches that the factors of LEARNED are measured on.
_LEARNED_BATCHES = 2


class Layer(NamedTuple):
    """A layer that can be packed. kept: the format that its weight has now."""

    name: str
    module: nn.Linear
    kept: PrecisionFormat

    @property
    def rows(self) -> int:
        return self.module.out_features

    @property
    def columns(self) -> int:
        return self.module.in_features


class Measured(NamedTuple):
    """Sums over calibration data for one layer, by row [rows, formats] or [rows].

    first: |g (x . d)|. second: (g (x . d))^2. gradient: g^2. Of the layer: activation, the mean square of its inputs;
    largest, the largest absolute input; moment, the second moment of its inputs [columns, columns], each weighted by
    the squared gradient of its outputs, or None where rounding is not compensated.
    """

    first: Tensor
    second: Tensor
    gradient: Tensor
    activation: float
    largest: float
    moment: Tensor | None = None


class Calibration(NamedTuple):
    """layers: by name. positions: output positions that were read."""

    layers: dict[str, Measured]
    positions: int


_KEPT = {
    torch.float32: PrecisionFormat.FP32,
    torch.float16: PrecisionFormat.FP16,
    torch.bfloat16: PrecisionFormat.BF16,
}


def packable(model: nn.Module, config: PrecisionConfig) -> tuple[list[Layer], dict[str, str]]:
    """Layers that can be packed, in the model's order, and why others are left, by name.

    Raises:
        ContractError: no layer can be packed, or sizes do not divide by the group.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found, left, ragged = [], {}, []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        shared = [other for other in owners.get(id(module.weight), []) if other != f"{name}.weight"]
        if type(module) is not nn.Linear:
            left[name] = f"is a {type(module).__name__}, whose forward may read its weight in another way"
        elif any(part in name for part in config.skip):
            left[name] = "is named by skip"
        elif shared:
            left[name] = f"shares its weight with {', '.join(shared)}"
        elif module.weight.dtype not in _KEPT:
            left[name] = (
                f"is {str(module.weight.dtype).removeprefix('torch.')}; float32, float16 and bfloat16 are packed"
            )
        elif module.in_features % config.group_size:
            ragged.append(f"{name} ({module.in_features})")
        else:
            found.append(Layer(name, module, _KEPT[module.weight.dtype]))
    if ragged:
        raise ContractError(
            f"Input sizes that do not divide by group_size {config.group_size}: {', '.join(ragged)}. Choose a "
            f"group_size that divides them, or name the layers in skip. Nothing was changed."
        )
    if not found:
        reasons = "; ".join(f"{name} {why}" for name, why in left.items()) or "it has no linear layers"
        raise ContractError(f"The model has no layer to pack: {reasons}.")
    return found, left


def batches_of(calibration: Any) -> list[Any]:
    """Calibration data as a list of batches: of tensors, tuples or dicts, or one of these.

    Raises:
        ContractError: fewer than two samples in all, or values that are not finite, with their place.
    """
    if (
        isinstance(calibration, Tensor | dict)
        or hasattr(calibration, "keys")
        or (isinstance(calibration, tuple) and all(isinstance(each, Tensor) for each in calibration))
    ):
        calibration = [calibration]
    elif not isinstance(calibration, Iterable):
        raise ContractError(
            f"Calibration data is a batch, or an iterable of batches, each a tensor, a tuple or a dict of tensors; got "
            f"{type(calibration).__name__}."
        )
    batches, samples = list(calibration), 0
    for place, batch in enumerate(batches):
        tensors = _tensors(batch)
        if not tensors:
            raise ContractError(f"Batch {place} of the calibration data holds no tensor.")
        samples += next(iter(tensors.values())).shape[0]
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                where = (~tensor.isfinite()).nonzero()
                raise ContractError(
                    f"Batch {place}{name and f' ({name})'} of the calibration data has {len(where)} values that are "
                    f"not finite, the first at {where[0].tolist()}. Remove or replace them."
                )
    if samples < 2:
        raise ContractError(
            f"The calibration data has {samples} sample: sensitivity is a mean over samples. Give at least two, "
            "better 32 or more."
        )
    return batches


def _tensors(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"": batch}
    named = dict(batch) if hasattr(batch, "keys") else {f"argument {n}": each for n, each in enumerate(batch)}
    return {name: each for name, each in named.items() if isinstance(each, Tensor) and each.ndim}


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if hasattr(batch, "keys") else model(*batch)


def read_output(output: Any) -> tuple[Tensor, bool]:
    """(what a model's output is judged by [..., features], whether it is logits)."""
    if isinstance(output, Tensor):
        return output, False
    if (logits := getattr(output, "logits", None)) is not None and logits.shape[-1] > 1:
        return logits, True
    found = getattr(output, "last_hidden_state", None)
    found = output[0] if found is None else found
    if not isinstance(found, Tensor):
        raise ContractError(
            f"A {type(output).__name__} has neither logits nor last_hidden_state: give readout=, a function from the "
            "output to a tensor."
        )
    return found, False


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters; both as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    formats: Sequence[PrecisionFormat],
    batches: Sequence[Any],
    config: PrecisionConfig,
    readout: Readout | None = None,
) -> Calibration:
    """Run calibration data forward and backward, and sum what rounding each row to each format would do.

    Once, and where rounding is compensated once before, for the moments that it needs.

    Raises:
        ContractError: gradients that are not finite, with the layers; or layers that no batch reached.
    """
    moments: dict[str, Tensor] = {}
    if config.compensate and any(form.is_integer for form in formats):
        first = {layer.name: _Moment(layer) for layer in layers}
        _passes(model, layers, first, batches, config, readout)
        moments = {name: each.moment for name, each in first.items()}
    errors = _RoundingErrors(layers, formats, config.group_size, moments)
    sums = {layer.name: _Sums(layer, errors) for layer in layers}
    positions = _passes(model, layers, sums, batches, config, readout)
    unreached = [name for name, each in sums.items() if not each.inputs]
    if unreached:
        raise ContractError(
            f"No calibration batch reached {', '.join(unreached)}: use data that does, or name them in skip."
        )
    broken = [name for name, each in sums.items() if not bool(each.second.isfinite().all())]
    if broken:
        raise ContractError(f"Gradients or activations that are not finite in {', '.join(broken)} during calibration.")
    return Calibration({name: each.result(moments.get(name)) for name, each in sums.items()}, positions)


def _passes(
    model: nn.Module,
    layers: Sequence[Layer],
    watchers: Mapping[str, _Watcher],
    batches: Sequence[Any],
    config: PrecisionConfig,
    readout: Readout | None,
) -> int:
    """Run the batches forward and backward under the layers' watchers. Returns output positions."""
    handles = [layer.module.register_forward_hook(watchers[layer.name].hook) for layer in layers]
    generator, positions = torch.Generator().manual_seed(config.seed), 0
    try:
        with frozen(model), torch.enable_grad():
            for batch in batches:
                score, count = _sampled_score(*read(model, batch, readout), generator, batch)
                score.backward()
                positions += count
    finally:
        for handle in handles:
            handle.remove()
    return positions


def _sampled_score(found: Tensor, logits: bool, generator: torch.Generator, batch: Any) -> tuple[Tensor, int]:
    """(log-likelihood of labels drawn from the model, summed; positions). Padding is left out.

    Without logits the model is a Gaussian of unit variance around its output, whose score is a normal draw.
    """
    mask = _tensors(batch).get("attention_mask") if hasattr(batch, "keys") else None
    shape = found.shape[:-1]
    kept = torch.ones(shape) if mask is None or mask.shape != shape else mask.cpu().float()
    if logits:
        likelihood = found.log_softmax(-1)
        flat = likelihood.detach().exp().flatten(0, -2).cpu()
        labels = torch.multinomial(flat, 1, generator=generator).view(*shape, 1).to(found.device)
        scores = likelihood.gather(-1, labels).squeeze(-1)
    else:
        scores = (found * torch.randn(found.shape, generator=generator).to(found.device)).sum(-1)
    return (scores * kept.to(found.device)).sum(), int(kept.sum())


class _RoundingErrors:
    """Rounded minus original weight of a layer in a format, kept while there is room."""

    def __init__(
        self, layers: Sequence[Layer], formats: Sequence[PrecisionFormat], group: int, moments: Mapping[str, Tensor]
    ) -> None:
        self.formats, self.group, self.moments = formats, group, moments
        size = sum(layer.module.weight.numel() * 4 for layer in layers) * len(formats)
        self.cache: dict[tuple[str, PrecisionFormat], Tensor] | None = {} if size <= _CACHE_BYTES else None

    def __call__(self, layer: Layer, form: PrecisionFormat) -> Tensor | None:
        if form is layer.kept:
            return None
        key = layer.name, form
        if self.cache is not None and key in self.cache:
            return self.cache[key]
        error = rounding_error(layer.module.weight, form, self.group, self.moments.get(layer.name))
        if self.cache is not None:
            self.cache[key] = error
        return error


def rounding_error(weight: Tensor, form: PrecisionFormat, group: int, moment: Tensor | None = None) -> Tensor:
    """Rounded minus original weight, float32."""
    weight = weight.detach().float()
    return unpack(pack(weight, form, group, moment), form, group) - weight


class _Watcher(ABC):
    """Reads a layer's inputs and the gradients of its outputs, both [tokens, features]."""

    inputs = 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        given = args[0].detach().float().flatten(0, -2)
        self.inputs += given.numel()
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def backward(grad: Tensor) -> None:
            with torch.no_grad():
                self.add(given, grad.float().flatten(0, -2))

        output.register_hook(backward)
        return output

    @abstractmethod
    def add(self, given: Tensor, grad: Tensor) -> None: ...


class _Moment(_Watcher):
    """Second moment of the inputs, weighted by the squared gradients of the outputs."""

    def __init__(self, layer: Layer) -> None:
        self.moment = torch.zeros(layer.columns, layer.columns, device=layer.module.weight.device)

    def add(self, given: Tensor, grad: Tensor) -> None:
        weighted = given * grad.square().sum(1, keepdim=True)
        self.moment += weighted.T @ given


class _Sums(_Watcher):
    """Running sums of one layer."""

    def __init__(self, layer: Layer, errors: _RoundingErrors) -> None:
        shape, device = (layer.rows, len(errors.formats)), layer.module.weight.device
        self.layer, self.errors = layer, errors
        self.first, self.second = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.gradient = torch.zeros(layer.rows, device=device)
        self.squares, self.largest = 0.0, 0.0

    def add(self, given: Tensor, grad: Tensor) -> None:
        self.squares += float(given.square().sum())
        self.largest = max(self.largest, float(given.abs().amax()))
        self.gradient += grad.square().sum(0)
        for place, form in enumerate(self.errors.formats):
            if (error := self.errors(self.layer, form)) is not None:
                change = grad * (given @ error.T)
                self.first[:, place] += change.abs().sum(0)
                self.second[:, place] += change.square().sum(0)

    def result(self, moment: Tensor | None) -> Measured:
        mean = self.squares / max(self.inputs, 1)
        return Measured(self.first.cpu(), self.second.cpu(), self.gradient.cpu(), mean, self.largest, moment)


def entropy(weight: Tensor, block_rows: int) -> Tensor:
    """Shannon entropy in bits, [blocks], of each block's weights in 256 equal bins from its smallest to its largest."""
    found = []
    for block in weight.detach().float().cpu().split(block_rows):
        low, high = block.amin(), block.amax()
        codes = ((block - low) / (high - low).clamp_min(1e-30) * (_BINS - 1)).round().long().flatten()
        share = torch.bincount(codes, minlength=_BINS).double() / codes.numel()
        found.append(-torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0)))
    return torch.stack(found).float()


def by_block(values: Tensor, block_rows: int) -> Tensor:
    """Sums over blocks of rows: [rows, ...] -> [blocks, ...]."""
    return torch.stack([each.sum(0) for each in values.split(block_rows)])


def costs(
    layers: Sequence[Layer],
    formats: Sequence[PrecisionFormat],
    config: PrecisionConfig,
    calibration: Calibration | None,
    factors: dict[str, float] | None = None,
) -> Tensor:
    """The cost [blocks of all layers, formats] by the config's strategy; its unit is the strategy's.

    Of FISHER and LEARNED it is the predicted rise of the loss for each output position.
    """
    strategy, found = config.allocation_strategy, []
    for layer in layers:
        measured = None if calibration is None else calibration.layers[layer.name]
        bits = entropy(layer.module.weight, config.block_rows).unsqueeze(1)
        if strategy in (AllocationStrategy.ENTROPY_BASED, AllocationStrategy.UNIFORM):
            weight = layer.module.weight.detach().float()
            columns = [
                torch.zeros(layer.rows)
                if form is layer.kept
                else rounding_error(weight, form, config.group_size).square().sum(1).cpu()
                for form in formats
            ]
            cost = bits * by_block(torch.stack(columns, 1), config.block_rows)
            if measured is not None:
                energy = by_block(measured.gradient.unsqueeze(1), config.block_rows)
                cost *= energy**config.gradient_weight * measured.activation**config.activation_weight
            cost = torch.where(bits < config.entropy_threshold, 0.0, cost)
        else:
            assert measured is not None
            assert calibration is not None
            first = strategy is AllocationStrategy.GRADIENT
            cost = by_block(measured.first if first else measured.second, config.block_rows)
            cost *= (1.0 if first else 0.5) / calibration.positions
            if strategy is AllocationStrategy.ENTROPY_FISHER:
                cost *= bits
            cost *= (factors or {}).get(layer.name, 1.0)
        found.append(cost)
    return torch.cat(found)


def learned_factors(
    model: nn.Module,
    layers: Sequence[Layer],
    formats: Sequence[PrecisionFormat],
    calibration: Calibration,
    batches: Sequence[Any],
    config: PrecisionConfig,
    readout: Readout | None = None,
) -> dict[str, float]:
    """Measured over predicted rise of the loss, for each layer, with that layer alone in the format nearest 4 bits.

    Measured: the divergence of the outputs from the unrounded model's, Kullback-Leibler for logits, else half the
    squared distance. Factors stay within 1/16 and 16.
    """
    form = min(
        (each for each in formats if each.is_integer), key=lambda each: abs(each.bits - _LEARNED_BITS), default=None
    )
    if form is None:
        return {}
    place, found = formats.index(form), {}
    share = len(batches[:_LEARNED_BATCHES]) / len(batches)
    batches = batches[:_LEARNED_BATCHES]
    with frozen(model), torch.no_grad():
        clean = [read(model, batch, readout) for batch in batches]
        for layer in layers:
            weight = layer.module.weight
            before = weight.detach().clone()
            moment = calibration.layers[layer.name].moment
            weight.add_(rounding_error(weight, form, config.group_size, moment).to(weight.dtype))
            try:
                rise = sum(
                    _divergence(read(model, batch, readout), one) for batch, one in zip(batches, clean, strict=True)
                )
            finally:
                weight.copy_(before)
            predicted = 0.5 * share * float(calibration.layers[layer.name].second[:, place].sum())
            found[layer.name] = min(max(rise / predicted, 1 / 16), 16.0) if predicted > 0 else 1.0
    return found


def read(model: nn.Module, batch: Any, readout: Readout | None) -> tuple[Tensor, bool]:
    """(what a model is judged by, in float32; whether it is logits)."""
    output = run(model, batch)
    found, logits = (readout(output), False) if readout is not None else read_output(output)
    return found.float(), logits


def _divergence(found: tuple[Tensor, bool], clean: tuple[Tensor, bool]) -> float:
    (now, logits), before = found, clean[0]
    if not logits:
        return 0.5 * float((now - before).square().sum())
    likelihood = before.log_softmax(-1)
    return float((likelihood.exp() * (likelihood - now.log_softmax(-1))).sum())

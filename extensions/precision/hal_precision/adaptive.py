"""Adaptive precision: a plan that meets a budget, and a model that is stored by it."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from hal_core import ContractError, HalError, UnsupportedError

from . import allocation, sensitivity
from .config import AllocationStrategy, PrecisionConfig, QuantizationMode
from .files import save_whole
from .formats import FORMATS, PrecisionFormat, offered
from .packed import PackedLinear

_METADATA = "hal_precision"


@attrs.frozen
class LayerPlan:
    """name: of the layer. formats: of its blocks of rows, in order."""

    name: str
    rows: int
    columns: int
    formats: tuple[PrecisionFormat, ...]


@attrs.frozen
class PrecisionPlan:
    """A format for every block of every layer that is packed.

    Attributes:
        layers: in the model's order. left: layers that stay as they are, and why.
        original_bytes, stored_bytes: of the whole model's parameters and buffers, before and after.
        cost: what the strategy predicts; of FISHER and LEARNED the rise of the loss for each output position.
        gap: the most that another plan within the budget could cost less; 0 where this one is proven optimal.
        block_rows, group_size, mode: as in the config.
        moments, largest: what packing reads of the calibration data: the inputs' second moments where rounding is
            compensated, the largest inputs in static mode. Not part of the text form.
    """

    layers: tuple[LayerPlan, ...]
    left: dict[str, str]
    original_bytes: int
    stored_bytes: int
    cost: float
    gap: float
    block_rows: int
    group_size: int
    mode: QuantizationMode
    moments: dict[str, Tensor] = attrs.field(factory=dict, repr=False, eq=False)
    largest: dict[str, float] = attrs.field(factory=dict, repr=False, eq=False)

    @property
    def memory_reduction(self) -> float:
        return 1 - self.stored_bytes / self.original_bytes

    @property
    def average_bits(self) -> float:
        """Bits of a packed weight, scales included."""
        weights = sum(layer.rows * layer.columns for layer in self.layers)
        return 8 * sum(self.histogram(by="bytes").values()) / weights

    def histogram(self, by: str = "weights") -> dict[str, int]:
        """Weights, or with by="bytes" the bytes, of each format in use."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for place, form in enumerate(layer.formats):
                rows = min(self.block_rows, layer.rows - place * self.block_rows)
                size = form.bytes_of(rows, layer.columns, self.group_size) if by == "bytes" else rows * layer.columns
                found[form.value] = found.get(form.value, 0) + size
        return {form.value: found[form.value] for form in FORMATS if form.value in found}

    def to_json(self) -> str:
        """The plan as text, which `from_json` reads."""
        data = attrs.asdict(
            attrs.evolve(self, moments={}, largest={}),
            value_serializer=lambda _, __, value: getattr(value, "value", value),
        )
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        data = json.loads(text)
        layers = tuple(
            LayerPlan(**{**one, "formats": tuple(PrecisionFormat(each) for each in one["formats"])})
            for one in data.pop("layers")
        )
        return cls(layers=layers, **{**data, "mode": QuantizationMode(data["mode"])})


@attrs.frozen
class PrecisionStats:
    """What is stored: bytes measured on the tensors, not planned.

    Attributes:
        original_bytes, stored_bytes: of the model's parameters and buffers. memory_savings_ratio: the share saved.
        average_bits: of a packed weight, scales included. formats: packed weights by format.
        predicted_cost, optimality_gap: as `PrecisionPlan.cost` and `gap`. layers_left: not packed, and why.
        kernels: what computes from the packed weights.
    """

    original_bytes: int
    stored_bytes: int
    memory_savings_ratio: float
    average_bits: float
    formats: dict[str, int]
    predicted_cost: float
    optimality_gap: float
    layers_left: dict[str, str]
    kernels: str = "unpacked format by format at each call, then torch's matrix product"


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and of the buffers that its state dict holds, shared tensors once."""
    return sum({id(each): each.nbytes for each in model.state_dict(keep_vars=True).values()}.values())


def plan_precision(
    model: nn.Module,
    config: PrecisionConfig | None = None,
    calibration: Any = None,
    *,
    readout: sensitivity.Readout | None = None,
    budget_bytes: int | None = None,
) -> PrecisionPlan:
    """Choose formats; the model is not changed.

    Args:
        model: any module with nn.Linear layers. config: strategy and budget.
        calibration: a batch, or an iterable of batches: tensors, tuples or dicts. Strategies by data need it.
        readout: from the model's output to the tensor that matters, judged by squared distance. Without it logits are
            judged by cross entropy, and last hidden states or tensors by squared distance.
        budget_bytes: bytes of the whole model, instead of the config's reduction.

    Raises:
        ContractError: malformed config or data; a strategy without the data that it needs; a budget that nothing
            meets, with the nearest that can be met.
        UnsupportedError: formats that the device lacks, with those that it has.
    """
    return _planned(model, config or PrecisionConfig(), calibration, readout, budget_bytes).plan


class _Planned(NamedTuple):
    """A plan, and what it was made from."""

    plan: PrecisionPlan
    layers: list[sensitivity.Layer]
    formats: list[PrecisionFormat]
    measured: sensitivity.Calibration | None


def _planned(
    model: nn.Module,
    config: PrecisionConfig,
    calibration: Any,
    readout: sensitivity.Readout | None,
    budget_bytes: int | None = None,
) -> _Planned:
    layers, left = sensitivity.packable(model, config)
    formats = _candidates(layers, config)
    strategy, factors = config.allocation_strategy, None
    if calibration is None and (strategy.needs_data or config.quantization_mode is QuantizationMode.STATIC):
        what = f"Strategy {strategy.value!r}" if strategy.needs_data else "Quantization mode 'static'"
        raise ContractError(
            f"{what} needs calibration data: give calibration=, a list of batches, or choose "
            "AllocationStrategy.ENTROPY_BASED with QuantizationMode.DYNAMIC."
        )
    measured = None
    if calibration is not None:
        batches = sensitivity.batches_of(calibration)
        measured = sensitivity.calibrate(model, layers, formats, batches, config, readout)
        if strategy is AllocationStrategy.LEARNED:
            factors = sensitivity.learned_factors(model, layers, formats, measured, batches, config, readout)
    costs = sensitivity.costs(layers, formats, config, measured, factors).double().numpy()
    plan = choose(model, layers, left, formats, costs, config, budget_bytes, measured)
    return _Planned(plan, layers, formats, measured)


def choose(
    model: nn.Module,
    layers: Sequence[sensitivity.Layer],
    left: dict[str, str],
    formats: Sequence[PrecisionFormat],
    costs: allocation.Array,
    config: PrecisionConfig,
    budget_bytes: int | None = None,
    measured: sensitivity.Calibration | None = None,
) -> PrecisionPlan:
    """The plan of least cost within the budget, or of fewest bytes within a quality budget, given all costs."""
    sizes = _sizes(layers, formats, config)
    original = model_bytes(model)
    scales = 4 * len(layers) if config.quantization_mode is QuantizationMode.STATIC else 0
    fixed = original - sum(layer.module.weight.nbytes for layer in layers) + scales
    budget = budget_bytes if budget_bytes is not None else int((1 - config.target_memory_reduction) * original)
    quality = config.max_loss_increase if budget_bytes is None else None
    if quality is None:
        sizes = _within_base(sizes, layers, formats, config, budget - fixed)
    if config.allocation_strategy is AllocationStrategy.UNIFORM:
        found = _uniform(sizes, costs, budget - fixed, quality)
    elif quality is None:
        found = allocation.solve(sizes, costs, budget - fixed)
    else:
        bounded = np.where(np.isfinite(sizes), costs, np.inf)
        swapped = allocation.solve(bounded, sizes, quality)
        found = swapped and allocation.Choice(swapped.items, swapped.cost, swapped.size, swapped.gap)
    if found is None:
        raise ContractError(_nearest(sizes, costs, budget, fixed, original, quality))
    places = iter(found.items.tolist())
    plans = [
        LayerPlan(
            layer.name,
            layer.rows,
            layer.columns,
            tuple(formats[next(places)] for _ in range(-(-layer.rows // config.block_rows))),
        )
        for layer in layers
    ]
    return PrecisionPlan(
        tuple(plans),
        left,
        original,
        fixed + int(found.size),
        found.cost,
        found.gap,
        config.block_rows,
        config.group_size,
        config.quantization_mode,
        {} if measured is None else {n: m.moment for n, m in measured.layers.items() if m.moment is not None},
        {} if measured is None else {n: m.largest for n, m in measured.layers.items()},
    )


def _candidates(layers: Sequence[sensitivity.Layer], config: PrecisionConfig) -> list[PrecisionFormat]:
    """Formats to choose from on the layers' device.

    Raises:
        UnsupportedError: the device lacks some that are named.
    """
    device = layers[0].module.weight.device
    have = offered(device.type if device.index is None else str(device))
    lacking = [each.value for each in config.formats or () if each not in have]
    if lacking:
        raise UnsupportedError(
            f"{device} lacks {', '.join(lacking)}; it has {', '.join(each.value for each in have)}. Name those in "
            "PrecisionConfig.formats, or leave it None. Nothing was changed."
        )
    return list(config.formats or have)


def _sizes(
    layers: Sequence[sensitivity.Layer], formats: Sequence[PrecisionFormat], config: PrecisionConfig
) -> allocation.Array:
    """Bytes [blocks of all layers, formats], the byte that names the format included."""
    found = []
    for layer in layers:
        for start in range(0, layer.rows, config.block_rows):
            rows = min(config.block_rows, layer.rows - start)
            found.append(
                [
                    np.inf
                    if form.bits > layer.kept.bits or (form.bits == layer.kept.bits > 8 and form is not layer.kept)
                    else form.bytes_of(rows, layer.columns, config.group_size) + 1.0
                    for form in formats
                ]
            )
    return np.array(found)


def _within_base(
    sizes: allocation.Array,
    layers: Sequence[sensitivity.Layer],
    formats: Sequence[PrecisionFormat],
    config: PrecisionConfig,
    bound: float,
) -> allocation.Array:
    """Sizes without formats above the base precision, where the budget does not reach beyond it."""
    wide = np.array([form.bits > config.base_precision.bits for form in formats])
    limited = np.where(wide[None, :], np.inf, sizes)
    largest = np.where(np.isfinite(limited), limited, -np.inf).max(1)
    return limited if np.isfinite(largest).all() and largest.sum() >= bound else sizes


def _uniform(
    sizes: allocation.Array, costs: allocation.Array, bound: float, quality: float | None
) -> allocation.Choice | None:
    """One format for all blocks: of least cost within the bytes, or of fewest bytes within the quality."""
    totals, whole = sizes.sum(0), costs.sum(0)
    fits = np.isfinite(totals) & ((totals <= bound) if quality is None else (whole <= quality))
    if not fits.any():
        return None
    place = int(np.where(fits, whole if quality is None else totals, np.inf).argmin())
    items = np.full(len(sizes), place, dtype=np.int64)
    return allocation.Choice(items, float(totals[place]), float(whole[place]), 0.0)


def _nearest(
    sizes: allocation.Array,
    costs: allocation.Array,
    budget: int,
    fixed: int,
    original: int,
    quality: float | None,
) -> str:
    if quality is not None:
        least = np.where(np.isfinite(sizes), costs, np.inf).min(1).sum()
        return (
            f"No plan keeps the predicted rise of the loss within {quality:g}: the nearest that can be met is "
            f"{least:g}. Raise max_loss_increase, or allow more formats. Nothing was changed."
        )
    smallest = fixed + int(sizes.min(1).sum())
    return (
        f"No plan stores the model in {budget:,} bytes ({1 - budget / original:.1%} less than {original:,}): "
        f"the nearest that can be met is {smallest:,} bytes, a reduction of {1 - smallest / original:.1%}; {fixed:,} "
        "bytes are not packed. Ask for less, or allow narrower formats. Nothing was changed."
    )


class UltraPrecisionModule(nn.Module):
    """A model whose linear layers are stored packed. Calls, attributes and the state dict are those of the model.

    Parameters that are not packed are shared with the original model, which is not changed. The memory of the original
    weights is free once the caller lets go of the original.

    Attributes:
        module: the model with `PackedLinear` layers. plan: its formats.
    """

    module: nn.Module
    plan: PrecisionPlan

    def __init__(self, module: nn.Module, plan: PrecisionPlan, original: nn.Module | None = None) -> None:
        super().__init__()
        self.module, self.plan = module, plan
        self._original = None if original is None else weakref.ref(original)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_original": None}

    def get_precision_stats(self) -> PrecisionStats:
        """Bytes as they are now, and what was planned."""
        stored = model_bytes(self.module)
        return PrecisionStats(
            self.plan.original_bytes,
            stored,
            1 - stored / self.plan.original_bytes,
            self.plan.average_bits,
            self.plan.histogram(),
            self.plan.cost,
            self.plan.gap,
            dict(self.plan.left),
        )

    def revert(self) -> nn.Module:
        """The original model, bit for bit.

        Raises:
            HalError: nobody holds the original any more; packed weights cannot be made exact again.
        """
        original = None if self._original is None else self._original()
        if original is None:
            raise HalError(
                "The original model is gone: rounding is not reversible, so keep a reference to the model, or load its "
                "weights again."
            )
        return original

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write tensors and plan to one safetensors file, whole or not at all. Returns its bytes."""
        tensors, seen = {}, set[int]()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # tied weights once, under their first name
                seen.add(id(tensor))
                tensors[name] = tensor.detach().contiguous()
        return save_whole(path, tensors, {_METADATA: self.plan.to_json()})

    @classmethod
    def load(cls, model: nn.Module, path: str | os.PathLike[str]) -> UltraPrecisionModule:
        """A model with random or other weights, filled from a file that `save` wrote. `model` is not changed.

        Raises:
            ContractError: not such a file, or of another model, with every difference.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if text is None:
            raise ContractError(f"{path} has no precision plan: it was not written by UltraPrecisionModule.save.")
        plan = PrecisionPlan.from_json(text)
        module = _apply(model, plan, share=False)
        try:
            missing, unexpected = module.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise ContractError(f"{path} is of another model: {error}") from error
        known = {id(tensor) for name, tensor in module.state_dict(keep_vars=True).items() if name in tensors}
        state = module.state_dict(keep_vars=True)
        missing = [name for name in missing if id(state[name]) not in known]
        if missing or unexpected:
            raise ContractError(f"{path} is of another model: it lacks {missing}, and has {unexpected} besides.")
        return cls(module, plan)


def create_ultra_precision_module(
    model: nn.Module,
    config: PrecisionConfig | None = None,
    device: torch.device | str | None = None,
    *,
    calibration: Any = None,
    readout: sensitivity.Readout | None = None,
    plan: PrecisionPlan | None = None,
) -> UltraPrecisionModule:
    """Store a model by a plan that meets a budget. The model itself is not changed.

    Args:
        model: any module with nn.Linear layers. device: where the result is put; None leaves it where it is.
        config, calibration, readout: as in `plan_precision`, which also names what is raised.
        plan: a plan that was made before, instead.
    """
    config = config or PrecisionConfig()
    plan = plan or plan_precision(model, config, calibration, readout=readout)
    module = _apply(model, plan)
    found = UltraPrecisionModule(module, plan, model)
    return found if device is None else UltraPrecisionModule(copy.deepcopy(module).to(device), plan, model)


def _apply(model: nn.Module, plan: PrecisionPlan, *, share: bool = True) -> nn.Module:
    """A copy of the model with packed layers; other tensors are shared where asked."""
    names = {layer.name for layer in plan.layers}
    known = dict(model.named_modules())
    if unknown := sorted(names - set(known)):
        raise ContractError(f"The plan is of another model: there is no layer {', '.join(unknown)}.")
    memo: dict[int, Any] = {}
    for name, module in known.items():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            # Weights that are going to be packed are not copied either way.
            if tensor is not None and (share or (name in names and key == "weight")):
                memo[id(tensor)] = tensor
    copied = copy.deepcopy(model, memo)
    for layer in plan.layers:
        parent = copied.get_submodule(layer.name.rpartition(".")[0])
        linear = copied.get_submodule(layer.name)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != (layer.rows, layer.columns):
            raise ContractError(
                f"The plan is of another model: {layer.name} is not linear, {layer.columns} -> {layer.rows}."
            )
        packed = PackedLinear.of(
            linear,
            layer.formats,
            block_rows=plan.block_rows,
            group_size=plan.group_size,
            mode=plan.mode,
            moment=plan.moments.get(layer.name),
        )
        if plan.mode is QuantizationMode.STATIC and (largest := plan.largest.get(layer.name)):
            packed.input_scale = torch.tensor(largest / 127.0, device=linear.weight.device)
        if parent is linear:
            return packed
        setattr(parent, layer.name.rpartition(".")[2], packed)
    return copied


def analyze_precision_opportunities(
    model: nn.Module,
    sample_input: Any,
    device: torch.device | str | None = None,
    *,
    config: PrecisionConfig | None = None,
    readout: sensitivity.Readout | None = None,
) -> dict[str, Any]:
    """What could be saved, and where it would hurt, before anything is changed.

    Args:
        model: any module with nn.Linear layers. sample_input: calibration data, as in `plan_precision`; at least two
            samples. device: where to measure; None is where the model is. Elsewhere a copy is measured.
        config: the budget and formats; its strategy is used, FISHER by default.

    Returns:
        potential_savings: share of the model's bytes that the plan saves. plan: the `PrecisionPlan`.
        recommendations: sentences. layers: for each layer the average bits planned, entropy in bits, and the predicted
        rise of the loss if all of it were stored in 4 bits. left: layers that cannot be packed, and why.

    Raises:
        As `plan_precision`.
    """
    config = config or PrecisionConfig(allocation_strategy=AllocationStrategy.FISHER)
    if device is not None:
        model = copy.deepcopy(model).to(device)
        sample_input = [_moved(batch, device) for batch in sensitivity.batches_of(sample_input)]
    plan, layers, formats, measured = _planned(model, config, sample_input, readout)
    assert measured is not None
    narrow = min(range(len(formats)), key=lambda n: (abs(formats[n].bits - 4), formats[n].bits))
    rows: list[dict[str, Any]] = []
    for layer, planned in zip(layers, plan.layers, strict=True):
        second = measured.layers[layer.name].second
        rows.append(
            {
                "name": layer.name,
                "bits": attrs.evolve(plan, layers=(planned,)).average_bits,
                "entropy": float(sensitivity.entropy(layer.module.weight, config.block_rows).mean()),
                "rise": 0.5 * float(second[:, narrow].sum()) / measured.positions,
            }
        )
    by_rise = sorted(rows, key=lambda row: -row["rise"])
    advice = [
        f"Storing {len(rows)} layers by the plan saves {plan.memory_reduction:.1%}: {plan.stored_bytes:,} bytes "
        f"instead of {plan.original_bytes:,}.",
        f"Most sensitive at {formats[narrow].value}: {', '.join(row['name'] for row in by_rise[:3])}.",
        f"Least sensitive: {', '.join(row['name'] for row in by_rise[-3:])}.",
    ]
    if plan.left:
        reasons = "; ".join(f"{n} {why}" for n, why in plan.left.items())
        advice.append(f"{len(plan.left)} layers stay as they are: {reasons}.")
    return {
        "potential_savings": plan.memory_reduction,
        "recommendations": advice,
        "plan": plan,
        "layers": rows,
        "left": plan.left,
    }


def _moved(batch: Any, device: torch.device | str) -> Any:
    if hasattr(batch, "keys"):
        return {name: _moved(each, device) for name, each in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(each, device) for each in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch

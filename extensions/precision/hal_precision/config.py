"""What is asked of adaptive precision: a strategy, a budget, formats and a mode."""

from __future__ import annotations

import math
from enum import Enum

import attrs

from hal_core import ContractError

from .formats import PrecisionFormat


class AllocationStrategy(Enum):
    """How the cost of storing a block of rows in a format is estimated.

    ENTROPY_BASED: entropy of the block's weights times the squared rounding error. Needs no data; with calibration data
        the energies of gradients and activations enter by `gradient_weight` and `activation_weight`.
    GRADIENT: first order, the mean of |gradient . rounding error|.
    FISHER: second order, half the mean square of (gradient . rounding error): the expected rise of the loss.
    ENTROPY_FISHER: FISHER times entropy.
    LEARNED: FISHER, times a factor for each layer that is measured by rounding that layer alone.
    UNIFORM: one format for all blocks, the best that meets the budget.
    """

    ENTROPY_BASED = "entropy"
    ENTROPY = "entropy"
    GRADIENT = "gradient"
    FISHER = "fisher"
    ENTROPY_FISHER = "entropy_fisher"
    LEARNED = "learned"
    UNIFORM = "uniform"

    @property
    def needs_data(self) -> bool:
        """Whether the strategy reads calibration data."""
        return self not in (AllocationStrategy.ENTROPY_BASED, AllocationStrategy.UNIFORM)


class QuantizationMode(Enum):
    """What happens to the inputs of packed layers, besides the weights.

    WEIGHT_ONLY: nothing. DYNAMIC: rounded to int8 by a scale for each token, taken at each call. STATIC: rounded to
    int8 by one scale for each layer, taken from calibration data.
    """

    WEIGHT_ONLY = "weight_only"
    DYNAMIC = "dynamic"
    STATIC = "static"


@attrs.frozen
class PrecisionConfig:
    """What adaptive precision is asked for.

    Attributes:
        base_precision: the most precise format that a plan may choose where the reduction that is asked allows it.
            Blocks stay as they are where even that format would save more than was asked.
        allocation_strategy: how costs are estimated.
        quantization_mode: what happens to the inputs of packed layers.
        entropy_threshold: bits; blocks below it cost nothing under ENTROPY_BASED, so they get the smallest format.
        target_memory_reduction: share of the model's bytes to save, in (0, 1). Ignored where a quality budget is given.
        gradient_weight, activation_weight: exponents of the energies of a block's gradients and of its inputs, each
            relative to the mean over blocks, in the cost of ENTROPY_BASED where calibration data is given.
        max_loss_increase: a quality budget instead: the fewest bytes whose predicted rise of the loss, for each output
            position, is at most this. The loss is cross entropy in nats for logits, else half the squared error.
        formats: formats to choose from; None for all that the device has.
        block_rows: rows (output features) that share a format. group_size: weights that share a scale, multiple of 8.
        compensate: with calibration data, round narrow integers column by column so that later columns make up for the
            errors of earlier ones (GPTQ). Takes no bytes.
        skip: parts of names of layers to leave as they are. seed: of sampled labels.
    """

    base_precision: PrecisionFormat = PrecisionFormat.FP16
    allocation_strategy: AllocationStrategy = AllocationStrategy.ENTROPY_BASED
    quantization_mode: QuantizationMode = QuantizationMode.DYNAMIC
    entropy_threshold: float = 1.5
    target_memory_reduction: float = 0.4
    gradient_weight: float = 0.3
    activation_weight: float = 0.4
    max_loss_increase: float | None = None
    formats: tuple[PrecisionFormat, ...] | None = None
    block_rows: int = 16
    group_size: int = 32
    compensate: bool = True
    skip: tuple[str, ...] = ()
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        wrong = []
        if not 0 < self.target_memory_reduction < 1:
            wrong.append(f"target_memory_reduction is {self.target_memory_reduction}: give a share between 0 and 1")
        if self.max_loss_increase is not None and not (
            self.max_loss_increase >= 0 and math.isfinite(self.max_loss_increase)
        ):
            wrong.append(f"max_loss_increase is {self.max_loss_increase}: give a finite number from 0 on, or None")
        if self.group_size < 8 or self.group_size % 8:
            wrong.append(f"group_size is {self.group_size}: give a positive multiple of 8")
        if self.block_rows < 1:
            wrong.append(f"block_rows is {self.block_rows}: give 1 or more")
        if self.formats is not None and not self.formats:
            wrong.append("formats is empty: name at least one, or give None for all")
        if wrong:
            raise ContractError("PrecisionConfig: " + "; ".join(wrong) + ".")

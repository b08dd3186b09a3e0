"""The float64 runs that errors are measured against."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hal_core import HalError

from .batches import Batch, Tokens
from .metrics import Outputs, read_outputs
from .models import Float64Throughout, Model, in_float64


class ReferenceRuns:
    """Batches with their float64 runs.

    Args:
        model: what runs. tokens: the batches. keep: whether a run is kept, so that several comparisons share it; each
            holds the hidden states of all layers.
    """

    def __init__(self, model: Model, tokens: Tokens, *, keep: bool = False) -> None:
        self.tokens = tokens
        self._model, self._keep = model, keep
        self._network: Any = None
        self._runs: dict[int, tuple[Outputs, int]] = {}

    def run(self, number: int) -> tuple[Outputs, int]:
        """The float64 run of a batch and the multiply-accumulates of its matrix products.

        Raises:
            HalError: the model does not run on what it was given.
        """
        if number in self._runs:
            return self._runs[number]
        found = self._measured(self.tokens.batches[number])
        if self._keep:
            self._runs[number] = found
            if len(self._runs) == len(self.tokens.batches):
                self._network = None  # every batch has run
        return found

    def _measured(self, batch: Batch) -> tuple[Outputs, int]:
        model, counter = self._model, FlopCounterMode(display=False)
        if self._network is None:
            self._network = in_float64(model.network)
        try:
            with torch.no_grad(), counter, Float64Throughout():
                outputs = self._network(**batch.inputs("cpu", torch.float64), output_hidden_states=True)
        except Exception as error:  # a model that is not given all that it needs fails in its own way
            if isinstance(error, HalError) or os.environ.get("HAL_DEBUG") == "1":
                raise
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise HalError(
                f"{type(self._network).__name__} does not run on {model.task.modality} alone ({what}): give one of "
                "its parts"
            ) from error
        return read_outputs(outputs, batch, model.kind, model.pooling), counter.get_total_flops() // 2

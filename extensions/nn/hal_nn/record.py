"""What a module says of its newest attention call: the device that ran it, and that device's time and energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hal_core as hal

from .placement import calls, device_of

SEEN = "_hal_seen"


class DeviceRecord:
    """A base of modules that call attention, and keep the decision of their newest call.

    The decision is not part of a copy or a pickle of the module. Compiled calls keep none.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """`hal.attention` on the module's device, if `hal_nn.set_device` gave it one, with its decision kept."""
        if (device := device_of(self)) is not None:  # type: ignore[arg-type]
            options.setdefault("backend", device)
        if torch.compiler.is_compiling():
            return hal.attention(query, key, value, mask, **options)
        with hal.watch() as seen:
            result = hal.attention(query, key, value, mask, **options)
        self.__dict__[SEEN] = seen
        calls.count += 1
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: kept for name, kept in self.__dict__.items() if name != SEEN}

    @property
    def last_decision(self) -> hal.Decision | None:
        """The decision that the newest call ran under; None before the first."""
        seen = self.__dict__.get(SEEN)
        return None if seen is None else seen.decision

    @property
    def last_device_used(self) -> str | None:
        """The id of the device that ran the newest call ("cpu:0"); None before the first."""
        decision = self.last_decision
        return None if decision is None else decision.chosen

    @property
    def last_latency_ms(self) -> float | None:
        """Milliseconds that the device is said to need for the newest call: its own statement of the call, or the
        middle of the decision's estimate, which is for the call's length bucket. None where neither says a time.
        """
        seen = self.__dict__.get(SEEN)
        return None if seen is None or seen.estimate is None else seen.estimate.time.middle * 1e3

    @property
    def last_energy_mj(self) -> float | None:
        """Millijoules, as `last_latency_ms`. None where the device states no energy."""
        seen = self.__dict__.get(SEEN)
        return (
            None
            if seen is None or getattr(seen.estimate, "energy", None) is None
            else seen.estimate.energy.middle * 1e3
        )

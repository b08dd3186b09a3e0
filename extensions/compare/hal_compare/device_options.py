"""Options of the devices themselves: `hal compare --option passes=4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import hal_core as hal
from hal_core import HalError

from .lanes import Lane, Scope


def set_options(lanes: Sequence[Lane], given: Sequence[str]) -> list[str]:
    """Give each row the options that its device has.

    Args:
        given: "name=value".

    Returns:
        One sentence for every option, with the rows that run with it.

    Raises:
        HalError: no name and value, a name that no device among the rows has, or a value that a device does not take.
    """
    said = []
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise HalError(f"--option {text!r} was given: pass NAME=VALUE, for example passes=4")
        able = [lane for lane in lanes if lane.scope is not Scope.COMPILED and name in offered(lane)]
        if not able:
            raise HalError(f"--option {text} was given: {_all_offered(lanes)}")
        for lane in able:
            number = parsed(value)
            if number not in offered(lane)[name]:
                takes = offered(lane)[name]
                wanted = takes if not isinstance(takes, tuple) else " or ".join(map(str, takes))
                raise HalError(f"--option {text} was given: {lane.name} takes {name} of {wanted}")
            lane.options[name] = number
        said.append(f"{name}={value}: {', '.join(lane.name for lane in able)}.")
    return said


def offered(lane: Lane) -> Mapping[str, Any]:
    """The options of a row's device, each with what it takes."""
    return {} if lane.device is None else hal.capabilities(lane.device.id).options


def parsed(value: str) -> int | float | str:
    """A whole number, a number, or the text itself."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _all_offered(lanes: Sequence[Lane]) -> str:
    known = {lane.device.id: ", ".join(sorted(offered(lane))) for lane in lanes if lane.device and offered(lane)}
    if not known:
        return "no device of this comparison has options: leave it out"
    return f"use one of {'; '.join(f'{names} ({device})' for device, names in known.items())}"

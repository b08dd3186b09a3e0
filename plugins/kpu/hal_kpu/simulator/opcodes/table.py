"""Every operation of the machine by name: at most 80, each with its values and the work it asks for."""

from __future__ import annotations

from .array import ARRAY
from .elementwise import ELEMENTWISE
from .movement import MOVEMENT
from .reduction import REDUCTION
from .work import Opcode, Work

__all__ = ["LIMIT", "OPCODES", "Opcode", "Work"]

LIMIT = 80

OPCODES: dict[str, Opcode] = {opcode.name: opcode for opcode in (*ARRAY, *ELEMENTWISE, *REDUCTION, *MOVEMENT)}

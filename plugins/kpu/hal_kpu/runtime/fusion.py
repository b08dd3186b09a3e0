"""Which operations of a program run as one: elementwise chains stream once, or leave with the product that feeds them.

A group is one pass over one result: a matrix product, a softmax or an elementwise operation, then elementwise
operations over as many elements, then reductions of what is there. Between them values stay in L2; what the group reads
from outside comes once, and what is used outside is written once. Groups are convex: nothing outside of a group lies
between two of its operations. Joining the tiles' parts of a reduction, one number a row and tile, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

from ..frontend.dfx.program import DFXProgram
from ..simulator.opcodes.elementwise import ELEMENTWISE
from ..simulator.opcodes.work import Work

_POINTWISE = frozenset(opcode.name for opcode in ELEMENTWISE) | {"fill"}
_REDUCTIONS = frozenset({"sum", "reduce_max", "reduce_min"})
_ROWWISE = frozenset({"softmax"})  # may begin a group: a row is there before the next one comes


@attrs.frozen
class Group:
    """Operations that run as one, by their places in the program, and what they ask for together."""

    members: tuple[int, ...]
    work: Work
    label: str


@attrs.define
class _Open:
    """A group that may grow. mask: a bit for each member. elements: of the result that passes through."""

    members: list[int]
    mask: int
    elements: int


def groups(program: DFXProgram, works: Sequence[Work]) -> list[Group]:
    """The groups of a program, in the order of their first operations; operations that move nothing are in none.

    Args:
        works: of each operation.
    """
    return _Fusing(program, works).groups()


class _Fusing:
    def __init__(self, program: DFXProgram, works: Sequence[Work]) -> None:
        self.program, self.works = program, works
        self._root: dict[str, str] = {}  # a value that is another name of the same bytes -> that value
        self._writer: dict[str, int] = {}
        self._before: list[int] = []  # of each operation, a bit for every operation that it waits for
        self._group: dict[int, _Open] = {}
        self._open: list[_Open] = []
        self._users: dict[str, int] = {}  # value -> a bit for every operation that reads it

    def groups(self) -> list[Group]:
        for index, (op, work) in enumerate(zip(self.program.ops, self.works, strict=True)):
            self._note(index)
            if work.engine == "none":
                for name in op.outputs:
                    self._root[name] = self._of(op.inputs[0]) if op.inputs else name
            else:
                self._place(index)
        return [self._closed(group) for group in self._open]

    def _of(self, name: str) -> str:
        return self._root.get(name, name)

    def _note(self, index: int) -> None:
        op, before = self.program.ops[index], 0
        for name in map(self._of, op.inputs):
            writer = self._writer.get(name)
            before |= 0 if writer is None else self._before[writer] | 1 << writer
            if self.works[index].engine != "none":
                self._users[name] = self._users.get(name, 0) | 1 << index
        self._before.append(before)
        self._writer.update(dict.fromkeys(op.outputs, index))

    def _elements(self, names: Sequence[str]) -> int:
        return math.prod(self.program.tensors[names[0]].shape)

    def _place(self, index: int) -> None:
        """Into the groups that feed it, as one, or into one of them, or into a group of its own."""
        op, size = self.program.ops[index], self._elements(self.program.ops[index].outputs)
        feeding = list(self._feeding(index))
        if op.opcode in _POINTWISE:
            found = [group for group in feeding if group.elements == size]
        elif op.opcode in _REDUCTIONS:
            found = [group for group in feeding if group.elements == self._elements(op.inputs)]
        else:
            found = []
        products = [group for group in found if self._is_product(group)]
        rows = any(self.program.ops[member].opcode in _ROWWISE for group in found for member in group.members)
        tries = [found] if len(found) > 1 and len(products) + rows < 2 else []  # a tile of a product has no whole row
        tries += [[group] for group in (*products, *reversed(found))]
        for chosen in tries:
            mask = 1 << index
            for group in chosen:
                mask |= group.mask
            if self._convex(mask):
                self._join(index, chosen, mask)
                return
        grows = op.opcode in _POINTWISE | _ROWWISE or self._is_head(index)
        group = _Open([index], 1 << index, size if grows else -1)
        self._open.append(group)
        self._group[index] = group

    def _feeding(self, index: int) -> Iterator[_Open]:
        seen: list[_Open] = []
        for name in map(self._of, self.program.ops[index].inputs):
            writer = self._writer.get(name)
            group = None if writer is None else self._group.get(writer)
            if group is not None and not any(group is other for other in seen):
                seen.append(group)
                yield group

    def _is_head(self, index: int) -> bool:
        """Whether it is a product whose result leaves the arrays element by element."""
        work, outputs = self.works[index], self.program.ops[index].outputs
        whole = len(outputs) == 1 and self._elements(outputs) == work.batch * work.M * work.N
        return work.engine == "array" and whole

    def _is_product(self, group: _Open) -> bool:
        return self.works[group.members[0]].engine == "array"

    def _convex(self, mask: int) -> bool:
        for member in _bits(mask):
            for name in map(self._of, self.program.ops[member].inputs):
                writer = self._writer.get(name)
                if writer is not None and not mask >> writer & 1 and self._before[writer] & mask:
                    return False
        return True

    def _join(self, index: int, chosen: list[_Open], mask: int) -> None:
        first = next((group for group in chosen if self._is_product(group)), chosen[0])
        rest = sorted(member for group in chosen if group is not first for member in group.members)
        first.members = [first.members[0], *sorted([*first.members[1:], *rest, index])]
        first.mask = mask
        self._open = [group for group in self._open if group is first or not any(group is other for other in chosen)]
        self._group.update(dict.fromkeys(first.members, first))

    def _closed(self, group: _Open) -> Group:
        members, ops, tensors = tuple(group.members), self.program.ops, self.program.tensors
        head = self.works[members[0]]
        label = "+".join(ops[member].opcode for member in members)
        if len(members) == 1:
            return Group(members, head, label)
        kept = set(map(self._of, self.program.outputs))
        inside = {name for member in members for name in ops[member].outputs}
        written = [name for name in inside if name in kept or self._users.get(name, 0) & ~group.mask]
        rest = members[1:] if head.engine == "array" else members
        read = {name for member in rest for name in map(self._of, ops[member].inputs)} - inside
        writes, reads = (sum(tensors[name].nbytes for name in names) for names in (written, read))
        operations = sum(self.works[member].elements * self.works[member].passes for member in rest)
        if head.engine == "array":
            work = attrs.evolve(head, writes_bytes=writes, epilogue=operations, epilogue_bytes=reads)
        else:
            work = Work(
                engine="vector",
                elements=operations,
                passes=1,
                reads_bytes=reads,
                writes_bytes=writes,
                dtype=head.dtype,
            )
        return Group(members, work, label)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

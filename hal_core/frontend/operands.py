"""The tensors of a call in their one order, and their flat form for autograd and operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..plans import BlockPlan, TilePlan
from ..request import SequenceMetadata

if TYPE_CHECKING:
    from torch import Tensor

GRADS = ("q", "k", "v", "mask")
_NO_TABLES = SequenceMetadata()


class Operands(NamedTuple):
    """query, key, value, mask (4-D or None), plan (None for the device's own), tables of a packed or paged call."""

    query: Any
    key: Any
    value: Any
    mask: Any = None
    plan: BlockPlan | TilePlan | None = None
    tables: SequenceMetadata | None = None

    def flat(self) -> tuple[list[Tensor | None], Any]:
        """The twelve tensors or None, and what is no tensor of the plan: its block sizes, or a tile plan."""
        cut: Any = self.plan
        indices = counts = None
        if isinstance(self.plan, BlockPlan):
            cut, indices, counts = (self.plan.block_q, self.plan.block_k), self.plan.indices, self.plan.counts
        return [*self[:4], indices, counts, *(self.tables or _NO_TABLES)], cut

    @classmethod
    def unflat(cls, tensors: Any, cut: Any) -> Operands:
        """Put `flat`'s parts together again."""
        query, key, value, mask, indices, counts, *tables = tensors
        plan = cut if indices is None else BlockPlan(cut[0], cut[1], indices, counts)
        given = SequenceMetadata(*tables)
        return cls(query, key, value, mask, plan, None if given.count(None) == len(given) else given)


TENSORS = 4 + 2 + len(_NO_TABLES)

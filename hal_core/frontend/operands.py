"""The tensors of a call in their one order, and their flat form for autograd and operators."""

from typing import Any, NamedTuple, Self

from torch import Tensor

from ..plans import BlockPlan, TilePlan
from ..request import SequenceMetadata

GRADS = ("q", "k", "v", "mask")


class Operands(NamedTuple):
    """query, key, value, mask (4-D or None), plan (None for the device's own), tables of a packed or paged call."""

    query: Any
    key: Any
    value: Any
    mask: Any = None
    plan: BlockPlan | TilePlan | None = None
    tables: SequenceMetadata | None = None

    def flat(self) -> tuple[list[Tensor | None], list[Any]]:
        """The twelve tensors or None, and what is no tensor of the plan: two block sizes, or one tile plan or None."""
        *cut, indices, counts = self.plan if isinstance(self.plan, BlockPlan) else (self.plan, None, None)
        return [*self[:4], indices, counts, *(self.tables or SequenceMetadata())], cut

    @classmethod
    def unflat(cls, tensors: Any, cut: Any) -> Self:
        """Put `flat`'s parts together again."""
        query, key, value, mask, indices, counts, *tables = tensors
        plan = cut[0] if indices is None else BlockPlan(cut[0], cut[1], indices, counts)
        given = None if tables.count(None) == len(tables) else SequenceMetadata(*tables)
        return cls(query, key, value, mask, plan, given)


def gradient_bits(query: Any, key: Any, value: Any, mask: Any) -> int:
    """Which operands need gradients: 1 for the query, 2, 4 and 8 for key, value and mask. What is no tensor needs none:
    it is refused later, with a sentence.
    """
    return (
        getattr(query, "requires_grad", False)
        + 2 * getattr(key, "requires_grad", False)
        + 4 * getattr(value, "requires_grad", False)
        + (0 if mask is None else 8 * getattr(mask, "requires_grad", False))
    )

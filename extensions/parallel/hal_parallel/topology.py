"""The ranks that share a sequence: from a mesh or a process group to links; before anything is sent, they compare what
they were given and run one call together, or none does.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hal_core import ContractError

from .exchange import TIMEOUT, Link, named


class Topology(NamedTuple):
    """Ranks in a ring, or in a ring of groups that share heads.

    Attributes:
        ring: ranks among which keys travel. heads: ranks among which heads travel (the second dimension of a 2-D mesh);
            None for a 1-D mesh. kinds: device types whose tensors the ranks can send.
    """

    ring: Link
    heads: Link | None
    kinds: frozenset[str]

    @property
    def links(self) -> list[Link]:
        """Innermost first: gathering over one after the other reaches every rank, in the order of ranks."""
        return [self.ring] if self.heads is None else [self.heads, self.ring]

    @property
    def shape(self) -> tuple[int, ...]:
        """(ranks,) or (ring, heads)."""
        return tuple(link.size for link in reversed(self.links))

    @property
    def world(self) -> int:
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """This rank's number among those that share the sequence: tokens are laid out in this order."""
        return self.ring.rank if self.heads is None else self.ring.rank * self.heads.size + self.heads.rank

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """[world, *shape]: every rank's tensor, in the order of ranks."""
        shape = tensor.shape
        for link in self.links:
            tensor = link.all_gather(tensor, what)
        return tensor.reshape(-1, *shape)

    @property
    def names(self) -> list[int]:
        """Global ranks, in the order of ranks. Of a 2-D mesh the numbers within the mesh."""
        return self.ring.ranks if self.heads is None else list(range(self.world))


def topology_of(mesh: Any, timeout: float | None = None) -> Topology | None:
    """The links of a DeviceMesh, a process group, or None for the default group; None without any group.

    Raises:
        ContractError: neither of them, a mesh of more than two dimensions, or a time-out that is not positive.
    """
    seconds = TIMEOUT if timeout is None else timeout
    if not isinstance(seconds, int | float) or not seconds > 0:
        raise ContractError(f"timeout {timeout!r} was given: pass seconds, more than 0")
    if not dist.is_available() or not dist.is_initialized():
        if mesh is not None:
            raise ContractError(
                f"a {type(mesh).__name__} was given, and there is no process group: call "
                "torch.distributed.init_process_group first, or leave mesh out for one device"
            )
        return None
    if mesh is None:
        groups: list[Any] = [dist.group.WORLD]
    elif isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2:
            raise ContractError(
                f"a mesh of {mesh.ndim} dimensions {mesh.mesh_dim_names} was given: pass the one or two over which the "
                'sequence is cut, mesh["ring"] or mesh["ring", "heads"]'
            )
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    elif isinstance(mesh, dist.ProcessGroup):
        groups = [mesh]
    else:
        raise ContractError(f"a {type(mesh).__name__} was given as mesh: pass a DeviceMesh, a process group or None")
    kinds = frozenset(device.type for device in groups[0]._device_types)
    if isinstance(mesh, DeviceMesh):
        kinds &= {mesh.device_type}
    kind = "cpu" if "cpu" in kinds else min(kinds)
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    links = [Link(group, float(seconds), device) for group in groups]
    return Topology(links[0], links[1] if len(links) > 1 else None, kinds)


_TEXT = 4096  # bytes of a rank's own words
_WHAT = "comparing what the ranks were given"


def agree(
    topology: Topology, facts: Mapping[str, Any], error: Exception | None, numbers: Sequence[int] = ()
) -> list[int]:
    """Compare `facts` over the ranks.

    Args:
        facts: what has to be equal on all ranks, by name. error: why this rank cannot run the call, or None.
        numbers: whole numbers below 2**63 that may differ.

    Returns:
        The numbers of the first rank.

    Raises:
        Exception: `error`, on its rank. ContractError: facts differ, or another rank has an error; on all ranks, with
            the ranks named.
    """
    words = str(error) if error is not None else "\n".join(f"{name}\t{value}" for name, value in facts.items())
    data = words.encode()
    digest = hashlib.sha256(data).digest()
    halves = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8)]
    device = topology.ring.device
    own = torch.tensor([int(error is not None), *halves, *numbers], dtype=torch.int64, device=device)
    seen = topology.all_gather(own, _WHAT).tolist()
    if all(row[:3] == [0, *halves] for row in seen):
        return [int(number) for number in seen[0][3:]]
    text = torch.tensor(list(data[:_TEXT].ljust(_TEXT, b"\0")), dtype=torch.uint8, device=device)
    rows = topology.all_gather(text, _WHAT).tolist()
    if error is not None:
        raise error
    said = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    raise ContractError(_difference(said, [row[0] for row in seen], topology.names))


def _difference(said: list[str], failed: list[int], names: list[int]) -> str:
    """One sentence about what the ranks do not agree on."""
    wrong = [(names[i], text) for i, text in enumerate(said) if failed[i]]
    if wrong:
        return f"{named([rank for rank, _ in wrong])} refused this call, so no rank runs it: {wrong[0][1]}"
    parts, tables = [], [dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line) for text in said]
    for field in tables[0]:
        holders: dict[str, list[int]] = {}
        for rank, facts in zip(names, tables, strict=True):
            holders.setdefault(str(facts.get(field)), []).append(rank)
        if len(holders) > 1:
            parts.append(f"{field} {', '.join(f'{value} on {named(ranks)}' for value, ranks in holders.items())}")
    return f"the ranks were given different calls: {'; '.join(parts)}: give all ranks the same. Nothing was sent"

"""Before anything is sent, the ranks compare what they were given: they run one call together, or none does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hal_core import ContractError

from .exchange import named
from .topology import Topology

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
    words = json.dumps({name: str(value) for name, value in facts.items()} if error is None else str(error))
    digest = hashlib.sha256(words.encode()).digest()
    halves = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8)]
    device = topology.ring.device
    own = torch.tensor([int(error is not None), *halves, *numbers], dtype=torch.int64, device=device)
    seen = topology.all_gather(own, _WHAT).tolist()
    if all(row[:3] == [0, *halves] for row in seen):
        return list(map(int, seen[0][3:]))
    data = words.encode()[:_TEXT]
    text = torch.zeros(_TEXT, dtype=torch.uint8, device=device)
    text[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device=device)
    said = [
        bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in topology.all_gather(text, _WHAT).cpu()
    ]
    if error is not None:
        raise error
    raise ContractError(_difference([_read(text) for text in said], [row[0] for row in seen], topology.names))


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # cut off
        return text


def _difference(said: list[Any], failed: list[int], names: list[int]) -> str:
    """One sentence about what the ranks do not agree on."""
    wrong = [(names[i], text) for i, text in enumerate(said) if failed[i]]
    if wrong:
        return f"{named([rank for rank, _ in wrong])} refused this call, so no rank runs it: {wrong[0][1]}"
    parts = []
    for field in said[0]:
        holders: dict[str, list[int]] = {}
        for rank, facts in zip(names, said, strict=True):
            holders.setdefault(str(facts.get(field)), []).append(rank)
        if len(holders) > 1:
            parts.append(f"{field} {', '.join(f'{value} on {named(ranks)}' for value, ranks in holders.items())}")
    return f"the ranks were given different calls: {'; '.join(parts)}: give all ranks the same. Nothing was sent"

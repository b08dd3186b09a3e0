"""Pages of DRAM: which ones a transfer visits, in which order, and in which banks they lie."""

from __future__ import annotations

import functools


def bank_of(page: int, banks: int) -> int:
    """Bank of a page among the banks of its group.

    Pages go round the banks, each round turned by one against the round before (as Zhang, Zhu & Zhang 2000), so that no
    power-of-two pitch stays in one bank.
    """
    return (page + page // banks + page // (banks * banks)) % banks


@functools.lru_cache(maxsize=4096)
def page_visits(
    offset: int, row_bytes: int, rows: int, pitch: int, page: int, burst: int
) -> tuple[tuple[int, int], ...]:
    """(page after the first, bursts) of a place that begins `offset` bytes into a page, in order, neighbours merged."""
    visits: list[list[int]] = []
    for row in range(rows):
        at, left = offset + row * pitch, row_bytes
        while left > 0:
            here = min(left, page - at % page)
            bursts = -(-(at % burst + here) // burst)
            if visits and visits[-1][0] == at // page:
                visits[-1][1] += bursts
            else:
                visits.append([at // page, bursts])
            at, left = at + here, left - here
    return tuple((number, bursts) for number, bursts in visits)


@functools.lru_cache(maxsize=4096)
def burst_order(
    places: tuple[tuple[int, int, int, int], ...], page: int, burst: int
) -> tuple[tuple[int, int, int], ...]:
    """(transfer, page after its first, bursts) of a group: always the transfer with the fewest bursts so far, 4 at a
    time.

    places: (offset in the page, row_bytes, rows, pitch) of each transfer.
    """
    visits = [page_visits(*place, page, burst) for place in places]
    if len(visits) == 1:
        return tuple((0, number, bursts) for number, bursts in visits[0])
    order: list[tuple[int, int, int]] = []
    served, at = [0] * len(visits), [0] * len(visits)
    left = [v[0][1] if v else 0 for v in visits]
    going = [which for which, v in enumerate(visits) if v]
    while going:
        which = min(going, key=lambda w: (served[w], w))
        now = min(left[which], 4)
        order.append((which, visits[which][at[which]][0], now))
        served[which] += now
        left[which] -= now
        if not left[which]:
            at[which] += 1
            if at[which] < len(visits[which]):
                left[which] = visits[which][at[which]][1]
            else:
                going.remove(which)
    return tuple(order)

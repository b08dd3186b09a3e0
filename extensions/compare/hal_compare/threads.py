"""How long torch's threads spin for each other while another process has their processor."""

from __future__ import annotations

import os

#: Turns of the waiting loop, about 50 us: what GNU's OpenMP takes itself where it knows that there are more threads
#: than processors. It does not know of other processes, and its default of 300,000 turns is spent at every one of a
#: simulator's thousands of small operations while the other thread waits for a processor.
SPINS = "1000"


def spin_briefly() -> None:
    """Have torch's threads wait without spinning for long, unless the user said how they wait.

    OpenMP reads it when torch is first imported: later calls change nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

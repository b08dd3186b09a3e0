"""Four ranks that all tests of this folder share: starting processes takes longer than most cases."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed")
WORLD = 4
HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    place: dict[str, object] = {
        "HAL_PLUGINS": "cpu,opencl,kpu,photonic_lightmatter,luminous,parallel"
    }  # the others take time to find
    place |= {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, **{name: str(value) for name, value in place.items()}}


class Ranks:
    """Processes of one gloo group. A call runs on every rank of a world of 1, 2 or 4, or on the 2 x 2 mesh.

    Args:
        settings: environment variables of the processes.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []

    def _start(self) -> None:
        port = free_port()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(HERE / "rank.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment(rank, WORLD, port) | self._settings,
            )
            for rank in range(WORLD)
        ]

    def run(self, name: str, world: int | str, **arguments: Any) -> list[Any]:
        """What the function `name` of rank.py returned on each rank."""
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            pickle.dump((name, world, arguments), process.stdin)
            process.stdin.flush()
        answers = [pickle.load(process.stdout) for process in self._processes]  # type: ignore[arg-type]
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        if failed:
            self.close()  # the ranks may wait for each other
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers][: world if isinstance(world, int) else WORLD]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._processes = []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.close()


@pytest.fixture
def mapped_ranks() -> Iterator[Ranks]:
    """Ranks whose C library maps every tensor for itself: what is freed leaves the resident set at once, so its peak is
    that of what is held.
    """
    found = Ranks(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_TOP_PAD_="0")
    yield found
    found.close()

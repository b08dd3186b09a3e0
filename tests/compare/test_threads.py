"""Threads of torch that wait for each other do not spin a simulator's time away."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hal_compare.threads import SPINS, spin_briefly

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("set_before", "wanted"),
    [
        ({}, {"GOMP_SPINCOUNT": SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_user_said_of_waiting_stays(
    set_before: dict[str, str], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    spin_briefly()
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert found == wanted


@pytest.mark.parametrize("words", [["compare", "x"], ["sweep", "x"], ["sensitivity", "x", "--layers"]])
def test_it_is_said_before_torch_is_imported(words: list[str]) -> None:
    """OpenMP reads it when torch is imported."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        "            print('spins', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import hal_cli; hal_cli.main({words!r})\n"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == f"spins {SPINS}\n", done.stderr

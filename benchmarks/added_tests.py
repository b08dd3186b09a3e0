"""Run the tests that folders have and a commit did not, to measure what they add to `make test`.

    time python benchmarks/added_tests.py COMMIT tests/kpu tests/compare [pytest's options]

Tests are told apart by their function's name in the folder; the conformance kit's are left out. The processor time that
the shell prints is the answer, imports included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import PurePosixPath

import pytest

if len(sys.argv) < 3:
    sys.exit(__doc__)
COMMIT, *ARGUMENTS = sys.argv[1:]


def said(*command: str) -> str:
    return subprocess.run(("git", *command), capture_output=True, text=True, check=True).stdout


@cache
def known(folder: str) -> frozenset[str]:
    """Names of the test functions below a folder at the commit."""
    files = [
        name for name in said("ls-tree", "-r", "--name-only", COMMIT, f"{folder}/").split() if name.endswith(".py")
    ]
    trees = [ast.parse(said("show", f"{COMMIT}:{name}")) for name in files]
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


class Added:
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def new(item: pytest.Item) -> bool:
            place, name = PurePosixPath(item.nodeid.partition("::")[0]), getattr(item, "originalname", item.name)
            return name != "test_conformance" and name not in known("/".join(place.parts[:2]))

        config.hook.pytest_deselected(items=[item for item in items if not new(item)])
        items[:] = [item for item in items if new(item)]


if __name__ == "__main__":
    sys.exit(pytest.main([*ARGUMENTS, "-m", "not slow", "-q"], plugins=[Added()]))

"""The test run itself: a test's data do not depend on how tests are spread over processes."""

from __future__ import annotations

import os
import zlib

import pytest


@pytest.mark.xdist_group("seeds")
def test_the_seed_is_that_of_the_name_without_its_group(seed, request):
    name = "tests/integration/test_workers.py::test_the_seed_is_that_of_the_name_without_its_group"
    assert request.node.nodeid.startswith(name)
    assert seed == zlib.crc32(name.encode())


def test_a_worker_computes_in_one_thread():
    torch = pytest.importorskip("torch")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("only workers of pytest-xdist are limited")
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])

"""The plugin template is what a device's author copies: installed into a fresh environment, it is found there and
conformant.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys

import distributions as tree
import pytest

TEMPLATE = tree.ROOT / "examples" / "plugin_template"
FILES = sorted(TEMPLATE.glob("hal_template/*.py"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """hal(*arguments): the command in a new environment that has the template; core and command line are borrowed."""
    folder = tmp_path_factory.mktemp("fresh")
    source = folder / "template"
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    python, packages = tree.fresh_environment(folder / "fresh", source)
    borrowed = [tree.ROOT, tree.ROOT / "extensions" / "cli"]
    (packages / "core.pth").write_text("\n".join(map(str, borrowed)) + "\n", encoding="utf-8")
    environment = {**os.environ, "HAL_CACHE": str(folder / "cache"), "HAL_PLUGINS": "template"}

    def hal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "hal_core", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)

    return hal


def passes(hal, *options: str) -> None:
    done = hal("conformance", "template:0", "--json", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["passed"] is True


def test_has_at_most_120_lines():
    files = [*FILES, TEMPLATE / "pyproject.toml"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 120


def test_imports_the_plugin_api_alone():
    """Of this project the template imports `hal_core.plugin_api` and itself, and nothing that is not public there."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("hal_")]
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("hal_"):
                names = [alias.name for alias in node.names]
                assert node.module == "hal_core.plugin_api" or (node.module, names) == ("hal_core", ["plugin_api"])


@pytest.fixture
def registered(monkeypatch):
    """The template's backend registered in this process, as examples/register_at_run_time.py does."""
    import hal_core as hal

    monkeypatch.syspath_prepend(str(TEMPLATE))
    hal.register(hal.BackendSpec(name="template", target="hal_template.backend:TemplateBackend"))
    yield hal
    hal.unregister("template")


def equal_tiles(block_q: int, block_k: int, len_q: int, len_k: int) -> set[tuple[int, int, int, int]]:
    """(q_start, q_stop, k_start, k_stop) of equal blocks over all pairs."""
    rows = [(q, min(q + block_q, len_q)) for q in range(0, len_q, block_q)]
    keys = [(k, min(k + block_k, len_k)) for k in range(0, len_k, block_k)]
    return {(*q, *k) for q in rows for k in keys}


@pytest.mark.parametrize("sizes", [None, (16, 24), (128, 1)])
@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
def test_follows_its_own_tiling_and_one_that_the_caller_brings(registered, seed, sizes, causal, monkeypatch):
    torch = pytest.importorskip("torch")
    session = registered.session("template:0")
    from hal_core.testing import reference, relative_error

    tiles, inner = set(), session._tile
    monkeypatch.setattr(session, "_tile", lambda plan, tile, *rest: (tiles.add(tile[:4]), inner(plan, tile, *rest)))

    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 70, 32, generator=generator)
    key, value = torch.randn(2, 2, 2, 90, 32, generator=generator).unbind(0)
    tiling = registered.DenseTiling(*sizes) if sizes else None
    call = {"causal": causal, "enable_gqa": True, "backend": "template", "tiling": tiling}
    out, lse = registered.attention(query, key, value, return_lse=True, **call)
    want = reference(query, key, value, causal=causal)
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse, want.lse) <= 1e-5
    expected = {"none": equal_tiles(*(sizes or (128, 128)), 70, 90)}.get(causal)
    assert expected is None or tiles == expected
    if sizes:
        assert f"tiles of {sizes[0]} x {sizes[1]}" in str(registered.explain(query, key, value, **call))


def test_scratch_memory_is_used_again(registered):
    torch = pytest.importorskip("torch")

    query = torch.zeros(1, 2, 300, 32)
    before = registered.memory("template:0").stats()
    for _ in range(3):
        registered.attention(query, query, query, backend="template")
    after = registered.memory("template:0").stats()
    assert after.reuses - before.reuses >= 2
    assert after.in_use == before.in_use


def test_refuses_a_tiling_with_blocks_that_it_does_not_claim(registered):
    torch = pytest.importorskip("torch")

    query = torch.zeros(1, 1, 8, 32)
    with pytest.raises(registered.UnsupportedError, match="tiles of 1 to 128"):
        registered.attention(query, query, query, backend="template", tiling=registered.DenseTiling(256))


@pytest.mark.xdist_group("template")
def test_is_discovered(fresh):
    done = fresh("devices", "--json")
    assert done.returncode == 0, done.stderr
    assert [device["id"] for device in json.loads(done.stdout)] == ["template:0"]


@pytest.mark.xdist_group("template")
def test_passes_the_quick_conformance_kit(fresh):
    passes(fresh, "--quick")


@pytest.mark.slow
@pytest.mark.xdist_group("template")
def test_passes_the_whole_conformance_kit(fresh):
    passes(fresh)


@pytest.mark.parametrize("example", ["simple_device.py", "register_at_run_time.py"])
def test_examples_run(example, tmp_path):
    environment = {**os.environ, "HAL_CACHE": str(tmp_path)}
    command = [sys.executable, str(tree.ROOT / "examples" / example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

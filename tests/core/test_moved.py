"""Old module names import for one minor version, say where the names are now, and hide no function of their name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

#: Old module: names that were imported from it.
OLD = {
    "attention": ("attention", "bind", "explain"),
    "capabilities": ("Capabilities", "Choice", "Code", "FEATURES", "Numerics", "Range", "Refusal", "listing"),
    "context": ("configure", "meter", "meter_var", "prefer", "use", "Meter", "MeterRecord"),
    "contract": ("check_tables",),
    "device": ("Basis", "Device", "Estimate", "Fidelity", "Provenance", "Quantity"),
    "kernels": ("KernelSpec", "kernel", "resolve"),
    "library": ("in_graph", "define"),
    "memory": ("Buffer", "MemoryStats", "PooledMemory"),
    "route": ("exact", "moved_to"),
    "tiling": ("BlockPlan", "DenseTiling", "Tile", "TilePlan", "dense_mask", "expand_block_plan", "merge_partials"),
}


@pytest.mark.parametrize("module", OLD)
def test_an_old_module_gives_its_names_and_says_where_they_are(module: str) -> None:
    old = importlib.import_module(f"hal_core.{module}")
    for name in OLD[module]:
        with pytest.warns(DeprecationWarning, match=rf"hal_core\.{module}\.{name} has moved: use hal_"):
            found = getattr(old, name)
        assert found is not None
    with pytest.raises(AttributeError):
        _ = old.never_there


@pytest.mark.parametrize("name", ["capabilities", "device", "memory", "kernel", "attention"])
def test_a_function_keeps_its_name_after_the_old_module_was_imported(name: str) -> None:
    code = f"import hal_core.{name if name != 'kernel' else 'kernels'}, hal_core\nassert callable(hal_core.{name})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_old_name_of_the_tables_is_the_new_class() -> None:
    import hal_core

    with pytest.warns(DeprecationWarning, match="use hal_core.SequenceMetadata"):
        assert hal_core.SequenceTables is hal_core.SequenceMetadata

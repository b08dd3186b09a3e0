"""`hal_nn.compare` is `hal_compare` now: the old names give the new modules, and say so."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("from hal_nn.compare import texts as old", "texts"),
        ("import hal_nn.compare.texts as old", "texts"),
        ("import hal_nn.compare; from hal_nn.compare import texts as old", "texts"),
        ("import importlib; old = importlib.import_module('hal_nn.compare.figures')", "figures"),
        ("import hal_compare.texts; import hal_nn.compare.texts as old", "texts"),
    ],
)
def test_the_old_module_is_the_new_one(old, name):
    done = python(
        f"{old}\nimport hal_compare.{name} as new\nassert old is new\n"
        f"assert new.__name__ == new.__spec__.name == 'hal_compare.{name}', new.__spec__"
    )
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning: hal_nn.compare is now hal_compare" in done.stderr
    if "import_module" not in old:
        assert "<string>:1: " in done.stderr, "the warning does not name the line that imports"


def test_names_that_were_never_there_are_not_there():
    done = python(
        "import hal_nn.compare\n"
        "try:\n    import hal_nn.compare.nothing\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    assert "hal_nn.compare.nothing" in done.stdout, done.stderr


def test_hal_nn_alone_neither_warns_nor_needs_hal_compare():
    done = python("import sys; import hal_nn; sys.exit('hal_compare' in sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_hal_compare_the_old_name_says_what_to_install():
    code = (
        "import sys; sys.modules['hal_compare'] = None\n"
        "try:\n    import hal_nn.compare\nexcept ImportError as error: print(error)"
    )
    done = python(code)
    assert "pip install hal-compare" in done.stdout, done.stderr

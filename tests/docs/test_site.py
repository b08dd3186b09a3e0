"""The documentation site: every page has a place in the navigation, and the reference has every public name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
specification = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "_site" / "pages.py")
pages: Any = importlib.util.module_from_spec(specification)
specification.loader.exec_module(pages)


def places(entry: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [page for inner in entries for page in places(inner)]


def test_every_page_has_one_place_in_the_navigation():
    docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    wanted = docs | set(pages.sources().values())
    found = places(SETTINGS["nav"])
    assert sorted(found) == sorted(set(found))
    assert wanted - set(found) == set(), "add to nav in mkdocs.yml"
    assert set(found) - wanted == set(), "nav in mkdocs.yml names pages that are gone"


def test_every_distribution_has_a_page_and_is_read_for_the_reference():
    folders = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*/pyproject.toml")} - {
        "examples/plugin_template"
    }
    assert {f"{folder}/README.md" for folder in folders} <= set(pages.sources())
    (handler,) = (plugin["mkdocstrings"] for plugin in SETTINGS["plugins"] if "mkdocstrings" in plugin)
    assert set(handler["handlers"]["python"]["paths"]) == {".", *folders}


@pytest.mark.parametrize("module", ["hal_core", "hal_core.plugin_api", "hal_core.testing", "hal_nn"])
def test_the_reference_has_a_page_of_every_public_module(module):
    shown = {
        name for page in (ROOT / "docs" / "api").glob("*.md") for name, _ in pages.PUBLIC.findall(page.read_text())
    }
    assert module in shown


def test_links_of_a_readme_lead_to_pages_of_the_site():
    from types import SimpleNamespace

    known = {"guide.md", "devices/cpu.md"}
    files = SimpleNamespace(get_file_from_path=lambda uri: uri if uri in known else None)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="devices/cpu.md"))
    text = "[a](../../docs/guide.md#cost) [b](README.md) [c](pyproject.toml) [d](https://example.org) [e](nowhere.md)"
    shown = pages.on_page_markdown(text, page, None, files)
    assert shown == "[a](../guide.md#cost) [b](cpu.md) c [d](https://example.org) [e](nowhere.md)"


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/plugins.md"])
def test_names_in_a_page_are_names_of_the_code(page):
    import hal_core

    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./])hal\.(\w+)", text)) - {"plugins"}  # the entry-point group "hal.plugins"
    assert [name for name in sorted(named) if not hasattr(hal_core, name)] == []
    source = "".join(
        path.read_text(encoding="utf-8") for path in ROOT.glob("[!.]*/**/*.py") if "tests" not in path.parts
    )
    variables = set(re.findall(r"HAL_[A-Z]+", text))
    assert [name for name in sorted(variables) if name not in source] == []


def test_the_guide_says_what_each_name_of_hal_nn_is_for():
    import hal_nn

    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert [name for name in hal_nn.__all__ if f"`{name}`" not in text] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    outside = re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="(https?://[^"]+)"', index)
    assert outside == [], "the site fetches nothing"
    reference = (tmp_path / "site" / "api" / "hal_core.html").read_text(encoding="utf-8")
    assert 'id="hal_core.' in reference
    import hal_core

    missing = [name for name in hal_core.__all__ if not re.search(rf"\b{name}\b", reference)]
    assert not missing

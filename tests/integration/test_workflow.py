"""The checks that run elsewhere are those that run here: the workflow, the pre-commit hooks and .ci/run agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
JOB = WORKFLOW["jobs"]["test"]
VERSIONS = JOB["strategy"]["matrix"]["python"]


def makefile_recipe(target: str) -> str:
    """The lines below `target:` in the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    return found[1]


def test_the_workflow_runs_the_command_of_ci_run():
    (command,) = re.findall(r"^exec (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert command in [step.get("run") for step in JOB["steps"]]


def test_the_workflow_runs_on_every_version_of_python_that_is_supported():
    assert VERSIONS == ["3.11", "3.12", "3.13"]
    (setup,) = [step for step in JOB["steps"] if step.get("uses", "").startswith("actions/setup-python@")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={VERSIONS[0]}"


def test_it_runs_on_pushes_and_proposals():
    triggers = WORKFLOW[True]  # YAML reads the key "on" as a truth value
    assert set(triggers) == {"push", "pull_request"}


def test_contributing_names_the_versions_that_did_not_run():
    (sentence,) = re.findall(
        r"on Python ([^;]*?)they have\s+not been run", (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    )
    (ran,) = re.findall(r"tests were run on Python (3\.\d+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert set(re.findall(r"3\.\d+", sentence)) == set(VERSIONS) - {ran}


def test_pre_commit_runs_the_linters_of_make_lint():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in settings["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in settings["repos"]} == {"local"}
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "mypy"}
    assert all(hook["language"] == "system" for hook in hooks)
    recipe = makefile_recipe("lint")
    for tool in ("ruff check", "ruff format", "mypy"):
        assert f"-m {tool}" in recipe
        assert any(f"-m {tool}" in hook["entry"] for hook in hooks)


def test_the_linters_leave_nothing_out():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert not {"exclude", "extend-exclude"} & (set(ruff) | set(ruff["lint"]) | set(ruff.get("format", {})))
    assert "pycodestyle" not in ruff["lint"]

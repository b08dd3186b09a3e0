"""A hook of mkdocs: pages whose source lies outside docs/, and links between files of the repository.

README.md becomes the index, and the README of each distribution a page under devices/, libraries/ or extensions/. A
link that is right in the repository is rewritten to the page that its target became; where the target is no page, as
with a script, its text remains without a link.

A line "[[public MODULE]]" becomes the reference of every public name of the module, by kind. With "[[public MODULE
beside OTHER]]", names that OTHER has too are linked and not described again.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"plugins": "devices", "libs": "libraries", "extensions": "extensions"}
#: Pages that are a tab of their own: a navigation of one line would only narrow them.
WITHOUT_SIDEBAR = {"index.md", "guide.md", "plugins.md"}
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
PUBLIC = re.compile(r"^\[\[public ([\w.]+)(?: beside ([\w.]+))?\]\]$", re.MULTILINE)


def public_names(module: Any) -> list[str]:
    """`__all__`; of a module without it, what it imports for type checkers alone, as a module of lazy names does."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    tree = ast.parse(inspect.getsource(module))
    checking = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [line for node in checking for line in node.body if isinstance(line, ast.ImportFrom)]
    named = {alias.asname or alias.name for line in imports for alias in line.names}
    if "*" in named:  # all of its package's
        named = named - {"*"} | set(public_names(importlib.import_module(module.__package__)))
    return sorted(named)


def kind(value: Any) -> str:
    if not getattr(value, "__module__", "").startswith(
        "hal_"
    ):  # a number, a module, an alias of another library's type
        return "Constants and modules"
    if inspect.isclass(value):
        return "Errors" if issubclass(value, BaseException) else "Types"
    return "Functions" if hasattr(value, "__qualname__") else "Constants and modules"


def described(value: Any) -> str:
    """A constant, in a line of a table: a module by its first sentence, another by its value."""
    if inspect.ismodule(value):
        return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    text = ", ".join(map(str, sorted(value))) if isinstance(value, frozenset) else repr(value)
    return f"`{text}`" if len(text) < 400 and " at 0x" not in text else f"of type `{type(value).__name__}`"


def path(value: Any) -> str:
    """Where a function or class is defined, as a dotted path: what a static reader of the source finds."""
    value = getattr(value, "__func__", value)  # a method of the registry that is public as a function
    return f"{value.__module__}.{value.__qualname__}"


def reference(match: re.Match[str]) -> str:
    """The names of a module as directives of mkdocstrings, below a heading for each kind."""
    name, other = match[1], match[2]
    module = importlib.import_module(name)
    elsewhere = importlib.import_module(other) if other else None
    shared = {name: getattr(elsewhere, name) for name in public_names(elsewhere)} if other else {}
    described_there = {path(value) for value in shared.values() if kind(value) != "Constants and modules"}
    sections: dict[str, list[str]] = {}
    links = []
    for public in public_names(module):
        value = getattr(module, public)
        constant = kind(value) == "Constants and modules"
        if public in shared or (not constant and path(value) in described_there):  # there by another name
            links.append(f"`{public}`" if constant else f"[`{public}`][{path(value)}]")
        else:
            line = f"| `{public}` | {described(value)} |" if constant else f"::: {path(value)}"
            sections.setdefault(kind(value), []).append(line)
    text = f"These names are described on the page of `{other}`: {', '.join(links)}.\n\n" if links else ""
    for heading in ("Functions", "Types", "Errors"):
        if heading in sections:
            text += f"## {heading}\n\n" + "\n\n".join(sections[heading]) + "\n\n"
    if "Constants and modules" in sections:
        table = "\n".join(["| name | |", "|---|---|", *sections["Constants and modules"]])
        text += f"## Constants and modules\n\n{table}\n"
    return text


def sources() -> dict[str, str]:
    """{file of the repository: page of the site} for the pages whose source is not in docs/."""
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    for folder, section in SECTIONS.items():
        for readme in sorted(ROOT.glob(f"{folder}/*/README.md")):
            pages[readme.relative_to(ROOT).as_posix()] = f"{section}/{readme.parent.name}.md"
    return pages


def on_files(files: Files, config: Any) -> Files:
    for source, page in sources().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri in WITHOUT_SIDEBAR:
        page.meta.setdefault("hide", ["navigation"])
    elsewhere = sources()
    back = {target: source for source, target in elsewhere.items()}
    here = page.file.src_uri
    folder = (ROOT / back.get(here, f"docs/{here}")).parent

    def rewrite(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(folder / target))
        if not path.is_relative_to(ROOT) or not path.exists():
            return link[0]  # mkdocs reports it
        name = path.relative_to(ROOT).as_posix()
        uri = elsewhere.get(name, name.removeprefix("docs/") if name.startswith("docs/") else "")
        if not uri or files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({os.path.relpath(uri, os.path.dirname(here) or '.')}{anchor})"

    return PUBLIC.sub(reference, LINK.sub(rewrite, markdown))

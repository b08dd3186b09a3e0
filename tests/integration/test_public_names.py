"""The public names that are promised, in `public_names.json`: those that are "here" import with their signature, and
none that is said to come "later" is there already.

A name may be an attribute of a class, as `Tensor.numel()`. A signature names the arguments that users pass: the
callable takes them in this order, with these defaults where one is given; it may take more, if they have defaults.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

PROMISED = json.loads(Path(__file__).with_name("public_names.json").read_text(encoding="utf-8"))
NAMES = [(package, text, state) for package, names in PROMISED["names"].items() for text, state in names.items()]
HERE = [(package, text) for package, text, state in NAMES if state == "here"]
LATER = [(package, text) for package, text, state in NAMES if state == "later"]


def find(package: str, text: str) -> Any:
    """The object of a promised name. Raises ImportError or AttributeError where it is not there."""
    found: Any = importlib.import_module(package)
    for part in text.partition("(")[0].split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            if not isinstance(found, type) or part not in fields(found):
                raise
            found = None  # an attribute of instances
    return found


def fields(kind: type) -> set[str]:
    """Names that instances have: annotated, or set by their methods."""
    named = {name for one in kind.__mro__ for name in getattr(one, "__annotations__", {})}
    tree = ast.parse(inspect.cleandoc(inspect.getsource(kind)))
    return named | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def mismatch(found: Any, text: str) -> str:
    """Where a callable differs from a promised signature; "" if it does not, or none is promised."""
    if "(" not in text:
        return ""
    wanted = promised_arguments(text[text.index("(") :])
    given = list(signature_of(found).parameters.values())
    if inspect.isfunction(found) and given and given[0].name == "self":
        del given[0]
    if any(one.kind is one.VAR_POSITIONAL for one in given) and all(one[2] == "*" for one in wanted):
        return ""
    for place, (name, default, kind) in enumerate(wanted):
        if kind == "*":
            return f"takes no *{name}"
        matching = [one for one in given if one.name == name]
        if not matching:
            return f"takes no {name}: {signature_of(found)}"
        if kind == "positional" and [one.name for one in given].index(name) != place:
            return f"takes {name} at another place: {signature_of(found)}"
        if default is not None and matching[0].default != ast.literal_eval(default):
            return f"has another default of {name}: {signature_of(found)}"
    named = {name for name, _, _ in wanted}
    if more := [
        one.name
        for one in given
        if one.name not in named and one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]:
        return f"needs {', '.join(more)} besides"
    return ""


def signature_of(found: Any) -> inspect.Signature:
    """A callable's signature; of a class that passes everything on, that of the class that takes it."""
    signature = inspect.signature(found)
    kinds = [one.kind for one in signature.parameters.values()]
    if not isinstance(found, type) or kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return signature
    inits = [one for one in found.__mro__ if "__init__" in vars(one)]
    return inspect.signature(inits[1])


def promised_arguments(signature: str) -> list[tuple[str, str | None, str]]:
    """(name, default as source, kind) of each argument of a signature. One without a default may have any."""
    listed, kind = [], "positional"
    for part in filter(None, (part.strip() for part in signature[1:-1].split(","))):
        if part == "*":
            kind = "named"
            continue
        name, _, default = part.partition("=")
        listed.append((name.lstrip("*"), default or None, "*" if part.startswith("*") else kind))
    return listed


@pytest.mark.parametrize(("package", "text"), HERE, ids=lambda one: one)
def test_a_promised_name_imports_with_its_signature(package: str, text: str) -> None:
    found = find(package, text)
    assert not mismatch(found, text)


@pytest.mark.parametrize(("package", "text"), LATER, ids=lambda one: one)
def test_a_name_of_a_later_round_is_not_there_yet(package: str, text: str) -> None:
    """One that is there belongs among those that are here: mark it so in the file."""
    try:
        find(package, text)
    except (ImportError, AttributeError):
        return
    pytest.fail(f"{package} has {text}: write 'here' in public_names.json")


@pytest.mark.parametrize("name", PROMISED["torch.compile backends"])
def test_a_promised_compile_backend_is_registered(name: str) -> None:
    import hal_kpu
    import torch

    hal_kpu.register_kpu_backend()
    assert name in torch._dynamo.list_backends(exclude_tags=())


def test_the_walk_sees_a_wrong_signature() -> None:
    def given(a: int, b: int = 2, *, c: int = 3) -> None: ...

    def needs_more(a: int, z: int) -> None: ...

    assert not mismatch(given, "given(a, b=2)")
    assert not mismatch(given, "given(a, *, c=3)")
    assert "takes no d" in mismatch(given, "given(a, d)")
    assert "another default of b" in mismatch(given, "given(a, b=1)")
    assert "another place" in mismatch(given, "given(b, a)")
    assert "needs z" in mismatch(needs_more, "needs_more(a)")
    assert "takes no *rest" in mismatch(given, "given(*rest)")
    with pytest.raises(AttributeError):
        find("hal_core", "NoSuchName")

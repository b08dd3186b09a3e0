"""The house's rules, read off the code: layers, no import cycle, what a plugin may import, and one name for each
role.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: The core's layers, lowest first: each imports itself and those before it.
LAYERS = {
    "contract": (
        [
            "version",
            "errors",
            "request",
            "buffers",
            "plans",
            "device_info",
            "capability",
            "decision",
            "protocols",
            "hooks",
        ],
        "what a device is, what it can do, what was decided",
    ),
    "toolkit": (["toolkit"], "what plugins build on, on the contract alone"),
    "registry": (
        ["access", "plugins", "registry", "selection", "options", "calibration"],
        "which plugins and devices there are, and which one runs a call",
    ),
    "front end": (["frontend"], "from a call to a device and back"),
    "public": (["__init__", "plugin_api", "testing", "_moved", "__main__"], "what is imported from outside"),
}

#: Top-level names in a device plugin's package, and what each holds.
ROLES = {
    "__init__.py": "the hooks and lazy public names",
    "backend.py": "devices, capabilities, check, estimate, open",
    "discovery.py": "which devices are there, and why not",
    "session.py": "prepare, compute, backward, bind",
    "memory.py": "the device's MemoryManager",
    "tiling.py": "the device's TilingStrategy",
    "paths.py": "which kernel serves a request",
    "cost.py": "time, energy and memory of a request",
    "calibrate.py": "the measurements behind them",
    "kernels": "device code, and kernels beside attention",
    "runtime": "what speaks to the driver",
    "profiles": "profile data",
    "simulator": "values and timing of a simulated chip",
    "frontend": "a device's own programming interface",
    "interop.py": "faces of other libraries",
    "cli.py": "its commands",
    "benchmark.py": "its columns for `hal bench`",
    "py.typed": "the marker of typed packages",
}
#: What an extension may import of other extensions.
EXTENSIONS = {
    "compare": {"hal_nn", "hal_cli"},
    "geometric": {"hal_compare"},  # which reads models and texts
    "parallel": {"hal_nn", "hal_cli"},
    "precision": {"hal_nn"},
    "router": {"hal_nn"},
}


def packages(kind: str) -> dict[str, Path]:
    """Package folders by distribution folder: plugins, libs or extensions."""
    return {
        project.parent.name: next(p.parent for p in project.parent.glob("hal_*/__init__.py"))
        for project in sorted((ROOT / kind).glob("*/pyproject.toml"))
    }


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    base = package.parent
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], *, eager: bool = False) -> Iterator[str]:
    """The modules that a module imports, types included; with `eager` only what runs when it is imported itself."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if not eager else list(_top(tree.body))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in known else origin


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that belong to the module's own level, in `if` and `try` too, but not in functions."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _top(getattr(node, part, []))
        else:
            yield node


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


ALL = {"hal_core": ROOT / "hal_core"} | {
    path.name: path for kind in ("plugins", "libs", "extensions") for path in packages(kind).values()
}


@pytest.mark.parametrize("package", ALL)
def test_no_module_imports_itself_through_others(package: str) -> None:
    known = modules(ALL[package])
    # The package itself is lazy: what its __init__ names for type checkers is imported when it is used.
    graph = {
        name: {i for i in imports(name, path, known) if i in known and i not in (name, package)}
        for name, path in known.items()
        if name != package
    }
    assert cycles(graph) == []


def test_each_layer_of_the_core_imports_those_before_it() -> None:
    level = {name: i for i, (names, _) in enumerate(LAYERS.values()) for name in names}
    known = modules(ROOT / "hal_core")

    def place(module: str) -> int:
        parts = module.split(".")
        return level[parts[1] if len(parts) > 1 else "__init__"]

    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(name, path, known)
        if other.split(".")[0] == "hal_core" and place(other) > place(name)
    ]
    assert wrong == []


def test_the_core_names_no_device() -> None:
    devices = set(packages("plugins")) | {"cuda", "cupy", "triton", "lightmatter", "stillwater"}
    known = modules(ROOT / "hal_core")
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(name, path, known)
        if other.split(".")[0].removeprefix("hal_") in devices
    ]
    assert wrong == []


@pytest.mark.parametrize("plugin", packages("plugins"))
def test_a_plugin_imports_the_core_by_its_one_door_and_no_other_plugin(plugin: str) -> None:
    package = packages("plugins")[plugin]
    others = {path.name for path in packages("plugins").values()} - {package.name}
    if plugin in ("luminous", "photonic_lightmatter"):
        others -= {"hal_photonics"}
    extensions = {path.name for path in packages("extensions").values()}
    known = modules(package)
    wrong = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(name, path, known)
        if (other.split(".")[0] == "hal_core" and other != "hal_core.plugin_api")
        or other.split(".")[0] in others | extensions
    ]
    assert wrong == []


@pytest.mark.parametrize("plugin", packages("plugins"))
def test_the_files_of_one_role_have_one_name(plugin: str) -> None:
    package = packages("plugins")[plugin]
    found = {
        path.name for path in package.iterdir() if path.name != "__pycache__" and not path.name.endswith(".egg-info")
    }
    assert found <= set(ROLES), f"{sorted(found - set(ROLES))} have no role: the roles are {sorted(ROLES)}"
    assert {"__init__.py", "backend.py", "py.typed"} <= found


@pytest.mark.parametrize("kind", ["libs", "extensions"])
def test_libraries_and_extensions_know_no_device_plugin(kind: str) -> None:
    plugins = {path.name for path in packages("plugins").values()}
    extensions = {path.name for path in packages("extensions").values()}
    allowed_core = {"hal_core", "hal_core.plugin_api", "hal_core.testing", "hal_core.testing.bench_setup"}
    wrong = []
    for folder, package in packages(kind).items():
        known = modules(package)
        barred = plugins | extensions - {package.name} - EXTENSIONS.get(folder, set())
        for name, path in known.items():
            for other in imports(name, path, known):
                top = other.split(".")[0]
                if top in barred or (top == "hal_core" and other not in allowed_core):
                    wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_target_of_an_installed_distribution_resolves() -> None:
    from hal_core.plugin_api import registry
    from hal_core.registry import resolve

    targets = {}
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("hal-"):
            for point in distribution.entry_points:
                if point.group in ("hal.plugins", "console_scripts", "torch_dynamo_backends", "transformers.attention"):
                    targets[f"{name}: {point.value}"] = point.value if ":" in point.value else f"{point.value}:__name__"
    for entry in registry.entries():
        targets[f"backend {entry.spec.name}"] = entry.spec.target
    for spec in registry.kernel_specs().values():
        targets[f"kernel {spec.name}: reference"] = spec.reference
        targets[f"kernel {spec.name}: sampler"] = spec.sampler
    assert len(targets) > 20
    for target in targets.values():
        resolve(target)


def test_few_places_are_kept_from_the_formatter() -> None:
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "out", "build", "dist"} & set(path.parts)]
    marks = [
        f"{path}:{i}" for path in files for i, line in enumerate(path.read_text().splitlines(), 1) if _is_mark(line)
    ]
    assert len(marks) < 40, marks


def _is_mark(line: str) -> bool:
    comment = line.partition("#")[2].replace(" ", "")
    return comment.endswith(("fmt:skip", "fmt:off"))


def test_the_core_does_not_grow() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from core_size import REACHED, sizes
    finally:
        sys.path.pop(0)
    assert sum(sizes("hal_core").values()) <= REACHED

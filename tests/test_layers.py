"""Who may import whom: a module only what stands before it in LAYERS, and no two modules each
other, however far around."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# lowest first; a package stands for all of its modules, which may import each other
LAYERS = (
    "errors", "extensions", "notes", "options", "parsing", "compat", "modeling", "checkpoint", "data", "runtime",
    "surgery", "inputs", "generation", "distillation", "evaluation", "scoring", "anatomy", "export",
    "benchmark", "report", "recipe", "demo", "doctor", "commands.shared", "commands",
)  # fmt: skip
# what an export ships or a foreign process runs imports nothing of the package around it
ALONE = {"modeling", "export.ask", "export.ask_llama"}


def modules() -> dict[str, Path]:
    """Module name without `hybridize.` to its file; a package's __init__ has the package's name."""
    found = {}
    for folder, prefix in (("hybridize", ""), ("commands", "commands")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*filter(None, [prefix]), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports anywhere, also inside functions and for types alone."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("hybridize.") for alias in node.names if alias.name.startswith("hybridize.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = (node.module or "").removeprefix("hybridize").lstrip(".")
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])])
        elif not (node.module or "").startswith("hybridize"):
            continue
        whole = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
        found |= {one if one in MODULES else base for one in whole}
    return found & set(MODULES) - {name, ""}


def layer(name: str) -> int:
    """Where a module stands in LAYERS, by the longest name that fits."""
    fits = [index for index, part in enumerate(LAYERS) if name == part or name.startswith(f"{part}.")]
    return max(fits, key=lambda index: len(LAYERS[index]))


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "__main__", "commands.__main__"}))
def test_a_module_imports_only_what_is_below_it(name: str) -> None:
    above = sorted(other for other in imports(name) if layer(other) > layer(name))
    assert not above, f"{name} is in {LAYERS[layer(name)]} and imports {', '.join(above)}"


def test_what_travels_alone_imports_nothing_of_ours() -> None:
    for name in MODULES:
        if name in ALONE or name.startswith("modeling."):
            assert all(other.startswith("modeling") for other in imports(name)), name


def test_no_circle() -> None:
    """Import statements at any depth: a circle that a late import hides is one as well."""
    edges, done = {name: imports(name) for name in MODULES}, set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(edges[name]):
            visit(other, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


LONGEST, MOST_BRANCHES, LARGEST = 60, 15, 400  # lines of a function, its branches, lines of a file
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own(node)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_two_things(name: str) -> None:
    """No file above 400 lines, no function above 60 lines or 15 branches."""
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= LARGEST
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST, node.name
            assert sum(isinstance(part, BRANCHES) for part in _own(node)) <= MOST_BRANCHES, node.name

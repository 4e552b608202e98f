"""Who may import whom: read off the source, function-level imports included."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prefault

_SOURCE = Path(prefault.__file__).parent

# The lower, the more may import it. Modules of equal rank do not import each other; within a package that stands here as a
# whole they may, but not in a circle.
_RANKS = {
    "prefault._version": 0,
    "prefault.sizes": 0,
    "prefault.progress": 0,
    "prefault._kernel._call": 1,
    "prefault.ranges": 1,
    "prefault.intervals": 1,
    "prefault._kernel": 2,
    "prefault.errors": 2,
    "prefault.capabilities": 3,
    "prefault.selffile": 3,
    "prefault.cpus": 3,
    "prefault.dlpack": 3,
    "prefault.sockets": 3,
    "prefault.memory": 4,
    "prefault.mmap_refusal": 4,
    "prefault.vma": 4,
    "prefault.backings": 4,
    "prefault.mapping": 5,
    "prefault.residency": 5,
    "prefault.methods": 5,
    "prefault.headroom": 6,
    "prefault.plan": 6,
    "prefault.discard": 6,
    "prefault.diagnose": 6,
    "prefault.rollback": 7,
    "prefault.needs": 7,
    "prefault.pace": 7,
    "prefault.readahead": 7,
    "prefault.vectors": 7,
    "prefault.populate": 8,
    "prefault.lock": 9,
    "prefault.sparse": 9,
    "prefault.pool": 10,
    "prefault.growable": 10,
    "prefault.virtio_mem": 10,
    "prefault.device": 10,
    "prefault.drivers": 11,
    "prefault": 12,
    "prefault.doctor": 13,
    "prefault.testing": 13,
    "prefault.bench": 14,
    "prefault.cli": 15,
    "prefault.__main__": 16,
}

# What else may use ctypes, for addresses of its own memory and instances of the structures. None of them declares a function
# of the kernel.
_CTYPES = {
    "prefault.capabilities": "hands structures to ioctls in order to ask",
    "prefault.dlpack": "reads the structure in which tensor libraries say where their memory is",
    "prefault.mapping": "lends our memory out by the buffer protocol",
    "prefault.memory": "asks the buffer protocol for addresses, which Python code cannot",
    "prefault.methods": "hands vectors to process_vm_readv",
    "prefault.residency": "sizes of structures in the vector of PAGEMAP_SCAN",
    "prefault.selffile": "names the type of a structure",
    "prefault.vma": "hands a structure and a buffer for a name to PROCMAP_QUERY",
}

# Who may import by a name that is made at run time.
_BY_NAME = {
    "prefault": "loads sparse memory and what stands on it when they are first named",
    "prefault.cli": "loads a command, which is inside it, when that is asked for",
    "prefault.device": "loads what is heavy when it is first named",
    "prefault.device.recipes": "imports the factory of a device",
}

_HEAVY = {"numpy", "rich", "click"}
_HEAVY_ALLOWED = ("prefault.cli", "prefault.bench", "prefault.doctor.report")


@dataclass(frozen=True)
class _Import:
    """One import of one module, as written."""

    module: str
    line: int
    at_start: bool
    """It is run when the importing module is imported: not in a function, not only for a type checker."""


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(tree: ast.Module, modules: frozenset[str]) -> Iterator[_Import]:
    """Every import of a module. ``from package import name`` imports the submodule where there is one of that name."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_start = pending.pop()
        if isinstance(node, ast.Import):
            yield from (_Import(alias.name, node.lineno, at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield _Import("." * node.level + (node.module or ""), node.lineno, at_start)
            else:
                assert node.module is not None
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    yield _Import(inside if inside in modules else node.module, node.lineno, at_start)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            yield _Import(f"?{ast.unparse(node)}", node.lineno, at_start)
        inner = at_start and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if _is_for_type_checkers(node):
            assert isinstance(node, ast.If)
            pending += [(child, False) for child in node.body] + [(child, inner) for child in node.orelse]
        else:
            pending += [(child, inner) for child in ast.iter_child_nodes(node)]


@functools.cache
def _imports(source: str, modules: frozenset[str]) -> list[_Import]:
    return list(_walk(ast.parse(source), modules))


def _layer(module: str) -> str:
    """The entry of the ranks that a module belongs to: itself, or the package that it is in."""
    while module not in _RANKS:
        module, dot, _ = module.rpartition(".")
        if not dot:
            raise KeyError(module)
    return module


def _complaints(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of these modules (name: source text)."""
    modules = frozenset(sources)
    found = []
    siblings: dict[str, set[str]] = {}
    for module, source in sources.items():
        if module != "prefault" and _layer(module) == "prefault":
            found.append(f"{module} has no rank")
            continue
        for imported in _imports(source, modules):
            where = f"{module}:{imported.line}"
            top = imported.module.partition(".")[0]
            if imported.module.startswith("?"):
                if module in _BY_NAME:
                    continue
                found.append(f"{where} imports by name at run time: {imported.module[1:]}")
            elif imported.module.startswith("."):
                found.append(f"{where} is a relative import")
            elif top == "ctypes" and not module.startswith("prefault._kernel") and module not in _CTYPES:
                found.append(f"{where} imports ctypes")
            elif top in _HEAVY and imported.at_start and not module.startswith(_HEAVY_ALLOWED):
                found.append(f"{where} imports {top} when it is imported itself")
            elif top == "prefault":
                if imported.module != "prefault" and _layer(imported.module) == "prefault":
                    found.append(f"{where} imports {imported.module}, which has no rank")
                elif _layer(imported.module) == _layer(module):
                    siblings.setdefault(module, set()).add(imported.module)
                elif _RANKS[_layer(imported.module)] >= _RANKS[_layer(module)]:
                    found.append(f"{where} imports {imported.module}, which is not below it")
    try:
        TopologicalSorter(siblings).prepare()
    except CycleError as error:
        found.append(f"a circle of imports: {' -> '.join(error.args[1])}")
    return found


def _package() -> dict[str, str]:
    """The modules of the package: name and source text."""
    sources = {}
    for path in sorted(_SOURCE.rglob("*.py")):
        parts = path.relative_to(_SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text()
    return sources


def test_the_package_keeps_to_its_layers() -> None:
    assert _complaints(_package()) == []


def test_every_rank_and_every_exception_is_in_use() -> None:
    sources = _package()
    assert {_layer(module) for module in sources} == set(_RANKS)
    for exceptions, name in ((_CTYPES, "ctypes"), (_BY_NAME, "?")):
        for module in exceptions:
            assert any(found.module.startswith(name) for found in _imports(sources[module], frozenset(sources))), module


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("prefault.sizes", "import prefault.populate", "imports prefault.populate, which is not below it"),
        ("prefault.vma", "from prefault.memory import borrow", "imports prefault.memory, which is not below it"),
        ("prefault.residency", "from prefault import mapping", "imports prefault.mapping, which is not below it"),
        ("prefault.residency", "from prefault import Mapping", "imports prefault, which is not below it"),
        ("prefault.populate", "def f():\n    import prefault.cli", "imports prefault.cli, which is not below it"),
        ("prefault.doctor", "from prefault.cli import main", "imports prefault.cli, which is not below it"),
        ("prefault", "from prefault.testing import without", "imports prefault.testing, which is not below it"),
        (
            "prefault._kernel.mman",
            "from prefault.errors import DiscardError",
            "imports prefault.errors, which is not below it",
        ),
        (
            "prefault._kernel._call",
            "from prefault._kernel import mman",
            "imports prefault._kernel.mman, which is not below it",
        ),
        ("prefault.plan", "from .vma import Vma", "is a relative import"),
        ("prefault.plan", "from . import vma", "is a relative import"),
        ("prefault.plan", "import ctypes", "imports ctypes"),
        ("prefault.plan", "from ctypes.util import find_library", "imports ctypes"),
        ("prefault.plan", "import numpy as np", "imports numpy when it is imported itself"),
        ("prefault.plan", "if True:\n    from rich.console import Console", "imports rich when it is imported itself"),
        ("prefault.plan", "class A:\n    import click", "imports click when it is imported itself"),
        ("prefault.plan", "__import__('prefault.cli')", "imports by name at run time"),
        ("prefault.novelty", "", "has no rank"),
        ("prefault.sizes", "from prefault.novelty import x", "which has no rank"),
    ],
)
def test_it_would_be_noticed(module: str, line: str, complaint: str) -> None:
    sources = _package()
    if "has no rank" in complaint:
        sources["prefault.novelty"] = ""
    sources[module] = sources.get(module, "") + f"\n{line}\n"
    before = _complaints(_package())
    complaints = [text for text in _complaints(sources) if text not in before]
    assert any(complaint in text for text in complaints)
    assert all(text.startswith((module, "prefault.novelty")) for text in complaints)


def test_circles_inside_a_package_would_be_noticed() -> None:
    sources = _package()
    sources["prefault.bench.one"] = "from prefault.bench import two"
    assert not any("prefault.bench.two" in text for text in _complaints(sources))
    sources["prefault.bench.two"] = "def later():\n    import prefault.bench.one"
    assert any("circle" in text and "prefault.bench.two" in text for text in _complaints(sources))


@pytest.mark.parametrize(
    "line",
    [
        "def f():\n    import numpy",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy",
        "from prefault.residency import residency_of",
        "from prefault._kernel import mman",
    ],
)
def test_what_is_allowed(line: str) -> None:
    sources = _package()
    sources["prefault.plan"] += f"\n{line}\n"
    assert _complaints(sources) == _complaints(_package())

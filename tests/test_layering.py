"""The layering rule, checked against all imports of the source, function-level ones included."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prefault

_SOURCE = Path(prefault.__file__).parent

# A folder is a layer: it imports from the lines above its own, and from itself, in no circle. Folders of one line (a | b) do
# not import each other; the modules that a line lists one by one may, in no circle.
_LAYERS = """
sizes ranges intervals interval_index errors _version  values: no memory is touched
_kernel                                 one thin function per system call, with the kernel's names and structures
_system                                 this machine and process: capabilities, CPUs, cgroups, files of /proc
ipc | memory                            Unix sockets; any buffer -> addresses, what is mapped there, what backs it
inspection                              what is present now
limits                                  every limit once; what a call demands; admission before and between chunks
mapping                                 memory that prefault maps itself
engine                                  populate: plan, methods, chunks, diagnosis, rollback; discard; lock
sparse                                  a reservation of which parts are populated and discarded; growable arrays
pool | virtio_mem                       a bounded store of memory, shared by processes; the device side of virtio-mem
device                                  device memory: the driver's interface, and what client and server share
device.client | device.pages            the process that maps a device; its pages in the process that runs the driver
device.server                           that process: faults, requests, calls of the driver
device.warden                           the process that starts the server again, or answers without it
device.process                          how these processes are started
device.opening                          map and connect
device.__init__                         the public names of device memory
drivers                                 devices that ship
files | shared_memory | arrays          paths; multiprocessing's shared memory; arrays on populated memory
recordings | processes | engines        what a program touched, brought back; running processes; for inference engines
__init__                                the public names
bench | doctor | testing | pictures     measure; examine and advise; contract checks for users; heat maps and reports
cli __main__                            parse and print
"""


def _read_layers(picture: str) -> dict[str, tuple[int, int]]:
    """For each folder or module of a picture of the layers: its line, and its group within the line."""
    found = {}
    for rank, line in enumerate(picture.strip().splitlines()):
        for group, names in enumerate(re.split(r"\s\|\s", re.split(r"\s{2,}", line.strip())[0])):
            for name in names.split():
                found["prefault" if name == "__init__" else f"prefault.{name}"] = (rank, group)
    return found


_RANKS = _read_layers(_LAYERS)

# What else may use ctypes, for addresses of its own memory and instances of the structures. None of them declares a function
# of the kernel.
_CTYPES = {
    "prefault._system.capabilities": "hands structures to ioctls in order to ask",
    "prefault.memory.dlpack": "reads the structure in which tensor libraries say where their memory is",
    "prefault.mapping.mapping": "lends our memory out by the buffer protocol",
    "prefault.memory.borrowing": "asks the buffer protocol for addresses, which Python code cannot",
    "prefault.engine.methods": "hands vectors to process_vm_readv",
    "prefault.processes.process_warming": "hands vectors to process_vm_readv",
    "prefault.inspection.pagemap_scan": "sizes of structures in the vector of PAGEMAP_SCAN",
    "prefault._system.kept_files": "names the type of a structure",
    "prefault.testing._recording_device": "has a view of frames that takes weak references",
    "prefault.memory.vma": "hands a structure and a buffer for a name to PROCMAP_QUERY",
}

# Who may import by a name that is made at run time.
_BY_NAME = {
    "prefault": "loads sparse memory and what stands on it when they are first named",
    "prefault.cli": "loads a command, which is inside it, when that is asked for",
    "prefault.device": "loads what is heavy when it is first named",
    "prefault.drivers": "loads a driver when it is first named",
    "prefault.device.recipes": "imports the factory of a device",
}

_HEAVY = {"numpy", "rich", "click"}
_HEAVY_ALLOWED = ("prefault.cli", "prefault.bench", "prefault.doctor.report", "prefault.pictures")


@dataclass(frozen=True)
class _Import:
    """One import statement's module, line and place."""

    module: str
    line: int
    at_start: bool
    """True if importing the module runs it: it is not in a function, and not only for a type checker."""
    name: str = ""
    """Name after ``from module import``: of a submodule, or of something in the module."""

    def imported(self, modules: frozenset[str]) -> str:
        """Return the module that is imported: the submodule if there is one of that name."""
        inside = f"{self.module}.{self.name}"
        return inside if inside in modules else self.module


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(tree: ast.Module) -> Iterator[_Import]:
    """Yield each import of a module, and each name of ``from module import name, name``."""
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
                yield from (_Import(node.module, node.lineno, at_start, alias.name) for alias in node.names)
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
def _imports(source: str) -> list[_Import]:
    return list(_walk(ast.parse(source)))


def _layer(module: str) -> str:
    """Return the entry of the layers that a module belongs to: its own, or that of the folder it is in."""
    if f"{module}.__init__" in _RANKS:
        return f"{module}.__init__"
    if module == "prefault":
        return module
    folder = module
    while folder not in _RANKS:
        folder = folder.rpartition(".")[0]
        if folder in ("", "prefault"):
            raise KeyError(module)
    return folder


def _complaints(sources: dict[str, str]) -> list[str]:
    """Return a complaint for each wrong import of these modules (name: source text)."""
    modules = frozenset(sources)
    found = []
    siblings: dict[str, set[str]] = {}
    for module, source in sources.items():
        if not _has_rank(module):
            found.append(f"{module} has no rank")
            continue
        for imported in _imports(source):
            target = imported.imported(modules)
            where = f"{module}:{imported.line}"
            top = target.partition(".")[0]
            if target.startswith("?"):
                if module in _BY_NAME:
                    continue
                found.append(f"{where} imports by name at run time: {target[1:]}")
            elif target.startswith("."):
                found.append(f"{where} is a relative import")
            elif top == "ctypes" and not module.startswith("prefault._kernel") and module not in _CTYPES:
                found.append(f"{where} imports ctypes")
            elif top in _HEAVY and imported.at_start and not module.startswith(_HEAVY_ALLOWED):
                found.append(f"{where} imports {top} when it is imported itself")
            elif top == "prefault":
                if not _has_rank(target):
                    found.append(f"{where} imports {target}, which has no rank")
                    continue
                (rank, group), (below, other) = _RANKS[_layer(module)], _RANKS[_layer(target)]
                if (below, other) == (rank, group):
                    siblings.setdefault(module, set()).add(target)
                elif below >= rank:
                    found.append(f"{where} imports {target}, which is not below it")
    try:
        TopologicalSorter(siblings).prepare()
    except CycleError as error:
        found.append(f"a cycle of imports: {' -> '.join(error.args[1])}")
    return found


def _has_rank(module: str) -> bool:
    try:
        _layer(module)
    except KeyError:
        return False
    return True


def _package() -> dict[str, str]:
    """Return all modules of the package: name and source text."""
    sources = {}
    for path in sorted(_SOURCE.rglob("*.py")):
        parts = path.relative_to(_SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text()
    return sources


def test_the_package_keeps_to_its_layers() -> None:
    assert _complaints(_package()) == []


def test_the_picture_of_the_layers_is_the_same_everywhere() -> None:
    page = (Path(__file__).parent.parent / "docs" / "design" / "layers.md").read_text()
    picture = _LAYERS.strip().splitlines()
    assert [line.rstrip() for line in page.split("```")[1].strip().splitlines()] == picture
    assert [line.strip() for line in (prefault.__doc__ or "").splitlines() if re.search(r"\S\s{2,}\S", line)] == picture


def test_no_two_modules_have_the_same_name() -> None:
    """Exempt are modules of commands, and the main module of a folder, which may have the folder's name."""
    names = [name for name in _package() if not re.search(r"^prefault\.cli\.|\.(\w+)\.\1$", name)]
    last = [name.rpartition(".")[2] for name in names]
    assert sorted(name for name in names if last.count(name.rpartition(".")[2]) > 1) == []


def test_no_module_has_the_name_of_a_public_function() -> None:
    functions = {name for name in prefault.__all__ if not isinstance(getattr(prefault, name), type)}
    functions |= {"map", "connect", "serve", "check_device", "without", "borrow"}
    modules = [name for name in _package() if not name.startswith("prefault.cli.")]  # commands are called like functions
    assert sorted(name for name in modules if name.rpartition(".")[2] in functions) == []


def test_folders_are_small_enough_to_look_through() -> None:
    """Exempt is the folder in which a module is a system call, whose name is known from elsewhere."""
    folders = [path for path in [_SOURCE, *_SOURCE.rglob("*")] if path.is_dir() and path.name != "_kernel"]
    for folder in folders:
        assert len(list(folder.glob("*.py"))) <= 20, folder


def test_every_rank_and_every_exception_is_in_use() -> None:
    sources = _package()
    assert {_layer(module) for module in sources} == set(_RANKS)
    for exceptions, name in ((_CTYPES, "ctypes"), (_BY_NAME, "?")):
        for module in exceptions:
            assert any(found.module.startswith(name) for found in _imports(sources[module])), module


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("prefault.sizes", "import prefault.engine.populating", "imports prefault.engine.populating, which is not below it"),
        (
            "prefault.memory.vma",
            "from prefault.ipc import transport",
            "imports prefault.ipc.transport, which is not below it",
        ),
        (
            "prefault.inspection.scan",
            "from prefault.mapping import mapping",
            "imports prefault.mapping.mapping, which is not below it",
        ),
        ("prefault.inspection.scan", "from prefault import Mapping", "imports prefault, which is not below it"),
        ("prefault.engine.populating", "def f():\n    import prefault.cli", "imports prefault.cli, which is not below it"),
        ("prefault.doctor", "from prefault.cli import main", "imports prefault.cli, which is not below it"),
        ("prefault", "from prefault.testing import without", "imports prefault.testing, which is not below it"),
        (
            "prefault._kernel.mman",
            "from prefault._system import cpus",
            "imports prefault._system.cpus, which is not below it",
        ),
        ("prefault.engine.planning", "from .vma import Vma", "is a relative import"),
        ("prefault.engine.planning", "from . import vma", "is a relative import"),
        ("prefault.engine.planning", "import ctypes", "imports ctypes"),
        ("prefault.engine.planning", "from ctypes.util import find_library", "imports ctypes"),
        ("prefault.engine.planning", "import numpy as np", "imports numpy when it is imported itself"),
        (
            "prefault.engine.planning",
            "if True:\n    from rich.console import Console",
            "imports rich when it is imported itself",
        ),
        ("prefault.engine.planning", "class A:\n    import click", "imports click when it is imported itself"),
        ("prefault.engine.planning", "__import__('prefault.cli')", "imports by name at run time"),
        ("prefault.novelty", "", "has no rank"),
        ("prefault.sizes", "from prefault.novelty import x", "which has no rank"),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str, complaint: str) -> None:
    sources = _package()
    if "has no rank" in complaint:
        sources["prefault.novelty"] = ""
    sources[module] = sources.get(module, "") + f"\n{line}\n"
    before = _complaints(_package())
    complaints = [text for text in _complaints(sources) if text not in before]
    assert any(complaint in text for text in complaints)
    assert all(text.startswith((module, "prefault.novelty")) for text in complaints)


def test_a_cycle_inside_a_package_is_found() -> None:
    sources = _package()
    sources["prefault.bench.one"] = "from prefault.bench import two"
    assert not any("prefault.bench.two" in text for text in _complaints(sources))
    sources["prefault.bench.two"] = "def later():\n    import prefault.bench.one"
    assert any("cycle" in text and "prefault.bench.two" in text for text in _complaints(sources))


@pytest.mark.parametrize(
    "line",
    [
        "def f():\n    import numpy",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy",
        "from prefault.inspection.scan import residency_of",
        "from prefault._kernel import mman",
    ],
)
def test_a_right_import_is_not_found(line: str) -> None:
    sources = _package()
    sources["prefault.engine.planning"] += f"\n{line}\n"
    assert _complaints(sources) == _complaints(_package())

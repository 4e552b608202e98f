"""README and docs against the code: blocks can be pasted, links lead somewhere, and named files and functions exist."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import prefault

_ROOT = Path(__file__).parent.parent
_PAGES = [*sorted(_ROOT.glob("*.md")), *sorted((_ROOT / "docs").rglob("*.md"))]
_PUBLIC_MODULES = ("device", "drivers", "engines", "pool", "processes", "shared_memory", "testing", "virtio_mem")
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks() -> Iterator[tuple[str, str]]:
    """Yield the page and line of each block of Python, and its code."""
    for page in _PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            yield f"{page.relative_to(_ROOT)}:{line}", match[1]


def _undefined(code: str) -> set[str]:
    """Return the global names that the code uses but does not define."""
    used: set[str] = set()
    pending = [symtable.symtable(code, "block", "exec")]
    top = pending[0]
    while pending:
        table = pending.pop()
        pending += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is top or symbol.is_global())
        }
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    return used - defined - set(dir(builtins))


def test_undefined_names_are_found() -> None:
    assert _undefined("import a\ndef f(x):\n    return a(x, b)\n[y for y in c]\nd = e.f\n") == {"b", "c", "e"}
    assert _undefined("class A:\n    z = 1\n    def g(self):\n        return len(str(z))\n") == {"z"}


def test_there_are_blocks() -> None:
    assert len(list(_blocks())) >= 15


@pytest.mark.parametrize(("where", "code"), [pytest.param(where, code, id=where) for where, code in _blocks()])
def test_a_block_can_be_pasted(where: str, code: str) -> None:
    ast.parse(code, where)
    assert _undefined(code) == set()


# --- docs/architecture.md: "`engine/planning.py` `make_plan()`" says that src/prefault/engine/planning.py defines make_plan

_ARCHITECTURE = (_ROOT / "docs" / "architecture.md").read_text()
_SOURCE = _ROOT / "src" / "prefault"
_WALKS = {"One populate call", "One page fault of device memory", "One eviction", "One death of a server"}


def _code_references(page: str) -> Iterator[tuple[str, str]]:
    """Yield each path in backquotes with "", and each name in backquotes with the path before it in the same paragraph."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\d+\. |- |\|)|(?<= )\|(?= )", page):
        path = ""
        for quoted in re.findall(r"`([^`]+)`", paragraph):
            if re.fullmatch(r"[\w/]+(\.py|/)", quoted):
                path = quoted
                yield path, ""
            elif path.endswith(".py") and re.fullmatch(r"(?!prefault\.)[A-Za-z_][\w.]*\(\)|_?[A-Z]\w+", quoted):
                yield path, quoted


def _is_true(path: str, name: str) -> bool:
    """Return whether the path exists and its file defines ``function()`` or ``Class.method()``, or contains ``Name``."""
    file = (_ROOT if path.startswith("tests/") else _SOURCE) / path
    if not name or not file.is_file():
        return file.exists() and not name
    text = file.read_text()
    *classes, last = name.removesuffix("()").split(".")
    if not name.endswith("()"):
        return re.search(rf"\b{last}\b", text) is not None
    bodies = [ast.parse(text)]
    for each in classes:
        bodies = [node for body in bodies for node in ast.walk(body) if isinstance(node, ast.ClassDef) and node.name == each]  # type: ignore[misc]
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == last for body in bodies for node in ast.walk(body))


def test_references_of_a_page_are_found() -> None:
    page = "1. `a/b.py` `f()`: reads `x`.\n2. `c/` `g()`\n| `d.py` `C.m()`, `Ee` | `h()` |\n\n`prefault.j()`, `tests/k.py`"
    assert list(_code_references(page)) == [
        ("a/b.py", ""), ("a/b.py", "f()"), ("c/", ""), ("d.py", ""), ("d.py", "C.m()"), ("d.py", "Ee"), ("tests/k.py", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("ranges.py", "", True),
        ("range.py", "", False),
        ("_kernel/", "", True),
        ("tests/test_docs.py", "_is_true()", True),
        ("ranges.py", "RangeSet()", True),
        ("ranges.py", "PageRange.shifted()", True),
        ("ranges.py", "PageRange.lost()", False),
        ("ranges.py", "shifted()", True),
        ("ranges.py", "Lost", False),
        ("missing.py", "shifted()", False),
    ],
)
def test_a_false_reference_is_found(path: str, name: str, expected: bool) -> None:
    assert _is_true(path, name) is expected


def test_paths_in_pages_exist() -> None:
    """A page may shorten a path, to `server/faults.py` or `faults.py`."""
    roots = [_SOURCE, *(_ROOT / name for name in ("bench", "docs", "examples", "requirements", "tests", "tools"))]
    files = [f"/{file.relative_to(_ROOT)}" for root in roots for file in root.rglob("*.*")]
    named = [
        (page.relative_to(_ROOT), path)
        for page in _PAGES
        for path in re.findall(r"`(\w[\w/-]*\.(?:py|md|txt|c))`", page.read_text())
    ]
    assert [(page, path) for page, path in named if not any(file.endswith(f"/{path}") for file in files)] == []


@pytest.mark.parametrize(("path", "name"), sorted(set(_code_references(_ARCHITECTURE))))
def test_the_architecture_page_names_what_exists(path: str, name: str) -> None:
    assert _is_true(path, name), f"docs/architecture.md names {name or 'it'} in {path}"


def test_each_walk_of_the_architecture_page_has_at_most_ten_stops() -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", _ARCHITECTURE, re.MULTILINE | re.DOTALL))
    assert sections.keys() >= _WALKS
    for title in _WALKS:
        stops = [int(number) for number in re.findall(r"^(\d+)\. ", sections[title], re.MULTILINE)]
        assert stops == list(range(1, len(stops) + 1)), title
        assert 5 <= len(stops) <= 10, title


def test_each_page_is_listed() -> None:
    """docs/README.md and the README.md of each folder list all pages: the site's navigation is made from them."""
    listed = {_ROOT / "docs" / "README.md"}
    pending = list(listed)
    while pending:
        index = pending.pop()
        links = re.findall(r"^(?:- |\| )\[.+?\]\(([\w./-]+\.md)\)", index.read_text(), re.MULTILINE)
        found = {(index.parent / link).resolve() for link in links}
        pending += [page for page in found - listed if page.name == "README.md" and page.parent != _ROOT]
        listed |= found
    assert set(_PAGES) - listed == set()


def test_the_reference_has_each_public_name_once() -> None:
    """`make docs` builds it from the docstrings."""
    pages = (_ROOT / "docs" / "reference").glob("*.md")
    named = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert sorted(set(named)) == sorted(named)
    wanted = {f"prefault.{name}" for name in prefault.__all__}
    for module in _PUBLIC_MODULES:
        wanted |= {f"prefault.{module}.{name}" for name in import_module(f"prefault.{module}").__all__}
    assert set(named) - wanted == set()
    assert {name for name in wanted - set(named) if f"prefault.{name.rpartition('.')[2]}" not in named} == set()


def test_links_between_pages_lead_somewhere() -> None:
    for page in _PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(_ROOT)} links {target}"

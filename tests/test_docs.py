"""The code in README and docs: every block can be pasted, so it compiles and brings the imports that it needs."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_PAGES = [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks() -> Iterator[tuple[str, str]]:
    """Where a block begins, and its code."""
    for page in _PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1)) + 1
            yield f"{page.relative_to(_ROOT)}:{line}", match[1]


def _undefined(code: str) -> set[str]:
    """The global names that the code uses and nothing in it defines, wherever in it they are."""
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

"""Blocks of Python in guides, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in ("engines.md", "shared-memory.md")
    for number, block in enumerate(_BLOCK.findall((_DOCS / page).read_text()))
]


@pytest.mark.parametrize("block", _BLOCKS)
def test_a_block_runs(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_blocks() -> None:
    assert len(_BLOCKS) >= 8

"""The blocks of docs/shared-memory.md, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGE = Path(__file__).parent.parent.parent / "docs" / "shared-memory.md"
_BLOCKS = re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", range(len(_BLOCKS)))
def test_a_block_runs(block: int) -> None:
    done = subprocess.run([sys.executable, "-c", _BLOCKS[block]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_there_are_blocks() -> None:
    assert len(_BLOCKS) >= 5

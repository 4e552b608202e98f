"""Code of the README and of guides that a reader may paste: each block runs by itself, in a directory with some files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import safetensors.numpy

from support import needs
from support.children import in_child

_ROOT = Path(__file__).parent.parent
_EVERYDAY = "Four everyday uses"
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _section(page: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1]


def _texts() -> Iterator[tuple[str, str]]:
    """Yield the name of each page whose blocks run, and its text."""
    yield "README", _section((_ROOT / "README.md").read_text(), _EVERYDAY)
    for name in _PYTHON_GUIDES:
        yield name, re.sub(r"^```sh$", "```", (_ROOT / "docs" / f"{name}.md").read_text(), flags=re.MULTILINE)
    for page in [*sorted((_ROOT / "docs" / "recipes").glob("*.md")), *(_ROOT / "docs" / f"{name}.md" for name in _GUIDES)]:
        yield page.stem, page.read_text()


_GUIDES = ("command", "shared-memory")
_PYTHON_GUIDES = ("files", "heat-maps", "recordings")
"""Guides whose commands name a service of the reader's: only their Python runs here."""

_BLOCKS = [
    pytest.param(language, code, id=f"{name}-{number}")
    for name, text in _texts()
    for number, (language, code) in enumerate(_BLOCK.findall(text))
]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and an array, on a disk: a tmpfs has no page cache that could be cold."""
    weights = numpy.arange(1 << 18, dtype="float32").reshape(256, 1024)
    numpy.save(tmp_path / "weights.npy", weights)
    safetensors.numpy.save_file({"layers.0.weight": weights}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(("language", "code"), _BLOCKS)
def test_a_block_runs(language: str, code: str, directory: Path) -> None:
    if "--way trace" in code:
        needs.root("use the kernel's tracepoints")
    if language == "python":
        in_child(lambda: exec(compile(code, "block", "exec"), {"__name__": "__main__"}))  # a fork has imported numpy already
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_blocks_are_found() -> None:
    assert len(_BLOCKS) >= 10
    assert _section("# A\n## B\nb\n## C\nc\n", "B") == "b\n"


_SHORT = [code for _, code in _BLOCK.findall(_section((_ROOT / "README.md").read_text(), _EVERYDAY))]


@pytest.mark.parametrize("code", _SHORT)
def test_an_everyday_use_is_short(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) < 10


def test_there_are_four_everyday_uses() -> None:
    assert len(_SHORT) == 4

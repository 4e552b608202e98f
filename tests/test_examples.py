"""The examples run as they stand, in a process of their own."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import Device
from prefault.sizes import PAGE_SIZE
from prefault.testing import check_device

_EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {path.stem for path in _EXAMPLES} >= {"balloon", "slab_allocator"}


@pytest.mark.parametrize("path", _EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


def test_the_enclave_says_what_it_lacks() -> None:
    (path,) = (path for path in _EXAMPLES if path.stem == "enclave")
    script = "import runpy, sys; sys.modules['cryptography'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert "needs cryptography, which is not installed: pip install 'prefault[enclave]'" in done.stdout


def _page_cache(file: Path, frames: int) -> Device:
    (path,) = (path for path in _EXAMPLES if path.stem == "page_cache")
    spec = importlib.util.spec_from_file_location("page_cache", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device: Device = module.Cache(str(file))
    device.capacity = frames * PAGE_SIZE
    device.recipe = lambda: None  # type: ignore[method-assign]
    return device


def test_the_page_cache_keeps_the_contract(tmp_path: Path) -> None:
    """The guide tells its readers to begin with this example."""
    content = os.urandom(40 * PAGE_SIZE)
    numbers = itertools.count()

    def make() -> Device:
        file = tmp_path / str(next(numbers))
        file.write_bytes(content)
        return _page_cache(file, 32)

    def expected(page: int) -> bytes:
        return content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    check_device(make, expected=expected, after_discard="any", persistent=True)


def test_the_page_cache_makes_room_wherever_its_hand_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(128 * PAGE_SIZE))
    with prefault.device.map(_page_cache(tmp_path / "file", 64)) as area:
        for first, stop in ((1, 65), (0, 1), (1, 64), (64, 65)):  # the hand is at 65, and all that is there lies before it
            prefault.populate(area, offset=first * PAGE_SIZE, length=(stop - first) * PAGE_SIZE)

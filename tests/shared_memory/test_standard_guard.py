"""protect_shared_memory: the standard class, numpy.memmap, joblib's use of it and torch raise where they would die."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing import managers, resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault.shared_memory import standard_guard
from support import needs, own_dev_shm
from support.file_beds import mounted

_DIRECTORY = Path("/dev/shm")
_ORIGINAL = shared_memory.SharedMemory.__init__
_ORIGINAL_MEMMAP = vars(numpy.memmap)["__new__"]


@pytest.fixture(autouse=True, scope="module")
def _tracker() -> Iterator[None]:
    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    assert standard_guard._patches == []
    assert shared_memory.SharedMemory.__init__ is _ORIGINAL
    assert vars(numpy.memmap)["__new__"] is _ORIGINAL_MEMMAP


def _allocated(name: str) -> int:
    return (_DIRECTORY / name).stat().st_blocks * 512


def _make(size: int = 64 << 10) -> int:
    """Make shared memory by the standard class; return the bytes that it has at once."""
    memory = shared_memory.SharedMemory(create=True, size=size)
    try:
        return _allocated(memory.name)
    finally:
        memory.close()
        memory.unlink()


# --- beginning and end


def test_memory_is_allocated_at_creation_inside_only() -> None:
    assert _make() == 0
    with prefault.protect_shared_memory() as protection:
        assert _make() == 64 << 10
        assert protection.protects[:2] == ("multiprocessing.shared_memory.SharedMemory", "numpy.memmap")
        assert "ended" not in repr(protection)
    assert _make() == 0
    assert "ended" in repr(protection)


def test_protections_nest() -> None:
    first = prefault.protect_shared_memory()
    second = prefault.protect_shared_memory()
    first.end()
    first.end()
    assert _make() == 64 << 10
    second.end()
    assert _make() == 0


def test_ctrl_c_while_it_begins_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(work: Any) -> Any:
        def both(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            work(*arguments)

        return both

    monkeypatch.setattr(standard_guard, "_enter", interrupted(standard_guard._enter))
    with pytest.raises(KeyboardInterrupt):
        prefault.protect_shared_memory()
    assert _make() == 0
    monkeypatch.undo()
    protection = prefault.protect_shared_memory()
    monkeypatch.setattr(standard_guard, "_leave", interrupted(standard_guard._leave))
    with pytest.raises(KeyboardInterrupt):
        protection.end()
    assert _make() == 0


def test_a_wrapper_around_ours_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    protection = prefault.protect_shared_memory()
    ours = shared_memory.SharedMemory.__init__

    def theirs(self: Any, *arguments: Any, **options: Any) -> None:
        ours(self, *arguments, **options)

    shared_memory.SharedMemory.__init__ = theirs  # type: ignore[method-assign]
    protection.end()
    try:
        assert shared_memory.SharedMemory.__init__ is theirs
        assert _make() == 0  # ours is inside, and does nothing
        with prefault.protect_shared_memory():
            assert _make() == 64 << 10
        assert _make() == 0
    finally:
        shared_memory.SharedMemory.__init__ = _ORIGINAL  # type: ignore[method-assign]
        standard_guard._patches.clear()


def test_what_is_made_of_the_standard_class() -> None:
    with prefault.protect_shared_memory():
        listed: Any = shared_memory.ShareableList([1, "two"])
        assert _allocated(listed.shm.name) > 0
        assert list(listed) == [1, "two"]
        listed.shm.close()
        listed.shm.unlink()
        with managers.SharedMemoryManager() as manager:
            assert _allocated(manager.SharedMemory(8192).name) == 8192
        ours = prefault.SharedMemory(create=True, size=4096, populate=False)
        assert _allocated(ours.name) == 4096
        ours.close()
        ours.unlink()


def test_attaching_and_errors_are_as_before() -> None:
    with prefault.protect_shared_memory():
        with pytest.raises(ValueError, match="size"):
            shared_memory.SharedMemory(create=True, size=0)
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory("prefault-test-missing")


@pytest.mark.parametrize("path", [True, False])
def test_memmap(tmp_path: Path, path: bool) -> None:
    name = tmp_path / "array"
    with prefault.protect_shared_memory(), open(tmp_path / "opened", "w+b") as file:
        array = numpy.memmap(name if path else file, "float64", "w+", shape=(1000,))
        array[:] = 1
        assert os.stat(name if path else file.fileno()).st_blocks * 512 >= 8000
        array.flush()
        again = numpy.memmap(name if path else file.name, "float64", mode="r+", shape=(1000,))
        assert again.sum() == 1000
        del array, again


def test_memmap_where_files_cannot_be_allocated(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    if shutil.which("mkfs.ext2") is None:
        needs.missing("mkfs.ext2 (e2fsprogs) is not installed")
    subprocess.run(["mkfs.ext2", "-q", image], check=True)
    with mounted(tmp_path / "ext2", "-o", "loop", str(image)) as directory, prefault.protect_shared_memory():
        array = numpy.memmap(directory / "array", "uint8", "w+", shape=(1 << 20,))
        array[:] = 1
        array.flush()
        del array
        assert (directory / "array").read_bytes() == b"\1" * (1 << 20)


# --- with a full file system

_DIES = """
import sys
{imports}
print("imported", flush=True)
{use}
print("survived")
"""

_PROTECTED = """
import os, sys
{imports}
import prefault
before = os.listdir("/dev/shm")
with prefault.protect_shared_memory() as protection:
    try:
        {use}
    except (prefault.HeadroomError, prefault.BackingFullError) as error:
        print(type(error).__name__, sorted(set(os.listdir("/dev/shm")) - set(before)), protection.protects[-1], error)
"""

_STANDARD = (
    "from multiprocessing import shared_memory",
    "memory = shared_memory.SharedMemory(create=True, size=8 << 20); memory.buf[:] = bytes(8 << 20)",
)
_MEMMAP = ("import numpy", "numpy.memmap('/dev/shm/results', 'uint8', 'w+', shape=(8 << 20,))[:] = 1")
_TORCH = ("import torch", "torch.zeros(2 << 20).share_memory_()")
_TORCH_NEW = ("import torch", "torch.UntypedStorage._new_shared(8 << 20).fill_(1)")
_TORCH_QUEUE = (
    "import torch, torch.multiprocessing as m; m.set_sharing_strategy('file_system')",
    "torch.ones(2 << 20).share_memory_()",
)


def _need_torch(use: tuple[str, str]) -> None:
    if "torch" in use[0]:
        if importlib.util.find_spec("torch") is None:
            needs.missing("torch is not installed", unless="PREFAULT_REQUIRE_TORCH")
        import torch  # type: ignore[import-not-found,unused-ignore]

        if not standard_guard._is_before_2_10(torch.__version__):
            pytest.skip("torch 2.10 and later allocate shared memory by themselves")


_USES = pytest.mark.parametrize(
    "use",
    [_STANDARD, _MEMMAP, _TORCH, _TORCH_NEW, _TORCH_QUEUE],
    ids=["standard", "memmap", "torch", "torch-new", "torch-name"],
)


@_USES
def test_it_dies_without_protection(use: tuple[str, str]) -> None:
    _need_torch(use)
    done = own_dev_shm.run(_DIES.format(imports=use[0], use=use[1]), size="2m")
    assert (done.stdout, done.returncode) == ("imported\n", -signal.SIGBUS)


@_USES
def test_it_raises_with_protection(use: tuple[str, str]) -> None:
    _need_torch(use)
    text = own_dev_shm.output(_PROTECTED.format(imports=use[0], use=use[1]), size="2m")
    assert text.startswith("HeadroomError [] ")
    assert "8.0 MiB" in text
    assert "/dev/shm" in text
    assert "--shm-size" in text
    assert "headroom=" not in text or use is _MEMMAP  # there is no such argument there


def test_versions_of_torch() -> None:
    versions = ["1.13.0a0", "2.9.1+cpu", "2.10.0", "2.10.0a0+git", "3.0", "strange"]
    assert [standard_guard._is_before_2_10(version) for version in versions] == [True, True, False, False, False, False]

"""Failures of CPython, PyTorch and Qdrant, as reported, and with one call of prefault."""

from __future__ import annotations

import mmap
import os
import resource
import signal
from pathlib import Path

import pytest

from prefault import engines
from support import own_dev_shm

# --- cpython#114390

_LOOP = """
from {module} import SharedMemory
kept = []
for number in range(4):
    memory = SharedMemory(create=True, size=1024)
    kept.append(memory)
    print("created", flush=True)
    memory.buf[0] = 0
    print("written", flush=True)
"""

_STORED = """
import prefault, os
try:
    {code}
except prefault.HeadroomError as error:
    print(error)
for memory in kept:
    memory.close()
    memory.unlink()
"""


def test_114390_as_reported() -> None:
    """cpython#114390: with a /dev/shm of 3 KiB the second object is created, and writing to it is a bus error."""
    done = own_dev_shm.run(_LOOP.format(module="multiprocessing.shared_memory"), size="3k")
    assert (done.stdout.split(), done.returncode) == (["created", "written", "created"], -signal.SIGBUS)


@pytest.mark.parametrize("call", ["SharedMemory", "protect_shared_memory"])
def test_114390_with_prefault(call: str) -> None:
    module, before = "prefault", ""
    if call != "SharedMemory":
        module, before = "multiprocessing.shared_memory", "prefault.protect_shared_memory()\n"
    code = before + _LOOP.format(module=module).strip()
    text = own_dev_shm.output(_STORED.format(code=code.replace("\n", "\n    ")), size="3k")
    assert text.startswith("created\nwritten\n")
    assert "created" not in text[16:]
    assert "tmpfs space of /dev/shm leaves 0 bytes" in text


# --- pytorch#176069

_MAP_ALLOCATOR = """
import ctypes, errno, mmap, os, tempfile
libc = ctypes.CDLL(None, use_errno=True)
size = 8 << 20
file = tempfile.TemporaryFile(dir="/dev/shm")
os.ftruncate(file.fileno(), size)
ctypes.set_errno({stale})                              # what some call has left there before
while libc.posix_fallocate(file.fileno(), ctypes.c_long(0), ctypes.c_long(size)) != 0:
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.EOPNOTSUPP):
        break                                          # "the file system has no fallocate"
    raise SystemExit(f"unable to allocate shared memory(shm): {{os.strerror(number)}} ({{number}})")
print("allocated", flush=True)
mmap.mmap(file.fileno(), size)[:] = bytes(size)
"""


def test_176069_as_reported() -> None:
    """pytorch#176069: posix_fallocate returns its error, and errno, which is read, has an older one.

    With EAGAIN the full /dev/shm is "Resource temporarily unavailable"; with EINVAL the failure passes for a file system
    without fallocate, and the bus error that the call should prevent is back.
    """
    done = own_dev_shm.run(_MAP_ALLOCATOR.format(stale="errno.EAGAIN"), size="2m")
    assert done.stderr == "unable to allocate shared memory(shm): Resource temporarily unavailable (11)\n"
    done = own_dev_shm.run(_MAP_ALLOCATOR.format(stale="errno.EINVAL"), size="2m")
    assert (done.stdout, done.returncode) == ("allocated\n", -signal.SIGBUS)


@pytest.mark.parametrize("headroom", ["check", "ignore"])
def test_176069_with_prefault(headroom: str) -> None:
    """The cause is right by the limits, and by the kernel's answer alone."""
    code = f"""
import ctypes, errno, mmap, os, tempfile
from prefault import engines
file = tempfile.TemporaryFile(dir="/dev/shm")
os.ftruncate(file.fileno(), 8 << 20)
ctypes.set_errno(errno.EAGAIN)
try:
    engines.populate(mmap.mmap(file.fileno(), 8 << 20), headroom={headroom!r}, rollback=True)
except engines.PopulateError as error:
    print(type(error).__name__, error)
"""
    text = own_dev_shm.output(code, size="2m")
    assert text.startswith("HeadroomError" if headroom == "check" else "BackingFullError")
    assert "/dev/shm" in text
    assert "Resource temporarily unavailable" not in text


# --- qdrant#6923

_FILE = 64 << 20


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.dat"
    with open(path, "wb") as file:
        file.write(bytes(_FILE))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_6923_as_reported(cold_file: Path) -> None:
    """qdrant#6923: MADV_POPULATE_READ obeys MADV_RANDOM: a mapping with that advice is read page by page."""
    with open(cold_file, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as vectors:
        vectors.madvise(mmap.MADV_RANDOM)
        before = _major_faults()
        vectors.madvise(22, 0, 4 << 20)  # MADV_POPULATE_READ, of a part: all of it takes seconds
        assert _major_faults() - before >= 1000  # of 1024 pages


def test_6923_with_prefault(cold_file: Path) -> None:
    with open(cold_file, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as vectors:
        vectors.madvise(mmap.MADV_RANDOM)
        before = _major_faults()
        assert engines.populate(vectors).bytes == _FILE
        assert _major_faults() - before <= _FILE // 4096 // 16

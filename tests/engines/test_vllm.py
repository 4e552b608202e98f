"""Three failures of vLLM's shared region for offloaded KV cache, as reported, and with one call of prefault.engines."""

from __future__ import annotations

import mmap
import os
import signal
import tempfile

import pytest

import prefault
from prefault import engines
from support import own_dev_shm
from support.cgroups import groups
from support.children import in_child
from support.ended_children import exit_code

# SharedOffloadRegion: a file in /dev/shm that several workers map, each of which populates its part.
_REGION = """
import mmap, os, sys
size = 8 << 20
path = "/dev/shm/vllm_offload.mmap"
fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
os.unlink(path)
os.ftruncate(fd, size)
region = mmap.mmap(fd, size)
"""

_MADVISE = f"""
{_REGION}
try:
    region.madvise(23, 0, size)                 # MADV_POPULATE_WRITE
except OSError as error:
    print(error)
"""

_ONE_CALL = f"""
{_REGION}
from prefault import engines
try:
    print(engines.populate(region).bytes)
except engines.HeadroomError as error:
    print(error.needed_bytes, error.available_bytes, error)
"""


def test_46949_as_reported() -> None:
    """vllm#46949: a region larger than /dev/shm fails by "[Errno 14] Bad address", which names neither size nor remedy.

    So quoted by its fixes, #47073 and #50358.
    """
    assert own_dev_shm.output(_MADVISE, size="2m") == "[Errno 14] Bad address\n"


def test_46949_with_prefault() -> None:
    text = own_dev_shm.output(_ONE_CALL, size="2m")
    assert text.startswith(f"{8 << 20} {2 << 20} ")
    assert "tmpfs space of /dev/shm leaves 2.0 MiB" in text
    assert "--shm-size" in text


_ON_AN_OLD_KERNEL = "from support import old_kernel; old_kernel.pretend()\n"


def test_44888_as_reported() -> None:
    """vllm#44888: on kernels before 5.14 the region cannot be populated: "[Errno 22] Invalid argument"."""
    assert own_dev_shm.output(_ON_AN_OLD_KERNEL + _MADVISE, size="16m") == "[Errno 22] Invalid argument\n"


def test_44888_with_prefault() -> None:
    code = _ON_AN_OLD_KERNEL + _ONE_CALL + "print(os.fstat(fd).st_blocks * 512)"
    assert own_dev_shm.output(code, size="16m") == f"{8 << 20}\n{8 << 20}\n"


def test_44888_a_full_tmpfs_on_an_old_kernel() -> None:
    """The fallback that vLLM took, touching each page, would be a SIGBUS here."""
    touching = f"{_ON_AN_OLD_KERNEL}{_REGION}\nfor at in range(0, size, 4096): region[at] = 0"
    assert own_dev_shm.run(touching, size="2m").returncode == -signal.SIGBUS
    assert "2.0 MiB" in own_dev_shm.output(_ON_AN_OLD_KERNEL + _ONE_CALL, size="2m")


_SIZE = 128 << 20


def _region() -> mmap.mmap:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), _SIZE)
        return mmap.mmap(file.fileno(), _SIZE)


def test_54014_as_reported() -> None:
    """vllm#54014: /dev/shm has the space and the container has not: the OOM killer ends the worker without a word."""
    with groups() as make:
        group = make(64 << 20)

        def populate() -> None:
            space = os.statvfs("/dev/shm")
            assert space.f_bavail * space.f_frsize > _SIZE  # the check of the file system is content
            _region().madvise(23, 0, _SIZE)

        assert exit_code(group.inside(populate)) == -signal.SIGKILL
        assert group.killed >= 1


def test_54014_with_prefault() -> None:
    with groups() as make:
        group = make(64 << 20)

        def populate() -> tuple[str, engines.ContainerMemory]:
            with pytest.raises(engines.HeadroomError) as caught:
                engines.populate(_region())
            return str(caught.value), engines.container_memory()

        text, memory = in_child(group.inside(populate))
        assert group.killed == 0
    assert str(group.limit_file) in text
    assert memory.limit_bytes == 64 << 20
    assert str(group.directory) in memory.limited_by
    assert memory.shared_bytes == memory.available_bytes <= memory.free_bytes + memory.reclaimable_bytes < 64 << 20


def test_54014_page_cache_is_no_reason_to_refuse(tmp_path: os.PathLike[str]) -> None:
    """vLLM warns only, since usage counts page cache that the kernel would give up. Here it does not count."""
    path = f"{os.fspath(tmp_path)}/checkpoint"
    with open(path, "wb") as file:
        file.write(bytes(48 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with groups() as make:
        group = make(64 << 20)

        def read_then_populate() -> tuple[engines.ContainerMemory, int]:
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
            memory = engines.container_memory()
            return memory, prefault.populate(mmap.mmap(-1, 32 << 20)).bytes

        memory, populated = in_child(group.inside(read_then_populate))
        assert group.killed == 0
    assert memory.free_bytes < 20 << 20  # limit minus usage: the checkpoint counts
    assert memory.reclaimable_bytes > 30 << 20
    assert memory.available_bytes > 32 << 20
    assert populated == 32 << 20

"""Two failures of SGLang's host memory pool, as reported, and with one call of prefault.engines."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable

import numpy

import prefault
from prefault import engines
from support import oracle, own_dev_shm

_MIB = 1 << 20
_MAP_POPULATE = 0x8000


def _address(memory: mmap.mmap) -> int:
    return int(numpy.frombuffer(memory, "uint8").ctypes.data)


def test_36705_as_reported() -> None:
    """sglang#36705: MAP_POPULATE has populated all of it when MADV_POPULATE_WRITE walks through it again."""
    with mmap.mmap(-1, 4 * _MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_POPULATE) as memory:
        assert all(oracle.present(_address(memory), 4 * _MIB))
        before = oracle.minor_faults()
        memory.madvise(23, 0, 4 * _MIB)
        assert oracle.minor_faults() - before < 16  # all of that for nothing


_SWALLOWED = """
import mmap, os, tempfile
size = 8 << 20
file = tempfile.TemporaryFile(dir="/dev/shm")
os.ftruncate(file.fileno(), size)
memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED | 0x8000)     # MAP_POPULATE: no error
print("mapped", flush=True)
try:
    memory.madvise(23, 0, size)
except OSError:
    pass                                                                     # "a kernel without it"
memory[:] = bytes(size)
"""

_ONE_CALL = """
import mmap, os, tempfile
from prefault import engines
size = 8 << 20
file = tempfile.TemporaryFile(dir="/dev/shm")
os.ftruncate(file.fileno(), size)
memory = mmap.mmap(file.fileno(), size)
try:
    engines.populate(memory)
except engines.HeadroomError as error:
    print(error)
"""


def test_36705_the_failure_that_was_swallowed() -> None:
    done = own_dev_shm.run(_SWALLOWED, size="2m")
    assert (done.stdout, done.returncode) == ("mapped\n", -signal.SIGBUS)


def test_36705_with_prefault() -> None:
    with mmap.mmap(-1, 4 * _MIB) as memory:
        result = engines.populate(memory)
        assert result.bytes == 4 * _MIB
        assert all(oracle.present(_address(memory), 4 * _MIB))
        again = engines.populate(memory)
        assert (again.bytes, again.present_bytes) == (0, 4 * _MIB)  # what is there is seen, and not walked through
    assert "tmpfs space of /dev/shm leaves 2.0 MiB" in own_dev_shm.output(_ONE_CALL, size="2m")


def _available() -> int:
    """Read what psutil.virtual_memory().available is."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def test_38208(hugetlb_pool: Callable[[int], None]) -> None:
    """sglang#38208 (#34972): memory is checked by MemAvailable, which lacks the huge pages that are reserved for the pool.

    As reported, the request fits without the reservation, and is refused with it though the hugetlb pool is all free. The
    reserve that SGLang leaves to the host, 10 GB there, is chosen so that it shows on a machine of any size.
    """
    request = 512 * _MIB
    refused = False
    for _ in range(5):  # another program may free or take memory in between
        hugetlb_pool(0)
        reserve = _available() - request - 200 * _MIB
        fits_without = request <= _available() - reserve
        hugetlb_pool(request // (2 * _MIB))
        refused = fits_without and request > _available() - reserve
        if refused:
            break
    assert refused  # as reported

    memory = engines.container_memory()
    assert memory.huge_page_bytes[2 * _MIB] == request
    assert engines.headroom(prefault.Hugetlb()).available_bytes == request
    pool = prefault.Mapping(request, backing="hugetlb")
    assert engines.populate(pool).bytes == request
    assert engines.container_memory().huge_page_bytes[2 * _MIB] == 0
    pool.close()

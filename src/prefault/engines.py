"""A small, stable part of prefault for inference engines and others that call madvise by hand.

docs/engines.md has the promise: what is here keeps its name, arguments, results and errors as long as :data:`API_VERSION`
is 1; arguments and fields may be added. The calls are those of :mod:`prefault` itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prefault._system import hugetlb
from prefault.engine.populating import PopulateResult, populate
from prefault.errors import BackingFullError, HeadroomError, PopulateError
from prefault.limits.limit import Headroom
from prefault.limits.target import headroom
from prefault.memory.backings import Hugetlb
from prefault.sizes import Size, format_size, parse_size

__all__ = [
    "API_VERSION",
    "BackingFullError",
    "ContainerMemory",
    "Headroom",
    "HeadroomError",
    "PopulateError",
    "PopulateResult",
    "RawMemory",
    "container_memory",
    "headroom",
    "memory_at",
    "populate",
]

API_VERSION = 1
"""Version of this module's promise. It grows when something here is taken away or changes its meaning, and never else."""


class ContainerMemory(NamedTuple):
    """Memory that this process may still take, in bytes, when it was read: see :func:`container_memory`.

    Attributes:
        limited_by: name of the limit that leaves least memory: that of a memory cgroup, of its own or above it, or
            ``"MemAvailable"`` of the machine.
        limit_bytes: that limit.
        used_bytes: memory that counts against it; page cache and shared memory included.
        free_bytes: room that is left without reclaim: the page cache can grow by this before older pages are evicted.
        reclaimable_bytes: clean page cache, free swap and slabs that the kernel gives up by itself for new memory.
        available_bytes: memory that may still be populated: free and reclaimable, less a reserve for the interpreter.
        shared_bytes: bytes of that which files in /dev/shm may take: the least of it and of the space of the tmpfs.
        huge_page_bytes: free hugetlb memory by page size, which is in none of the other numbers.
        remedy: the setting to change, for an error message.
    """

    limited_by: str
    limit_bytes: int
    used_bytes: int
    free_bytes: int
    reclaimable_bytes: int
    available_bytes: int
    shared_bytes: int
    huge_page_bytes: dict[int, int]
    remedy: str

    def __str__(self) -> str:
        return (
            f"{format_size(self.available_bytes)} left by {self.limited_by} ({format_size(self.used_bytes)} of"
            f" {format_size(self.limit_bytes)} used, {format_size(self.reclaimable_bytes)} reclaimable);"
            f" {format_size(self.shared_bytes)} of it in /dev/shm"
        )


def container_memory() -> ContainerMemory:
    """Return how much memory this process may take before a limit of its container or of the machine stops or kills it.

    ``psutil.virtual_memory()`` and /proc/meminfo show the machine, and not the limits of cgroups; ``memory.max`` less
    ``memory.current`` counts page cache as used, that the kernel would give up; ``df /dev/shm`` knows neither; and reserved
    huge pages are in none of them. This call reads all levels of cgroups, v1 and v2.

    Raises:
        OSError: no limit can be read, since no /proc is mounted.

    Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; proc_meminfo(5); statvfs(3).
    """
    limits = headroom().limits
    memory = min(
        (limit for limit in limits if limit.bounds == "memory"), key=lambda limit: limit.available_bytes, default=None
    )
    if memory is None:
        raise OSError("no limit on memory can be read: mount /proc (mount -t proc proc /proc)")
    shared = [limit.available_bytes for limit in limits if limit.bounds == "tmpfs space"]
    pools = {page_size: headroom(Hugetlb(page_size)).available_bytes or 0 for page_size in hugetlb.page_sizes()}
    return ContainerMemory(
        limited_by=memory.name,
        limit_bytes=memory.limit_bytes,
        used_bytes=memory.used_bytes,
        free_bytes=max(0, memory.limit_bytes - memory.used_bytes),
        reclaimable_bytes=memory.reclaimable_bytes,
        available_bytes=memory.available_bytes,
        shared_bytes=min([memory.available_bytes, *shared]),
        huge_page_bytes=pools,
        remedy=memory.remedy,
    )


class RawMemory:
    """Memory at an address, which :func:`populate` and :func:`headroom` take as a buffer; numpy does too.

    Attributes:
        address: of the first byte.
        length: bytes.
    """

    def __init__(self, address: int, length: int, *, writable: bool = True) -> None:
        self.address = address
        self.length = length
        self.__array_interface__: dict[str, Any] = {
            "data": (address, not writable), "shape": (length,), "typestr": "|u1", "version": 3,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"<RawMemory of {format_size(self.length)} at {self.address:#x}>"


def memory_at(address: int, length: Size, *, writable: bool = True) -> RawMemory:
    """Return memory that a C library mapped, given by its address, as a buffer for :func:`populate` and others.

    The caller keeps it mapped during the call. A hole is an error of populate, and no crash.

    Args:
        address: of the first byte, such as ``tensor.data_ptr()``; it need not be a multiple of the page size.
        length: bytes (a number or ``"2 GiB"``).
        writable: False populates readable by default.

    Raises:
        ValueError, TypeError: no address or length.
    """
    if isinstance(address, bool) or not isinstance(address, int):
        raise TypeError(f"an address is a number, not {type(address).__name__}")
    count = parse_size(length)
    if address <= 0 or address + count > 1 << 64:
        raise ValueError(f"{address:#x} with {count} bytes is no range of addresses")
    return RawMemory(address, count, writable=writable)

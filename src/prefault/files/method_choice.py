"""Choice of the fastest way to read a file: candidates by file system, measured on the first pieces of the work itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prefault._system.cpus import usable_cpus
from prefault.files.open_file import OpenFile
from prefault.files.warm_methods import MethodName, WarmMethod, can_populate
from prefault.sizes import MIB

_LOCAL = frozenset({"ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", "squashfs", "erofs", "iso9660", "vfat",
                    "exfat", "ntfs3", "block device"})  # fmt: skip
"""File systems of local disks: one populating thread keeps such a disk busy."""

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
"""File systems whose pages are nowhere but in memory, or in swap."""

PROBE_BYTES = 16 * MIB
"""Bytes of one measurement. They are part of the work, and are not read again."""

_WORTH_BYTES = {True: 1024 * MIB, False: 256 * MIB}
"""Missing bytes of one file from which on measuring pays, by whether its disk is local. Below: the first candidate."""

_MUCH_FASTER = 1.1
"""Factor by which another method has to be faster than the first candidate: a measurement of 16 MiB is rough."""

_MUCH_SLOWER = 1.3


class Measurement(NamedTuple):
    """Result of one probe."""

    method: WarmMethod
    bytes_per_second: float


def candidates(file: OpenFile, threads: int | None = None, name: MethodName | None = None) -> list[WarmMethod]:
    """Return the methods that may be the fastest for a file, the most promising first.

    Args:
        file: the file.
        threads: a fixed number of threads; None: as many as pay.
        name: a fixed method; None: any.
    """
    cpus = usable_cpus()
    if file.file_system in _IN_MEMORY:  # to populate a hole of tmpfs would allocate it
        found = [WarmMethod("pread", min(cpus, 4))]
    elif file.file_system in _LOCAL:
        found = [WarmMethod("populate", 1), WarmMethod("populate", min(cpus, 4))]
    else:
        # A server is as slow for one request as for many: threads wait for it, they do not compute.
        found = [WarmMethod("readahead", 4), WarmMethod("pread", 16), WarmMethod("populate", 4)]
    if name is not None:
        found = [method for method in found if method.name == name][:1] or [WarmMethod(name, found[0].threads)]
    if not can_populate():
        found = [method for method in found if method.name != "populate"] or [WarmMethod("readahead", found[0].threads)]
    if threads is not None:
        found = [WarmMethod(method.name, threads) for method in found]
    return list(dict.fromkeys(found))


class MethodChoice:
    """Memory of which method was fastest on which device, for all files of one call."""

    def __init__(self, threads: int | None = None, name: MethodName | None = None) -> None:
        self._threads = threads
        self._name = name
        self._best: dict[tuple[int, str], WarmMethod] = {}

    def known(self, file: OpenFile) -> WarmMethod | None:
        """Return the method that was fastest for files of this device; None before it was measured."""
        return self._best.get(_key(file))

    def first(self, file: OpenFile) -> WarmMethod:
        """Return the method for a file that is too small to measure."""
        return self.known(file) or candidates(file, self._threads, self._name)[0]

    def is_worth_probing(self, file: OpenFile, missing_bytes: int) -> bool:
        """Tell whether a file has enough to be read for measurements, and the device has not been measured yet."""
        worth = missing_bytes >= _WORTH_BYTES[file.file_system in _LOCAL]
        return worth and self.known(file) is None and len(self._candidates(file)) > 1

    def _candidates(self, file: OpenFile) -> list[WarmMethod]:
        return candidates(file, self._threads, self._name)

    def probes(self, file: OpenFile, measured: list[Measurement]) -> Iterator[WarmMethod]:
        """Yield the methods to measure next, each twice unless it is far behind; the caller appends to ``measured``."""
        yield from self._candidates(file)
        fastest = max(one.bytes_per_second for one in measured)
        for one in list(measured):
            if one.bytes_per_second * _MUCH_SLOWER >= fastest:
                yield one.method

    def decide(self, file: OpenFile, measured: list[Measurement]) -> WarmMethod:
        """Keep and return the method whose best measurement was fastest, or the first candidate if that is about as fast."""
        first = self._candidates(file)[0]
        preferred = max(one.bytes_per_second for one in measured if one.method == first)
        fastest = max(measured, key=lambda one: one.bytes_per_second)
        best = first if fastest.bytes_per_second < _MUCH_FASTER * preferred else fastest.method
        self._best[_key(file)] = best
        return best


def small_file_threads(path: str) -> int:
    """Return how many small files to read at one time where ``path`` lies."""
    try:
        with OpenFile(path) as file:
            kind = file.file_system
    except OSError:
        return 1
    return 1 if kind in _IN_MEMORY else 2 * usable_cpus() if kind in _LOCAL else 16


def _key(file: OpenFile) -> tuple[int, str]:
    return file.identity.device, file.file_system

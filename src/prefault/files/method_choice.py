"""Choice of the fastest way to read a file: candidates by file system, measured on the first pieces of the work itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic
from typing import NamedTuple

from prefault._system.cpus import usable_cpus
from prefault.files.file_systems import IN_MEMORY
from prefault.files.open_file import OpenFile
from prefault.files.warm_methods import METHOD_NAMES, MethodName, WarmMethod, can_populate, over_read_bytes
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB

_LOCAL = frozenset({"ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", "squashfs", "erofs", "iso9660", "vfat",
                    "exfat", "ntfs3", "block device"})  # fmt: skip
"""File systems of local disks: one populating thread keeps such a disk busy."""

_PROBE_BYTES = 32 * MIB
"""Bytes of one measurement. They are part of the work, and are not read again."""

_WORTH_BYTES = {True: 4096 * MIB, False: 1024 * MIB}
"""Missing bytes of a device from which on measuring pays, by whether its disk is local: what slower methods lose on their
pieces is then some hundredths at most. Below: the first candidate."""

_HUGE = 2 * MIB

_ROOM_BYTES = 512 * MIB
"""Missing bytes in one run that measuring needs, so that a method finds nothing that another one has read ahead."""

_WORTH_ASKING_BYTES = 32 * MIB
"""Missing bytes from which on the time of one request is measured first, where a file has a server."""

_SLOW_SECONDS = 0.008
"""Time of a request from which on larger requests count for more than more of them: sixteen threads that read by 256 KiB get
500 MB/s at most then. Only through huge pages does the kernel ask for 1 MiB, whatever ``read_ahead_kb`` is."""

_MUCH_FASTER = 1.1
"""Factor by which the slowest measurement of another method has to beat the fastest of the first candidate: pieces of 32 MiB
tell roughly, and the first candidate is the first for a reason."""

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
    if file.file_system in IN_MEMORY:  # to populate a hole of tmpfs would allocate it
        found = [WarmMethod("pread", min(cpus, 4))]
    elif file.file_system in _LOCAL:
        found = [WarmMethod("populate", 1), WarmMethod("populate", min(cpus, 4))]
    else:
        # A server is as slow for one request as for many: threads wait for it, they do not compute.
        found = [WarmMethod("pread", 16), WarmMethod("readahead", 4), WarmMethod("populate", 4)]
    if name is not None:
        found = [method for method in found if method.name == name][:1] or [WarmMethod(name, found[0].threads)]
    if not can_populate():
        found = [method for method in found if method.name != "populate"] or [WarmMethod("readahead", found[0].threads)]
    if threads is not None:
        found = [WarmMethod(method.name, threads) for method in found]
    return list(dict.fromkeys(found))


class MethodChoice:
    """Memory of which method was fastest on which device, for all files of one call.

    Args:
        threads: a fixed number of threads; None: as many as pay.
        name: a fixed method; None: any.

    Raises:
        ValueError: a method that is none, or a wrong number of threads.
    """

    def __init__(self, threads: int | None = None, name: MethodName | None = None) -> None:
        if name is not None and name not in METHOD_NAMES:
            raise ValueError(f"method is one of {', '.join(METHOD_NAMES)}, not {name!r}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
            raise ValueError(f"threads is a number from 1 to 1024, not {threads!r}")
        self._threads = threads
        self._name = name
        self._best: dict[tuple[int, str], WarmMethod] = {}
        self._missing: dict[tuple[int, str], int] = {}
        self._request_seconds: dict[tuple[int, str], float] = {}

    def first(self, file: OpenFile) -> WarmMethod:
        """Return the method that was fastest on the device of a file; before it was measured, the first candidate."""
        return self._best.get(_key(file)) or self._candidates(file)[0]

    def _candidates(self, file: OpenFile) -> list[WarmMethod]:
        found = candidates(file, self._threads, self._name)
        if self._request_seconds.get(_key(file), 0.0) >= _SLOW_SECONDS:
            found.sort(key=lambda method: method.name != "populate")
        return found

    def asks_first(self, file: OpenFile, missing_bytes: int) -> bool:
        """Tell whether to measure one request, for :meth:`asked`, before the method is chosen."""
        if file.file_system in _LOCAL or missing_bytes < _WORTH_ASKING_BYTES or _key(file) in self._request_seconds:
            return False
        return len(self._candidates(file)) > 1

    def asked(self, file: OpenFile, seconds: float) -> None:
        """Note how long one small request to the server of a file took."""
        self._request_seconds[_key(file)] = seconds

    def place_to_measure(self, file: OpenFile, missing: RangeSet) -> PageRange | None:
        """Return the missing run of a file to measure methods on, for :meth:`measure`; None: measuring does not pay.

        It begins at a huge page, which populating would read from its start.

        To be asked once for each file: its bytes count as missing on its device.
        """
        key = _key(file)
        self._missing[key] = self._missing.get(key, 0) + missing.length
        if self._missing[key] < _WORTH_BYTES[file.file_system in _LOCAL] or key in self._best:
            return None
        longest = max(missing, key=lambda pages: pages.length)
        if longest.length < _ROOM_BYTES or len(self._candidates(file)) == 1:
            return None
        return PageRange(longest.start + -longest.start % _HUGE, longest.stop)

    def measure(
        self, file: OpenFile, place: PageRange, bring_in: Callable[[PageRange, WarmMethod], int]
    ) -> PageRange:  # fmt: skip
        """Bring in the beginning of a run by one candidate after another, and remember the fastest for :meth:`first`.

        Each is measured twice, unless it is far behind. The pieces follow each other without a gap; before a piece, what the
        method before may have read ahead is brought in, and not measured.

        Args:
            file: the file.
            place: the run.
            bring_in: brings in a piece by a method and returns the bytes that were read; 0: the work is to end.

        Returns:
            The end of the run, which is still to be brought in.
        """
        measured: list[Measurement] = []
        at, ahead = place.start, 0
        for method in self._probes(file, measured):
            ready = PageRange(at, at + ahead)
            piece = PageRange(ready.stop, ready.stop + _PROBE_BYTES)
            ahead = 0 if method.is_exact else over_read_bytes(file)
            if piece.stop + ahead > place.stop:
                break
            at = piece.stop
            if ready and not bring_in(ready, method):
                break
            began = monotonic()
            done = bring_in(piece, method)
            if not done:
                break
            measured.append(Measurement(method, done / (monotonic() - began)))
        else:
            self._best[_key(file)] = _fastest(measured)
        return PageRange(at, place.stop)

    def _probes(self, file: OpenFile, measured: list[Measurement]) -> Iterator[WarmMethod]:
        """Yield the methods to measure next, each twice unless it is far behind; the caller appends to ``measured``."""
        yield from self._candidates(file)
        fastest = max(one.bytes_per_second for one in measured)
        for one in list(measured):
            if one.bytes_per_second * _MUCH_SLOWER >= fastest:
                yield one.method


def _fastest(measured: list[Measurement]) -> WarmMethod:
    """Return the method that was faster than the first one each time, and the most so; else the first."""
    speeds: dict[WarmMethod, list[float]] = {}
    for method, speed in measured:
        speeds.setdefault(method, []).append(speed)
    first = measured[0].method
    best = max(speeds, key=lambda method: min(speeds[method]))
    return best if min(speeds[best]) > _MUCH_FASTER * max(speeds[first]) else first


def small_file_threads(path: str) -> int:
    """Return how many small files to read at one time where ``path`` lies."""
    try:
        with OpenFile(path) as file:
            kind = file.file_system
    except OSError:
        return 1
    return 1 if kind in IN_MEMORY else 2 * usable_cpus() if kind in _LOCAL else 16


def _key(file: OpenFile) -> tuple[int, str]:
    return file.identity.device, file.file_system

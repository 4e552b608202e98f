"""Small drivers: well-behaved ones here, deliberately broken ones in ``bad_devices.py``."""

from __future__ import annotations

import os
import random
import threading
import time
import zlib
from array import array
from typing import Any

from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import ZERO, Device, DeviceArea, FaultAround, Recipe, Supplied
from prefault.sizes import MIB, PAGE_SIZE

HUGE = 2 * MIB


def content(page: int, page_size: int = PAGE_SIZE, salt: int = 1) -> bytes:
    """Return the bytes of a page of :class:`Pattern`: all words of all pages differ, and none is zero."""
    first = ((salt & 0xFFFF) << 48) + ((page + 1) << 20)
    count = page_size // 8
    if page_size == PAGE_SIZE:
        return array("Q", range(first, first + count)).tobytes()
    import numpy  # its import takes longer than most servers of tests run

    return (numpy.arange(count, dtype=numpy.uint64) + numpy.uint64(first)).tobytes()


def expected(device: Pattern, page: int) -> bytes:
    """Return a page as a client sees it, with zeros behind the end of the device."""
    inside = min(device.page_size, device.length - page * device.page_size)
    return content(page, device.page_size, device.salt)[:inside] + bytes(device.page_size - inside)


class Pattern(Device):
    """Supplies bytes that follow from the page number. ``tail``: bytes that the last page lacks."""

    def __init__(
        self, pages: int = 64, *, salt: int = 1, page_size: int = PAGE_SIZE, writable: bool = False, workers: int = 0,
        tail: int = 0, fault_around: FaultAround | None = None, restartable: bool = False, populates: bool = True,
        capacity_pages: int | None = None, timeout_s: float = 30.0, batch_pages: int | None = None,
    ) -> None:  # fmt: skip
        self.length = pages * page_size - tail
        self.salt = salt
        self.page_size = page_size
        self.writable = writable
        self.workers = workers
        self.fault_around = fault_around
        self.restartable = restartable
        self.populates = populates
        self.timeout_s = timeout_s
        self.capacity = None if capacity_pages is None else capacity_pages * page_size
        if batch_pages is not None:
            self.batch = batch_pages * page_size

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = expected(self, page)
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        view = area.frames(pages)
        for index, page in enumerate(pages):
            view[index * self.page_size : (index + 1) * self.page_size] = expected(self, page)


class Remade(Pattern):
    """A restartable :class:`Pattern` with a recipe."""

    def __init__(self, pages: int = 64, *, salt: int = 1, workers: int = 0, writable: bool = False, tail: int = 0) -> None:
        super().__init__(pages, salt=salt, workers=workers, writable=writable, tail=tail, restartable=True)
        self._arguments = {"pages": pages, "salt": salt, "workers": workers, "writable": writable, "tail": tail}

    def recipe(self) -> Recipe | None:
        return Recipe("support.devices:Remade", self._arguments)


class WithoutPopulate(Device):
    """Defines ``length`` and ``fault`` only; half of the pages are zeros."""

    writable = False

    def __init__(self, pages: int = 40) -> None:
        self.length = pages * self.page_size

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page % 2:
            return ZERO
        area.frame(page)[:] = content(page)
        return None


class Slow(Pattern):
    """Sleeps up to ``delay_s`` in every call, at random."""

    def __init__(self, pages: int = 64, *, delay_s: float = 0.002, seed: int = 0, **options: Any) -> None:
        super().__init__(pages, **options)
        self._delay_s = delay_s
        self._random = random.Random(seed)

    def _sleep(self) -> None:
        time.sleep(self._random.random() * self._delay_s)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        frame = area.frame(page)
        half = len(frame) // 2
        frame[:half] = expected(self, page)[:half]
        self._sleep()
        frame[half:] = expected(self, page)[half:]

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class Failing(Pattern):
    """Cannot supply the pages in ``bad``; populate raises before it writes anything."""

    def __init__(self, pages: int = 64, *, bad: tuple[int, ...] = (3,), **options: Any) -> None:
        super().__init__(pages, **options)
        self.bad = bad

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page in self.bad:
            raise ValueError(f"page {page} is worn out")
        return super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            if page in self.bad:
                raise ValueError(f"page {page} is worn out")
        super().populate(area, pages, access)


class Enclave(Device):
    """Has a small pool, evicts pages encrypted and decrypts them on return, like an enclave page cache.

    New pages are zeros. Sealed ones have a checksum, so that a page that comes back wrong is an error and not a wrong byte.
    """

    evicts = True

    def __init__(self, pages: int = 64, *, capacity_pages: int = 16, key: int = 0x5A, workers: int = 0) -> None:
        self.length = pages * self.page_size
        self.capacity = capacity_pages * self.page_size
        self.workers = workers
        self._key = key
        self._sealed: dict[int, tuple[int, bytes]] = {}
        self._lock = threading.Lock()
        self._hand = 0

    def _flip(self, text: bytes) -> bytes:
        return text.translate(bytes(byte ^ self._key for byte in range(256)))

    def _seal(self, run: range, view: memoryview) -> None:
        for index, page in enumerate(run):
            clear = bytes(view[index * self.page_size : (index + 1) * self.page_size])
            with self._lock:
                self._sealed[page] = (zlib.crc32(clear), self._flip(clear))

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        with self._lock:
            sealed = self._sealed.get(page)
        if sealed is None:
            return ZERO
        clear = self._flip(sealed[1])
        if zlib.crc32(clear) != sealed[0]:
            raise ValueError(f"page {page} was tampered with")
        area.frame(page)[:] = clear
        return None

    def discard(self, area: DeviceArea, pages: range) -> None:
        with self._lock:
            for page in pages:
                self._sealed.pop(page, None)

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        # Round and round, so that no page is always the one to go.
        everything = self.length // self.page_size
        order = (range(self._hand, everything), range(self._hand))
        freed = 0
        for part in order:
            for run in area.ready(part):
                taken = run[: pages - freed]
                area.evict(taken, self._seal)
                freed += len(taken)
                self._hand = taken[-1] + 1
                if freed >= pages:
                    return


class Saved(Device):
    """Writable, with a file as its store: evicted pages are saved there and loaded from there, also by a new process.

    All that is supplied is saved at its end.
    """

    evicts = True
    restartable = True

    def __init__(self, path: str, pages: int = 64, *, capacity_pages: int = 24, workers: int = 0) -> None:
        self.length = pages * self.page_size
        self.capacity = capacity_pages * self.page_size
        self.workers = workers
        self._path = path
        self._arguments = {"path": path, "pages": pages, "capacity_pages": capacity_pages, "workers": workers}

    def recipe(self) -> Recipe | None:
        return Recipe(f"{type(self).__module__}:{type(self).__name__}", self._arguments)

    def start(self, pool: DevicePool) -> None:
        self._pool = pool

    def stop(self) -> None:
        self._pool.evict(self._pool.pages, self._save)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        self.populate(area, range(page, page + 1), access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            view = area.frames(pages)
            done = 0
            while done < len(view):
                got = os.preadv(fd, [view[done:]], pages.start * self.page_size + done)
                if not got:  # behind the end of the file: zeros, as the frame is
                    break
                done += got
        finally:
            os.close(fd)

    def _save(self, run: range, view: memoryview) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(fd, view[done:], run.start * self.page_size + done)
        finally:
            os.close(fd)

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._save(pages, memoryview(bytes(len(pages) * self.page_size)))

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        freed = 0
        for run in area.ready(range(self.length // self.page_size)):
            taken = run[: pages - freed]
            area.evict(taken, self._save)
            freed += len(taken)
            if freed >= pages:
                return


class WritesWholePages(Pattern):
    """Writes all of the last frame, though the device ends in it: clients must not see the rest."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = content(page)
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)

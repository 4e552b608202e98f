"""Broken drivers, each wrong in one plausible way."""

from __future__ import annotations

import glob
import itertools
import os
import sys
import threading
import time
from typing import Any, NoReturn

import prefault.device
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import ZERO, DeviceArea, Supplied
from prefault.sizes import PAGE_SIZE
from support.devices import Enclave, Pattern, Saved, WithoutPopulate, content, expected


class ReturnsShort(Pattern):
    """Populate supplies the first half of what it is asked for, as read(2) might."""

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        super().populate(area, pages[: (len(pages) + 1) // 2], access)


class ReturnsCount(Pattern):
    """``fault`` returns how many bytes it read, as readinto does."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        super().fault(area, page, access)
        return self.page_size  # type: ignore[return-value]


class WritesNeighbour(Pattern):
    """Writes one page too far."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        super().fault(area, page, access)
        if (page + 1) * self.page_size < self.length:
            area.frame(page + 1)[:8] = b"OVERFLOW"


class OtherByPopulate(Pattern):
    """Supplies another byte in one page by populate than by fault."""

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        super().populate(area, pages, access)
        if 5 in pages:
            area.frame(5)[100] ^= 0xFF


class ForgetsLast(Pattern):
    """Treats the half-open range as closed, and leaves out the last page."""

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        super().populate(area, pages[:-1], access)


class RaisesOnPopulate(Pattern):
    """Raises on populate, and not on fault."""

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        raise NotImplementedError("populate is not written yet")


class Zeros(Pattern):
    """Returns without writing anything."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        return ZERO

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        pass


class Sleeps(Pattern):
    """Sleeps for longer than its timeout."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            time.sleep(3600)
        return super().fault(area, page, access)


class Loops(Pattern):
    """Never returns and holds the GIL: sum() of an endless iterator is one call in C."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            sum(itertools.repeat(0))
        return super().fault(area, page, access)


class Leaves(Pattern):
    """Calls os._exit, as a library might that was a C program."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            os._exit(3)
        return super().fault(area, page, access)


class CallsExit(Pattern):
    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            sys.exit("enough")
        return super().fault(area, page, access)


class KeepsViews(Pattern):
    """Keeps the frame in a pool of buffers for reuse."""

    _kept: memoryview | None = None

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        if self._kept is not None:
            self._kept[:8] = b"OVERFLOW"
        super().fault(area, page, access)
        self._kept = area.frame(page)[8:]


class WritesLater(Pattern):
    """Returns before its work is done."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        frame = area.frame(page)

        def finish() -> None:
            time.sleep(0.05)
            frame[:] = expected(self, page)

        threading.Thread(target=finish, daemon=True).start()


class OtherAfterDiscard(Pattern):
    """Does not reset a counter on discard."""

    def __init__(self) -> None:
        super().__init__()
        self._discarded: set[int] = set()

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._discarded.update(pages)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        super().fault(area, page, access)
        if page in self._discarded:
            area.frame(page)[:8] = b"leftover"

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class OneBufferForAllThreads(Pattern):
    """Allows concurrent calls, and has one buffer for all of them."""

    def __init__(self) -> None:
        super().__init__(workers=4)
        self._buffer = bytearray(self.page_size)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        self._buffer[:] = expected(self, page)
        area.frame(page)[:] = self._buffer

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class ByTheThread(Pattern):
    """Supplies bytes that depend on the calling thread."""

    def __init__(self) -> None:
        super().__init__(workers=4)
        self._numbers: dict[int, int] = {}

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        number = self._numbers.setdefault(threading.get_ident(), len(self._numbers))
        area.frame(page)[:] = content(page, salt=1 + number)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class TouchesItself(Pattern):
    """Maps its own device in the server, which then would have to answer itself."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 4:
            (path,) = glob.glob(f"{self.directory}/prefault-check-*/server-[0-9]*")
            with prefault.device.connect(path).map(access="read") as own:
                area.frame(page)[:] = own.memoryview()[: self.page_size]
            return None
        return super().fault(area, page, access)

    directory = ""
    """Directory of the sockets of check_device."""


class OpenRaises(Pattern):
    def open(self, area: DeviceArea) -> None:
        raise PermissionError("the medium is not in the drive")


class CloseRaises(Pattern):
    def close(self, area: DeviceArea) -> None:
        raise KeyError(area.pid)


class DiscardRaises(Pattern):
    def discard(self, area: DeviceArea, pages: range) -> None:
        raise NotImplementedError("discard is not written yet")


class RaisesForEver(Pattern):
    """Cannot supply a page that was not announced as failing."""

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 7:
            raise OSError(5, "the medium has a scratch")
        return super().fault(area, page, access)


class ForgetsWrites(Enclave):
    """Evicts without saving."""

    def _seal(self, run: range, view: memoryview) -> None:
        pass


class MixesUpSaved(Enclave):
    """Saves a run under the number of its last page."""

    def _seal(self, run: range, view: memoryview) -> None:
        super()._seal(range(run[-1], run[-1] + 1), view[: self.page_size])


class WritesReadOnes(Pattern):
    """Uses frames when it was not asked for any: on discard it clears them."""

    def discard(self, area: DeviceArea, pages: range) -> None:
        area.frame(pages.start)[:] = bytes(self.page_size)


class StartRaises(Pattern):
    def start(self, pool: DevicePool) -> None:
        raise FileNotFoundError("the medium is not in the drive")


class StopRaises(Pattern):
    def stop(self) -> None:
        raise BlockingIOError("busy")


class ForgetsAtItsEnd(Saved):
    """Saves what it evicts, and nothing at its end."""

    def stop(self) -> None:
        pass


class ForgetsDiscards(Saved):
    """Does not remove discarded pages from its store."""

    def discard(self, area: DeviceArea, pages: range) -> None:
        self._gone = {*getattr(self, "_gone", ()), *pages}

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            if page not in getattr(self, "_gone", ()):
                super().populate(area, range(page, page + 1), access)

    def _save(self, run: range, view: memoryview) -> None:
        for index, page in enumerate(run):
            if page not in getattr(self, "_gone", ()):
                super()._save(range(page, page + 1), view[index * self.page_size : (index + 1) * self.page_size])


class NoLength(Pattern):
    def __init__(self) -> None:
        self.salt = 1


class NegativeLength(Pattern):
    def __init__(self) -> None:
        super().__init__()
        self.length = -PAGE_SIZE


class OtherEachTime(Pattern):
    """The factory makes a device of another length each time."""

    _made = itertools.count(8)

    def __init__(self) -> None:
        super().__init__(next(self._made))


class NotTheSameByRecipe(Pattern):
    """The recipe forgets an argument."""

    def __init__(self, salt: int = 1) -> None:
        super().__init__(salt=salt)

    def recipe(self) -> Any:
        from prefault.device.driver import Recipe

        return Recipe("support.bad_devices:NotTheSameByRecipe", {})


class AlsoWithoutPopulate(WithoutPopulate):
    """Says that it does not populate, and does not mean it: by the framework's populate it does other things."""

    populates = False

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        raise RuntimeError("not today")


def fails_to_make() -> NoReturn:
    raise ConnectionError("no such device")

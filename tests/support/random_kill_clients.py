"""Clients of :mod:`support.random_kills`: random operations on device memory, with checks of its bytes."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import signal
import struct
import threading
import time
import traceback
from typing import Any, NoReturn

import numpy

import prefault
import prefault.device
import prefault.device.opening
import prefault.device.process.launching  # a fork in the middle of another thread's import would wait for it for ever
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import Device, DeviceArea, Recipe
from prefault.errors import DeviceError, PopulateError
from prefault.sizes import PAGE_SIZE
from support.devices import Saved, content

PAGES = 48
"""Pages of the device, or of each of its objects."""
OBJECTS = 32
OBJECT_PAGES = 512
"""Pages from the start of an object to the next one's: 2 MiB."""
THREADS = 3
ALARM_S = 5
"""Seconds for a fork of a client to touch one page."""
START_S = 12
"""Seconds for a fork that starts a device of its own: ten fresh Pythons at once take 2 to 3 s on two CPUs, or more."""
_SALTS = 4

_WORDS = numpy.arange(PAGE_SIZE // 8, dtype=numpy.uint64)

# Errors that a client may get once a process was killed, and not before.
_REFUSALS = (PopulateError, DeviceError, ConnectionError)

KILLED, STOP = 0, 1

OPERATIONS = ("touch", "write", "populate", "discard", "map", "unmap", "fork")
_WEIGHTS = (40, 20, 15, 10, 5, 5, 1)


class Sluggish(Saved):
    """A driver that loads pages from a file in two halves with a pause; threads evict all the time; discard does nothing."""

    def __init__(
        self, path: str, *, workers: int, restartable: bool, named: bool, delay_s: float, timeout_s: float = 30.0
    ) -> None:
        super().__init__(path, PAGES, capacity_pages=PAGES - 8, workers=workers)
        self._delay_s = delay_s
        self._named = named
        self.restartable = restartable
        self._all = {
            "path": path,
            "workers": workers,
            "restartable": restartable,
            "named": named,
            "delay_s": delay_s,
        }
        self._ends: dict[int, threading.Event] = {}

    def recipe(self) -> Recipe | None:
        return Recipe("support.random_kill_clients:Sluggish", self._all) if self._named else None

    def open(self, area: DeviceArea) -> None:
        self._ends[id(area)] = ends = threading.Event()
        threading.Thread(target=self._evict_some, args=(area, ends), daemon=True).start()

    def close(self, area: DeviceArea) -> None:
        self._ends.pop(id(area)).set()

    def discard(self, area: DeviceArea, pages: range) -> None:
        pass

    def _evict_some(self, area: DeviceArea, ends: threading.Event) -> None:
        chance = random.Random(area.pid)
        while not ends.wait(self._delay_s * 4):
            first = chance.randrange(PAGES)
            area.evict(range(first, min(first + 4, PAGES)), self._save)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        middle = pages.start + len(pages) // 2
        if middle > pages.start:
            self._load(area, pages, range(pages.start, middle))
        time.sleep(self._delay_s)
        self._load(area, pages, range(middle, pages.stop))

    def _load(self, area: DeviceArea, pages: range, part: range) -> None:
        view = area.frames(pages)[(part.start - pages.start) * PAGE_SIZE : (part.stop - pages.start) * PAGE_SIZE]
        with open(self._path, "rb", buffering=0) as file:
            assert os.preadv(file.fileno(), [view], part.start * PAGE_SIZE) == len(view)


class SluggishObjects(Sluggish):
    """A sluggish driver with many objects of :data:`PAGES` pages each, which the first server makes."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self.length = OBJECTS * OBJECT_PAGES * PAGE_SIZE
        self.capacity = OBJECTS * PAGES * PAGE_SIZE // 2

    def recipe(self) -> Recipe | None:
        return Recipe("support.random_kill_clients:SluggishObjects", self._all) if self._named else None

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        for number in range(OBJECTS):
            if object_name(number) not in {made.name for made in pool.objects()}:
                made = pool.create_object(object_name(number), PAGES * PAGE_SIZE)
                assert made.offset == number * OBJECT_PAGES * PAGE_SIZE

    def _evict_some(self, area: DeviceArea, ends: threading.Event) -> None:
        chance = random.Random(area.pid)
        while not ends.wait(self._delay_s * 4):
            first = chance.randrange(OBJECTS) * OBJECT_PAGES + chance.randrange(PAGES)
            area.evict(range(first, first + 4), self._save)


def object_name(number: int) -> str:
    """Return the name of an object of :class:`SluggishObjects`."""
    return f"object {number}"


class Board:
    """Memory that the killer shares with all clients: flags, and the operation of each thread."""

    _COUNT, _OPERATION = 0, 8
    _SLOT = 64

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE_SIZE)  # MAP_SHARED
        self._fd, self.writer = os.pipe()
        os.set_blocking(self._fd, False)

    def close(self) -> None:
        self._memory.close()
        os.close(self._fd)
        os.close(self.writer)

    def flag(self, which: int) -> bool:
        return self._memory[which] != 0

    def raise_flag(self, which: int) -> None:
        self._memory[which] = 1

    def step(self, slot: int, operation: int) -> None:
        at = (1 + slot) * self._SLOT
        (count,) = struct.unpack_from("=Q", self._memory, at)
        struct.pack_into("=QQ", self._memory, at, count + 1, operation)

    def steps(self, slot: int) -> int:
        return int(struct.unpack_from("=Q", self._memory, (1 + slot) * self._SLOT)[0])

    def operation(self, slot: int) -> str:
        return OPERATIONS[self._memory[(1 + slot) * self._SLOT + self._OPERATION]]

    def report(self, what: str) -> None:
        os.write(self.writer, f"{what[:200]} ... {what[-1500:]}\n".encode())

    def reports(self) -> list[str]:
        try:
            return os.read(self._fd, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []


class _Thread:
    """A thread of a client: random operations on areas of its own, with checks of their bytes."""

    def __init__(self, board: Board, slot: int, source: _Source, seed: int) -> None:
        self._board = board
        self._slot = slot
        self._source = source
        self._random = random.Random(seed)
        self._areas: list[Any] = []

    def run(self) -> None:
        try:
            while not self._board.flag(STOP):
                operation = self._random.choices(OPERATIONS, _WEIGHTS)[0] if self._areas else "map"
                self._board.step(self._slot, OPERATIONS.index(operation))
                try:
                    getattr(self, f"_{operation}")()
                except _REFUSALS as refusal:
                    if not self._board.flag(KILLED):
                        raise
                    self._forget(refusal)
                    time.sleep(0.002)
        except BaseException:  # noqa: BLE001  it is reported, and the round fails
            self._board.report(f"thread {self._slot}: {traceback.format_exc()}".replace("\n", " | "))
            while not self._board.flag(STOP):  # else it would seem to hang
                self._board.step(self._slot, 0)
                time.sleep(0.001)

    def close(self) -> None:
        for area in self._areas:
            with contextlib.suppress(*_REFUSALS):
                area.close()

    def _forget(self, refusal: BaseException) -> None:
        # A traceback refers to views of the area, which then could not be closed.
        traceback.clear_frames(refusal.__traceback__)

    def _map(self) -> None:
        if len(self._areas) >= 4:
            return
        offset = self._random.randrange(PAGES // 2) * PAGE_SIZE
        populate = self._random.random() < 0.3
        name = object_name(self._random.randrange(OBJECTS)) if self._source.objects else None
        self._areas.append(self._source.map(offset, PAGES // 2 * PAGE_SIZE, populate, name))

    def _unmap(self) -> None:
        self._areas.pop(self._random.randrange(len(self._areas))).close()

    def _pick(self) -> tuple[Any, int, int]:
        """Choose an area and a page of it; return both, with the page's number in the device."""
        area = self._random.choice(self._areas)
        index = self._random.randrange(len(area) // PAGE_SIZE)
        first = 0 if area.object is None else area.object.offset // PAGE_SIZE
        return area, index, first + index + area.offset // PAGE_SIZE

    def _touch(self) -> None:
        area, index, page = self._pick()
        wrong = _wrong(area, index, page)
        if wrong:
            self._board.report(f"thread {self._slot}: WRONG BYTES in page {page}: {wrong}")

    def _write(self) -> None:
        area, index, page = self._pick()
        new = numpy.frombuffer(content(page, salt=self._random.randint(1, _SALTS)), numpy.uint64)
        numpy.copyto(area.ndarray("uint64")[index * 512 : (index + 1) * 512], new)

    def _run(self) -> tuple[Any, dict[str, int]]:
        area, index, _ = self._pick()
        count = min(self._random.randint(1, 8), len(area) // PAGE_SIZE - index)
        return area, {"offset": index * PAGE_SIZE, "length": count * PAGE_SIZE}

    def _populate(self) -> None:
        area, where = self._run()
        prefault.populate(area, **where, access=self._random.choice(("read", "write")))  # type: ignore[arg-type]

    def _discard(self) -> None:
        area, where = self._run()
        prefault.discard(area, **where)

    def _fork(self) -> None:
        area, index, _ = self._pick()
        view = area.memoryview()
        anew = self._random.random() < 0.5
        pid = os.fork()
        if pid == 0:
            _be_grandchild(self._board, self._source, view, index, anew)
        view.release()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killed = self._board.flag(KILLED)
        well = status == 0 if anew else status == -signal.SIGSEGV
        if not well and not (killed and anew and status in (-signal.SIGBUS, 3)):
            self._board.report(f"thread {self._slot}: a fork that {'maps anew' if anew else 'touches'} ended with {status}")


def _wrong(area: Any, index: int, page: int) -> str:
    """Touch a page; return what is wrong with its bytes, whose words each name their origin, or an empty string."""
    words = numpy.zeros(512, numpy.uint64)
    numpy.copyto(words, area.ndarray("uint64")[index * 512 : (index + 1) * 512])  # without the GIL
    salts = words - _WORDS - numpy.uint64((page + 1) << 20)
    good = (salts & numpy.uint64((1 << 48) - 1)) == 0
    good &= (salts >> numpy.uint64(48) >= 1) & (salts >> numpy.uint64(48) <= _SALTS)
    if good.all():
        return ""
    at = int(numpy.argmin(good))
    return f"{int((~good).sum())} words, the first is {int(words[at]):#x} at word {at}"


def _be_grandchild(board: Board, source: _Source, view: memoryview, index: int, anew: bool) -> NoReturn:
    """Run a fork of a client: it may not touch its parent's areas, and may map the device itself."""
    status = 1
    try:
        limit_s = START_S if anew and source.starts else ALARM_S
        # Not dump_traceback_later: in a fork it waits for ever for the thread of pytest's own.
        faulthandler.register(signal.SIGALRM, file=board.writer, chain=True)
        signal.alarm(limit_s)
        if anew:
            try:
                name = object_name(0) if source.objects else None
                with source.map(0, PAGES * PAGE_SIZE, False, name, fresh=True) as own:
                    status = 2 if _wrong(own, 5, 5) else 0
            except _REFUSALS:
                status = 3
        else:
            bytes(view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            status = 4  # it read something
    except BaseException:  # noqa: BLE001  it is reported, and the round fails
        board.report(f"a fork: {traceback.format_exc()}".replace("\n", " | "))
    finally:
        os._exit(status)


class _Source:
    """Source of a client's areas: a server at a path, or one of its own."""

    def __init__(self, device: Device, path: str | None) -> None:
        self._device = device
        self._path = path
        self._client: Any = None
        self._lock = threading.Lock()
        self.starts = path is None
        self.objects = isinstance(device, SluggishObjects)

    def map(self, offset: int, length: int, populate: bool, name: str | None, *, fresh: bool = False) -> Any:
        if self._path is None:
            return prefault.device.map(self._device, length, offset, populate=populate, object=name)
        if fresh:
            return prefault.device.connect(self._path).map(length, offset, populate=populate, object=name)
        with self._lock:
            if self._client is None:
                self._client = prefault.device.connect(self._path)
        return self._client.map(length, offset, populate=populate, object=name)


def be_client(board: Board, number: int, device: Device, path: str | None, seed: int, directory: str) -> NoReturn:
    status = 1
    try:
        chance = random.Random(seed)
        stacks = open(f"{directory}/stacks-{os.getpid()}", "w")  # noqa: SIM115  as long as the process
        faulthandler.register(signal.SIGUSR1, stacks)
        source = _Source(device, path)
        work = [_Thread(board, number * THREADS + index, source, chance.randrange(1 << 30)) for index in range(THREADS)]
        threads = [threading.Thread(target=thread.run) for thread in work]
        for running in threads:
            running.start()
        for running in threads:
            running.join()
        if chance.random() < 0.5:  # else it just ends
            for thread in work:
                thread.close()
        status = 0
    except BaseException:  # noqa: BLE001  it is reported, and the round fails
        board.report(f"client {number}: {traceback.format_exc()}".replace("\n", " | "))
    finally:
        os._exit(status)

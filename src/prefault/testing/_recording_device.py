"""The recording device: a device around a driver, which records the driver's calls and delays them at random.

It runs in the server. The journal is a file that each process appends to: it outlives the server, however that ends.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from prefault.device.device_pool import Access, ClientProcess, DevicePool
from prefault.device.driver import Device, DeviceArea, FaultAnswer, Supplied

ATTRIBUTES = (
    "length", "page_size", "writable", "evicts", "tracks_writes", "populates", "workers", "batch", "fault_around",
    "huge_faults", "capacity"
)  # fmt: skip
_COPIED = (*ATTRIBUTES, "object_workers", "timeout_s", "restartable")


class Call(NamedTuple):
    """A recorded call of the driver. ``pages``: first and stop. ``began``: CLOCK_MONOTONIC, in seconds."""

    pid: int
    kind: str
    pages: tuple[int, int]
    began: float

    def __str__(self) -> str:
        first, stop = self.pages
        if self.kind == "fault":
            return f"fault(page {first})"
        if first == stop:
            return f"{self.kind}()"
        return f"{self.kind}(pages {first} to {stop - 1})"


class Raised(NamedTuple):
    """An exception that the driver raised, as text, and the call that raised it."""

    call: Call
    what: str


class Journal:
    """The record of a driver's calls in all its processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._pid = os.getpid()

    def _write(self, *entry: Any) -> None:
        if self._pid != os.getpid():  # a server may close descriptors that it has not opened itself
            self._fd = os.open(self._path, os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
            self._pid = os.getpid()
        os.write(self._fd, json.dumps(entry).encode() + b"\n")

    def begin(self, number: int, kind: str, pages: range) -> None:
        self._write("begin", os.getpid(), number, kind, [pages.start, pages.stop], time.monotonic())

    def end(self, number: int, raised: str = "") -> None:
        self._write("end", os.getpid(), number, raised)

    def complain(self, what: str) -> None:
        self._write("complaint", what)

    def _entries(self) -> list[Any]:
        return [json.loads(line) for line in self._path.read_bytes().splitlines()]

    def complaints(self) -> list[str]:
        """Return the breaches of the contract that the recording device saw."""
        return [entry[1] for entry in self._entries() if entry[0] == "complaint"]

    def raised(self) -> list[Raised]:
        """Return the exceptions that the driver raised."""
        calls = self.calls()
        return [Raised(calls[entry[1], entry[2]], entry[3]) for entry in self._entries() if entry[0] == "end" and entry[3]]

    def unfinished(self) -> list[Call]:
        """Return the calls that began and did not end."""
        calls = self.calls()
        for entry in self._entries():
            if entry[0] == "end":
                calls.pop((entry[1], entry[2]), None)
        return list(calls.values())

    def calls(self) -> dict[tuple[int, int], Call]:
        return {
            (entry[1], entry[2]): Call(entry[1], entry[3], (entry[4][0], entry[4][1]), entry[5])
            for entry in self._entries()
            if entry[0] == "begin"
        }

    def close(self) -> None:
        os.close(self._fd)


class InjectedError(Exception):
    """Raised by the recording device in the driver's place."""


class _RecordingArea(DeviceArea):
    """The area that the driver gets: it records which frames the driver takes, and when."""

    def __init__(self, area: DeviceArea, recorder: RecordingDevice) -> None:
        self._area = area
        self._recorder = recorder
        self.offset = area.offset
        self.length = area.length
        self.access = area.access
        self.pid = area.pid
        self.uid = area.uid

    @property
    def pages(self) -> range:
        return self._area.pages

    def frame(self, page: int) -> memoryview:
        return self._recorder.lend(range(page, page + 1), self._area.frame)

    def frames(self, pages: range) -> memoryview:
        return self._recorder.lend(pages, lambda _: self._area.frames(pages))

    def ready(self, pages: range) -> list[range]:
        return self._area.ready(pages)

    def evict(self, pages: range, save: Any = None) -> bytes:
        return self._area.evict(pages, save)


class RecordingDevice(Device):
    """A device that passes every call to ``inner``, and records it.

    Args:
        inner: the driver.
        journal: takes the records.
        seed: the seed of the delays.
        delay_s: the longest delay in seconds; 0: none.
        fails: pages that raise :class:`InjectedError` instead of asking the driver.
        failing: pages that the driver is meant to refuse.
    """

    def __init__(
        self, inner: Device, journal: Journal, *, seed: int, delay_s: float, fails: tuple[int, ...] = (),
        failing: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self._inner = inner
        self._journal = journal
        self._delay_s = delay_s
        self._fails = fails
        self._failing = failing
        self._provoked: set[str] = set()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._number = 0
        self._lent: dict[int, list[weakref.ref[Any]]] = {}
        self._supplying: dict[int, range] = {}
        self._areas: dict[int, tuple[DeviceArea, _RecordingArea]] = {}
        for name in _COPIED:
            setattr(self, name, getattr(inner, name))

    # --- calls of the framework

    def start(self, pool: DevicePool) -> None:
        with self._call("start", range(0)):
            self._inner.start(pool)

    def stop(self) -> None:
        with self._call("stop", range(0)):
            self._inner.stop()

    def open(self, area: DeviceArea) -> None:
        recording = _RecordingArea(area, self)
        self._areas[id(area)] = (area, recording)  # the reference keeps another area from getting this id
        with self._call("open", area.pages):
            self._inner.open(recording)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        pages = range(page, page + 1)
        self._inject(pages)
        with self._call("fault", pages, supplies=True):
            supplied: object = self._inner.fault(self._recording(area), page, access)
            if supplied is not None and not isinstance(supplied, FaultAnswer):
                self._journal.complain(
                    f"fault(page {page}) returned {supplied!r}, and is to return None, ZERO, READ_ONLY or RETRY"
                )
                supplied = None
        return supplied

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:
        self._inject(pages)
        with self._call("populate", pages, supplies=True):
            return self._inner.populate(self._recording(area), pages, access)

    def mkwrite(self, area: DeviceArea, page: int) -> None:
        with self._call("mkwrite", range(page, page + 1)):
            self._inner.mkwrite(self._recording(area), page)

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        with self._call("control", range(0)):
            return self._inner.control(client, request)

    def disconnect(self, client: ClientProcess) -> None:
        with self._call("disconnect", range(0)):
            self._inner.disconnect(client)

    def discard(self, area: DeviceArea, pages: range) -> None:
        with self._call("discard", pages):
            self._inner.discard(self._recording(area), pages)

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        with self._call("reclaim", range(0)):
            self._inner.reclaim(self._recording(area), pages)

    def close(self, area: DeviceArea) -> None:
        with self._call("close", area.pages):
            self._inner.close(self._recording(area))
        self._areas.pop(id(area), None)

    # --- recording

    def _recording(self, area: DeviceArea) -> _RecordingArea:
        found = self._areas.get(id(area))
        return found[1] if found is not None else _RecordingArea(area, self)

    def _inject(self, pages: range) -> None:
        for page in self._fails:
            if page in pages:
                self._provoked.add(text := f"page {page} fails for the sake of the check")
                raise InjectedError(text)

    def is_unprovoked(self, record: logging.LogRecord) -> bool:
        """Return whether a log record of the device's processes is about an error that the check did not provoke."""
        message = record.getMessage()
        return not any(text in message for text in self._provoked)

    def _delay(self) -> None:
        if self._delay_s:
            with self._lock:
                draw = self._random.random()
            if draw < 0.4:
                time.sleep(draw / 0.4 * self._delay_s)

    @contextmanager
    def _call(self, kind: str, pages: range, *, supplies: bool = False) -> Iterator[None]:
        with self._lock:
            self._number = number = self._number + 1
            if supplies:
                self._supplying[number] = pages
                self._lent[number] = []
        self._journal.begin(number, kind, pages)
        try:
            self._delay()
            yield
            self._delay()
        except BaseException as error:
            self._journal.end(number, f"{type(error).__name__}: {error}")
            if supplies and not self._failing.isdisjoint(pages):
                self._provoked.add(f"{type(error).__name__}: {error}")
            raise
        else:
            # An exception's traceback may still hold views: only calls that returned are checked.
            self._check_lent(number, kind, pages)
            self._journal.end(number)
        finally:
            with self._lock:
                self._supplying.pop(number, None)
                self._lent.pop(number, None)

    def lend(self, pages: range, get: Callable[[int], memoryview]) -> memoryview:
        """Return a view of frames whose lifetime is recorded."""
        with self._lock:
            number = next(
                (
                    number
                    for number, supplying in self._supplying.items()
                    if pages.start >= supplying.start and pages.stop <= supplying.stop
                ),
                None,
            )
            active = list(self._supplying.values())
        if number is None:
            asked = " and ".join(_name(supplying) for supplying in active)
            what = f"while it was asked to supply {asked}" if asked else "while it was not asked to supply any"
            self._journal.complain(f"the driver took the frame of {_name(pages)} {what}")
            return get(pages.start)
        # Slices of a memoryview keep the object under it alive: here an array of ctypes, which takes weak references. One of
        # numpy would do, whose import takes longer than most checks.
        frames = get(pages.start)
        array = (ctypes.c_ubyte * len(frames)).from_buffer(frames)
        del frames
        with self._lock:
            self._lent.setdefault(number, []).append(weakref.ref(array))
        view = memoryview(array).cast("B")
        del array
        self._delay()
        return view

    def _check_lent(self, number: int, kind: str, pages: range) -> None:
        with self._lock:
            lent = self._lent.get(number, [])
        if any(reference() is not None for reference in lent):
            gc.collect()  # a reference cycle is no intention to keep the view
            if any(reference() is not None for reference in lent):
                self._journal.complain(f"the driver keeps a view of the frame after {kind} of {_name(pages)} returned")


def _name(pages: range) -> str:
    return f"page {pages.start}" if len(pages) == 1 else f"pages {pages.start} to {pages.stop - 1}"

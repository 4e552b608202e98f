"""The policy of dirty tracking: by page, or by chunk where much is written."""

from __future__ import annotations

import ctypes
import errno
import threading
import time
from typing import Any

import pytest

from prefault.device import open as open_device
from prefault.drivers.buffers import BufferObjectError, BufferObjects, Buffers
from prefault.drivers.buffers.buffer_manager import Buffer
from prefault.drivers.buffers.buffer_messages import DirtyRuns
from prefault.drivers.buffers.dirty_tracking import DirtyTracking
from prefault.sizes import MIB, PAGE_SIZE
from support.device_server import ends_by

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]


def _method(tracking: DirtyTracking) -> str:
    return tracking.method


def test_d5_pages_are_reported_once() -> None:
    tracking = DirtyTracking(100, 10)
    for page in (3, 4, 50):
        assert tracking.mark(page) == range(page, page + 1)
    assert tracking.scan() == [range(3, 5), range(50, 51)]
    assert tracking.scan() == []


def test_the_method_follows_the_density_of_writes_as_vmwgfx_does() -> None:
    tracking = DirtyTracking(95, 10)
    for scan in range(3):
        assert _method(tracking) == "page", scan
        for page in range(10):  # more than 10 % of 95
            tracking.mark(page)
        tracking.scan()
    assert _method(tracking) == "chunk"
    assert tracking.mark(94) == range(90, 95)
    assert tracking.mark(7) == range(10)
    assert tracking.scan() == [range(10), range(90, 95)]
    for _ in range(3):
        assert _method(tracking) == "chunk"
        assert tracking.scan() == []
    assert _method(tracking) == "page"


def test_a_scan_between_that_finds_little_begins_anew() -> None:
    tracking = DirtyTracking(100, 10)
    for dense in (True, True, False, True, True):
        for page in range(20 if dense else 1):
            tracking.mark(page)
        tracking.scan()
    assert _method(tracking) == "page"
    tracking.mark_all()
    assert tracking.scan() == [range(100)]
    assert _method(tracking) == "chunk"


class ScansSlowly(BufferObjects):
    """Buffer objects whose server is a fork, so that the test's own class is at hand there."""

    def recipe(self) -> None:  # type: ignore[override]
        return None

    def take_dirty(self, buffer: Buffer) -> DirtyRuns:
        time.sleep(0.5)
        return super().take_dirty(buffer)


def test_d5_a_scan_that_fails_since_a_client_moves_its_memory_forgets_no_page() -> None:
    def store(say: Any) -> None:
        with open_device(ScansSlowly(vram=4 * MIB, system=4 * MIB, space="64 MiB")) as client:
            buffers = Buffers(client, timeout=30)
            buffers.create("frame", 16 * PAGE_SIZE)
            buffers.track_dirty("frame")
            with buffers.map("frame") as area, area.memoryview() as memory:
                memory[3 * PAGE_SIZE] = memory[5 * PAGE_SIZE] = 7
                # The kernel lets nobody change the page tables of the process until the server has read of the move.
                last = area.address + 15 * PAGE_SIZE
                mover = threading.Timer(0.2, _libc.mremap, (last, PAGE_SIZE, 2 * PAGE_SIZE, 1))
                mover.start()
                with pytest.raises(BufferObjectError, match="keeps changing its mappings") as caught:
                    buffers.take_dirty("frame")
                mover.join()
                say(f"{caught.value.errno == errno.EBUSY} {buffers.take_dirty('frame').runs}")

    said, _ = ends_by(store)
    assert said == "True ((3, 4), (5, 6))"

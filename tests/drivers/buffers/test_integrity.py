"""Pages that describe themselves, written by threads and processes while objects move, leave, and the server is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import prefault.device
from prefault.device import DeviceArea, DevicePool
from prefault.drivers.buffers import BufferObjectError, BufferObjects, Buffers
from prefault.drivers.buffers.buffer_manager import BufferManager
from prefault.drivers.buffers.buffer_messages import Caching
from prefault.drivers.buffers.placements import Placement, Resource
from prefault.errors import DeviceGoneError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import check_device
from support import processes
from support.cgroups import Group, groups

_PAGE = struct.Struct("<QQQI")
_OBJECTS = 5
_KILL_EACH_S = 3.0
"""Seconds between two deaths of the server: a driver that dies more often is given up by its warden."""
_SIZE = 2 * MIB + 4 * PAGE_SIZE
_LIMIT = 120 * MIB
_LONGER_S = 40.0
"""Seconds that a busy machine may take longer."""


class OneBuffer(BufferManager):
    """Buffer objects of which there is one as large as the device; without a recipe."""

    def __init__(self, swap_file: str | None = None) -> None:
        swap = 0 if swap_file is None else 4 * MIB
        super().__init__(4 * MIB, 4 * MIB, swap_file, swap, 4 * MIB)

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        if not self.buffers:
            resource = Resource("all", self.length, (Placement.VRAM, Placement.SYSTEM))
            self.create(resource, Caching.CACHED)

    def open(self, area: DeviceArea) -> None:
        """Accept parts of the device, which are parts of the one object."""


@pytest.mark.parametrize("swaps", [False, True])
def test_buffer_objects_keep_the_contract(tmp_path: Path, swaps: bool) -> None:
    count = iter(range(1000))

    def make() -> OneBuffer:
        return OneBuffer(str(tmp_path / f"swap {next(count)}") if swaps else None)

    check_device(make, expected=lambda page: bytes(PAGE_SIZE), after_discard="zeros")


def stamp(which: int, page: int, version: int) -> bytes:
    """Return the content of a page: its object, number, version, and a checksum over all of it."""
    body = (version * 2654435761 % (1 << 32)).to_bytes(4, "little") * ((PAGE_SIZE - _PAGE.size) // 4)
    head = _PAGE.pack(which, page, version, zlib.crc32(body))
    return (head + body).ljust(PAGE_SIZE, b"\0")


def check(content: bytes, which: int, page: int) -> int:
    """Return the version of a page; AssertionError if it is torn, or of another page."""
    version: int
    got, number, version, checksum = _PAGE.unpack_from(content)
    assert (got, number) == (which, page), f"page {page} of object {which} holds page {number} of object {got}"
    body = content[_PAGE.size : _PAGE.size + (PAGE_SIZE - _PAGE.size) // 4 * 4]
    assert zlib.crc32(body) == checksum, f"page {page} of object {which} is torn"
    return version


def write_and_check(path: str, seed: int, first: int, step: int, stop: Event) -> None:
    """Write the pages first, first + step, ... of all objects, and check each before its next version."""
    chance = random.Random(seed)
    with prefault.device.connect(path, timeout=30) as client:
        buffers = Buffers(client)
        areas = [buffers.map(f"object {which}") for which in range(_OBJECTS)]
        views = [area.memoryview() for area in areas]
        mine = [(which, page) for which in range(_OBJECTS) for page in range(first, _SIZE // PAGE_SIZE, step)]
        versions: dict[tuple[int, int], int] = {}
        while not stop.is_set():
            which, page = chance.choice(mine)
            at = page * PAGE_SIZE
            before = bytes(views[which][at : at + PAGE_SIZE])
            wanted = versions.get((which, page), 0)
            if wanted:
                assert check(before, which, page) == wanted, f"a write to page {page} of object {which} was lost"
            else:
                assert before == bytes(PAGE_SIZE)
            versions[which, page] = wanted + 1
            views[which][at : at + PAGE_SIZE] = stamp(which, page, wanted + 1)
        for (which, page), version in versions.items():
            assert check(bytes(views[which][page * PAGE_SIZE : (page + 1) * PAGE_SIZE]), which, page) == version
        for view in views:
            view.release()
        for area in areas:
            area.close()


def write_in_threads(path: str, seed: int, parts: tuple[int, ...], stop: Event) -> None:
    """Run a writer in a thread for each part of the pages; end the process with 1 if one fails."""
    failed: list[int] = []

    def work(part: int) -> None:
        try:
            write_and_check(path, seed + part, part, 3, stop)
        except BaseException:
            failed.append(part)
            raise

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(1)


def _torment(path: str, pid: int, seconds: float, seed: int, kills: bool, is_enough: Callable[[], bool]) -> dict[str, int]:
    """Move, evict, swap out and reserve at random, and kill the server now and then; longer while it is not enough."""
    chance, done = random.Random(seed), dict.fromkeys(("moves", "kills", "refused"), 0)
    until = time.monotonic() + seconds
    next_kill = time.monotonic() + 1
    with prefault.device.connect(path, timeout=30) as client:
        buffers = Buffers(client)
        while (now := time.monotonic()) < until or (now < until + _LONGER_S and not is_enough()):
            name = f"object {chance.randrange(_OBJECTS)}"
            try:
                match chance.randrange(8):
                    case 0 | 1:
                        buffers.move(name, "vram")
                    case 2 | 3:
                        buffers.move(name, "system")
                    case 4:
                        buffers.evict(name)
                    case 5:
                        buffers.swap_out(name)
                    case 6:
                        buffers.set_caching(name, chance.choice(list(Caching)))
                    case _:
                        with buffers.reserve(name):
                            time.sleep(0.002)
                done["moves"] += 1
                if kills and time.monotonic() > next_kill:
                    next_kill = time.monotonic() + _KILL_EACH_S
                    for other in processes.descendants(pid):
                        if Path(f"/proc/{other}/comm").read_text() == "prefault-server\n":
                            os.kill(other, signal.SIGKILL)
                            done["kills"] += 1
            except (BufferObjectError, DeviceGoneError, FileNotFoundError, ProcessLookupError):
                done["refused"] += 1
                time.sleep(0.02)
    return done


def run(
    directory: Path, seconds: float, seed: int, *, kills: bool, is_enough: Callable[[], bool] = lambda: True
) -> dict[str, int]:
    """Run two processes with three threads in all against the torment."""
    path = str(directory / "device")
    # VRAM has room for two objects, SYSTEM for two, and the swap file for all: each move drives another one out.
    device = BufferObjects(
        vram=6 * MIB, system=6 * MIB, swap_file=str(directory / "swap"), swap=_OBJECTS * 4 * MIB, space=64 * MIB
    )
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with prefault.device.serve(device, path):
        with prefault.device.connect(path) as client:
            for which in range(_OBJECTS):
                Buffers(client).create(f"object {which}", _SIZE)
        # None in this process: a thread that waits for a page holds the GIL, and the reservation would never be released.
        children = [context.Process(target=write_in_threads, args=(path, seed, parts, stop)) for parts in ((0, 1), (2,))]
        for child in children:
            child.start()
        try:
            done = _torment(path, os.getpid(), seconds, seed, kills, is_enough)
        finally:
            stop.set()
            for child in children:
                child.join(60)
                if child.is_alive():
                    child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    return done


@pytest.mark.parametrize("kills", [False, True])
def test_d5_no_write_is_lost_whatever_happens_to_the_buffers(tmp_path: Path, kills: bool) -> None:
    done = run(tmp_path, 4, 1, kills=kills)
    assert done["moves"] > 10


def test_d5_no_write_is_lost_in_a_tight_memory_cgroup(tmp_path: Path) -> None:
    """All processes and the frames share the limit; what is beyond it has to leave: page cache of the swap file first."""
    with groups() as make:
        group = make(_LIMIT)
        process = multiprocessing.get_context("fork").Process(target=_run_inside, args=(group, tmp_path))
        process.start()
        process.join(90)
        assert process.exitcode == 0
        assert group.killed == 0
        assert _was_tight(group)


def _was_tight(group: Group) -> bool:
    return int((group.directory / "memory.max_usage_in_bytes").read_text()) > 0.7 * _LIMIT


def _run_inside(group: Group, directory: Path) -> None:
    group.enter()
    done = run(directory, 3, 2, kills=True, is_enough=partial(_was_tight, group))
    sys.exit(done["moves"] < 5)


@pytest.mark.stress
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
def test_d5_no_write_is_lost_in_ten_minutes(tmp_path: Path, seed: int) -> None:
    done = run(tmp_path, 600, seed, kills=True)
    print(done)
    assert done["kills"]

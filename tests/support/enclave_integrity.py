"""Processes and threads that write pages which describe themselves, while these are evicted and the server is killed.

Each page has one writer, which knows its version: before it writes the next one, the page has to hold the last. Readers take
any page: whole, of one version, and never of an older one than they saw.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import threading
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import prefault
import prefault.device
from prefault.drivers.enclave import Enclave, EnclavePageCache, statistics
from prefault.errors import DeviceGoneError, PopulateError
from prefault.sizes import MIB, PAGE_SIZE
from support import processes
from support.children import die_with_parent
from support.wardens import roles

_HEAD = struct.Struct("<QQI")
_BODY = PAGE_SIZE - _HEAD.size - 8
_TORN_S = 20.0
_KILLS_S = 2.1
"""Seconds between two kills, at least: the warden gives a driver up that dies more than five times in ten seconds."""
NAMES = ("one", "two")


class Size(NamedTuple):
    """Parameters of a run: bytes of the page cache and of each enclave, and the number of processes and their threads."""

    capacity: int = MIB
    length: int = 4 * MIB
    processes: int = 3
    threads: int = 2


def _content(page: int, version: int) -> bytes:
    body = random.Random(page * 1_000_003 + version).randbytes(16) * (_BODY // 16 + 1)
    body = body[:_BODY]
    return _HEAD.pack(version, page, zlib.crc32(body)) + body + struct.pack("<Q", version)


def _read(data: bytes, page: int) -> int | None:
    """Return the version of a page, 0 if it was never written, None if it is torn: being written."""
    if data == bytes(PAGE_SIZE):
        return 0
    version, number, checksum = _HEAD.unpack_from(data)
    if struct.unpack_from("<Q", data, PAGE_SIZE - 8)[0] != version or zlib.crc32(data[_HEAD.size : -8]) != checksum:
        return None
    if number != page:
        raise AssertionError(f"page {page} holds page {number}, version {version}")
    return int(version)


def _work(memories: list[memoryview], index: int, writers: int, seed: int, until: float, counts: Counter[str]) -> None:
    chance = random.Random(seed)
    pages = len(memories[0]) // PAGE_SIZE
    mine: dict[tuple[int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    while time.monotonic() < until:
        which, page = chance.randrange(len(memories)), chance.randrange(pages)
        memory, part = memories[which], slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        if page % writers == index:
            data, version = bytes(memory[part]), mine.get((which, page), 0)
            wanted = _content(page, version) if version else bytes(PAGE_SIZE)
            if data != wanted:
                raise AssertionError(f"page {page} of enclave {which} is not what was written to it: version {version}")
            memory[part] = _content(page, version + 1)
            mine[which, page] = version + 1
            counts["written"] += 1
            continue
        give_up = time.monotonic() + _TORN_S
        while (found := _read(bytes(memory[part]), page)) is None:
            if time.monotonic() > give_up:
                raise AssertionError(f"page {page} of enclave {which} is damaged")
            time.sleep(0.001)
        if found < seen.get((which, page), 0):
            raise AssertionError(f"page {page} of enclave {which} went back from version {seen[which, page]} to {found}")
        seen[which, page] = found
        counts["read"] += 1


def _be_client(path: Path, number: int, size: Size, seed: int, until: float, report: mmap.mmap) -> None:
    """Run the threads of a process, and write the outcome into its part of ``report``."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with prefault.device.connect(path) as client, contextlib.ExitStack() as stack:
        areas = [stack.enter_context(Enclave(client, name).map()) for name in NAMES]
        memories = [stack.enter_context(area.memoryview()) for area in areas]

        def run(thread: int) -> None:
            index = number * size.threads + thread
            try:
                _work(memories, index, size.processes * size.threads, seed * 1000 + index, until, counts)
            except BaseException:  # noqa: BLE001  reported
                wrong.append(traceback.format_exc())

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(size.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    text = "\n".join(wrong)[-3000:].encode()
    report[number * 4096 : number * 4096 + 24] = struct.pack("<QQQ", counts["written"], counts["read"], len(text))
    report[number * 4096 + 24 : number * 4096 + 24 + len(text)] = text


def _churn(client: prefault.device.DeviceClient, chance: random.Random) -> None:
    """Create an enclave, populate a part of it, which evicts others; trim it; delete it."""
    length = chance.randrange(1, 64) * PAGE_SIZE
    enclave = Enclave.create(client, f"passing {chance.randrange(1 << 60)}", length, overcommit=True)
    with enclave.map() as area:
        prefault.populate(area)
        if area.read() != bytes(length):
            raise AssertionError("a new enclave is not zeros")
        with area.memoryview() as memory:
            memory[:] = bytes([7]) * length
    enclave.trim(0, length)
    enclave.delete()


def run(path: Path, seed: int, seconds: float, size: Size = Size(), *, kills: bool = True) -> Counter[str]:  # noqa: B008
    """Run for some seconds.

    Raises:
        AssertionError: a page was wrong, or a process died.
    """
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    report = mmap.mmap(-1, 4096 * size.processes)
    device = EnclavePageCache(size.capacity, address_space=64 * MIB)
    with prefault.device.serve(device, path), prefault.device.connect(path) as client:
        for name in NAMES:
            Enclave.create(client, name, size.length)
        until = time.monotonic() + seconds
        next_kill = time.monotonic() + chance.random()
        pids: list[int] = []
        try:
            for number in range(size.processes):
                pid = os.fork()
                if pid == 0:
                    try:
                        die_with_parent()
                        _be_client(path, number, size, seed, until, report)
                        os._exit(0)
                    except BaseException:  # noqa: BLE001  this process is a fork of a test
                        traceback.print_exc()
                    finally:
                        os._exit(1)
                pids.append(pid)
            while time.monotonic() < until:
                time.sleep(chance.random() * 0.3)
                with contextlib.suppress(DeviceGoneError, PopulateError):  # the server died in the middle
                    _churn(client, chance)
                    counts["enclaves"] += 1
                if kills and time.monotonic() > next_kill:
                    next_kill = time.monotonic() + _KILLS_S + chance.random()
                    server = roles()["server"]
                    os.kill(server, signal.SIGKILL)
                    counts["kills"] += 1
                    assert processes.eventually(lambda before=server: roles().get("server", before) != before)  # type: ignore[misc]
                found = statistics(client)
                assert found.rejected == 0, "a sealed page failed its authentication"
                counts["evicted at least"] = max(counts["evicted at least"], found.evicted)
            statuses = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in list(pids)}
            pids.clear()
            for number in range(size.processes):
                written, read, length = struct.unpack_from("<QQQ", report, number * 4096)
                assert not length, report[number * 4096 + 24 : number * 4096 + 24 + length].decode()
                counts["written"] += written
                counts["read"] += read
            assert set(statuses.values()) == {0}, f"clients ended with {statuses}"
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return counts

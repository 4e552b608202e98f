"""Several processes with one device: fork and spawn of multiprocessing, and clients that see what others write."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.errors import DeviceGoneError
from prefault.sizes import PAGE_SIZE
from support import device_clients, oracle, processes
from support.children import in_child
from support.devices import Pattern, Remade, content


def _checksum(pages: range) -> int:
    return zlib.crc32(b"".join(content(page) for page in pages))


def _ends_with(function: object) -> int:
    """The exit status of a fork that calls it; 0 if it returns."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(10)
            faulthandler.disable()  # its report of what is meant to happen would be in the output
            assert callable(function)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    """None is left, but for files that are opened once and kept. multiprocessing loads libraries: mappings do not count."""
    before = oracle.descriptors()
    yield
    gc.collect()
    # multiprocessing starts a process that tracks semaphores, and has it as long as we live: here it is ended.
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    assert not {line for line in oracle.descriptors() - before if " /proc/" not in line and " /sys/fs/cgroup" not in line}


def test_multiprocessing_by_spawn(tmp_path: Path, no_descriptors: None) -> None:
    with prefault.device.serve(Pattern(32), tmp_path / "s") as server:
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            found = pool.starmap(device_clients.checksum_of_served, [(str(server.path), first, 32) for first in (0, 7, 31)])
    assert found == [_checksum(range(first, 32)) for first in (0, 7, 31)]


def test_multiprocessing_by_fork(tmp_path: Path, no_descriptors: None) -> None:
    with (
        prefault.device.serve(Pattern(32), tmp_path / "s") as server,
        prefault.device.connect(server.path) as client,
        client.map(populate=True) as mine,
    ):
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            found = pool.starmap(device_clients.checksum_of_served, [(str(server.path), first, 32) for first in (0, 7, 31)])
        assert found == [_checksum(range(first, 32)) for first in (0, 7, 31)]
        assert device_clients.touch(mine, 3) == content(3)[:8]


def test_a_pool_of_processes_each_with_a_server_of_its_own(no_descriptors: None) -> None:
    before = processes.descendants(os.getpid())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(device_clients.checksum_of_own, [16, 5, 9])) == [_checksum(range(n)) for n in (16, 5, 9)]
    assert processes.eventually(lambda: _servers(processes.descendants(os.getpid()) - before) == 0)


def _servers(pids: set[int]) -> int:
    found = 0
    for pid in pids:
        try:
            found += Path(f"/proc/{pid}/comm").read_text().startswith("prefault-")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("populated", [False, True])
def test_a_fork_that_touches_is_ended_and_reads_nothing(populated: bool, no_leaks: None) -> None:
    with prefault.device.map(Pattern(16), populate=populated) as area:
        view = area.memoryview()
        for _ in range(3):
            assert _ends_with(lambda: bytes(view[5 * PAGE_SIZE : 6 * PAGE_SIZE])) == -signal.SIGSEGV
        view.release()
        # And nothing that the fork did came back to us: no page of zeros in the frames.
        assert [device_clients.touch(area, page) for page in range(16)] == [content(page)[:8] for page in range(16)]


def test_what_a_fork_asks_is_an_exception(no_leaks: None) -> None:
    with prefault.device.map(Pattern(16)) as area:

        def ask() -> list[str]:
            said = []
            for call in (
                lambda: prefault.populate(area, access="read"),
                lambda: prefault.discard(area),
                lambda: area.stats(),
            ):
                with pytest.raises(DeviceGoneError) as caught:
                    call()
                said.append(str(caught.value))
            return said

        for text in in_child(ask):
            assert "map" in text
            assert "fork" in text
        assert device_clients.touch(area, 5) == content(5)[:8]


def test_a_fork_may_map_again(no_leaks: None) -> None:
    device = Pattern(16)
    with prefault.device.map(device, populate=True) as area:

        def again() -> bytes:
            with prefault.device.map(device) as own:
                return device_clients.touch(own, 5)

        assert in_child(again) == content(5)[:8]
        assert device_clients.touch(area, 6) == content(6)[:8]


def test_the_end_of_a_fork_ends_nothing_of_its_parent(no_leaks: None) -> None:
    """At exit, and when it collects garbage, a fork has no say over the server."""
    with prefault.device.map(Pattern(16)) as area:

        def collect() -> None:
            import gc

            nonlocal area
            del area
            gc.collect()

        assert _ends_with(collect) == 0
        assert device_clients.touch(area, 9) == content(9)[:8]
        prefault.populate(area, access="read")


def test_clients_see_each_others_writes(tmp_path: Path, no_descriptors: None) -> None:
    chance = random.Random(7)
    context = multiprocessing.get_context("spawn")
    with prefault.device.serve(Remade(24, writable=True), tmp_path / "s") as server:
        now: dict[int, bytes] = {page: content(page) for page in range(24)}
        with (
            prefault.device.connect(server.path) as one,
            prefault.device.connect(server.path) as two,
            one.map() as first,
            two.map(16 * PAGE_SIZE, 8 * PAGE_SIZE) as second,
            ProcessPoolExecutor(1, mp_context=context) as pool,
        ):
            for _ in range(12):
                page, byte = chance.randrange(24), chance.randrange(256)
                if chance.random() < 0.5:
                    pool.submit(device_clients.fill_served, str(server.path), page, byte).result()
                else:
                    array = first.ndarray("uint8")
                    array[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = byte
                    del array
                now[page] = bytes([byte]) * PAGE_SIZE
                other = chance.randrange(8, 24)
                assert device_clients.touch(second, other - 8) == now[other][:8]
            everything = zlib.crc32(b"".join(now[page] for page in range(24)))
            assert pool.submit(device_clients.checksum_of_served, str(server.path), 0, 24).result() == everything

"""RemoteFile in its server process: death of the server, failures of the source, and ways to start it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import fsspec  # type: ignore[import-untyped]
import pytest

import prefault
import prefault.device
from drivers.remote.conftest import QUICK
from prefault.drivers import Patience, RemoteFile
from prefault.sizes import KIB, MIB, PAGE_SIZE
from prefault.testing import check_device
from support import processes
from support.http_server import HttpServer

Content = Callable[[int], bytes]
Served = tuple[Path, bytes]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


def _opener(path: Path) -> Callable[[], BinaryIO]:
    return lambda: path.open("rb")


def _named(name: str) -> list[int]:
    """Return the descendants of this process that have a name."""
    found = []
    for pid in processes.descendants(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
    return found


def test_a_server_that_was_killed_goes_on(server: HttpServer, file: Served) -> None:
    _, expected = file
    device = RemoteFile(server.url("file.bin"), patience=QUICK, fault_around=(64 * KIB, 64 * KIB))
    with prefault.device.map(device) as area, area.memoryview() as view:
        assert view[5] == expected[5]
        for at in range(1, 4):
            (pid,) = _named("prefault-server")
            os.kill(pid, signal.SIGKILL)
            assert bytes(view[at * MIB - 9 : at * MIB + 9]) == expected[at * MIB - 9 : at * MIB + 9]
        assert bytes(view) == expected


def test_a_new_server_does_not_go_on_with_another_version(server: HttpServer, file: Served) -> None:
    path, expected = file
    device = RemoteFile(server.url("file.bin"), patience=QUICK, fault_around=(64 * KIB, 64 * KIB))
    with prefault.device.map(device) as area:
        assert area.read(0, 10) == expected[:10]
        path.write_bytes(expected[::-1])
        (pid,) = _named("prefault-server")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(prefault.PopulateError):
            area.read(MIB, 10)
        assert area.read(0, 10) == expected[:10]  # what was there stays, of the old version


_TOUCH = """
import sys, prefault
from prefault.drivers import Patience
array = prefault.open_remote(sys.argv[1], patience=Patience(retries=1, timeout_s=0.2, total_s=1, first_pause_s=0.01))
print(array[0], flush=True)
sys.stdin.readline()
print(array[-5000], flush=True)  # inside of a window of many pages
"""


@pytest.mark.parametrize("trouble", ["gone", "changed", "unavailable", "silent"])
def test_touching_an_unreadable_page_raises_sigbus(server: HttpServer, file: Served, trouble: str) -> None:
    path, expected = file
    with subprocess.Popen(
        [sys.executable, "-c", _TOUCH, server.url("file.bin")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == f"{expected[0]}\n"
            if trouble == "gone":
                path.unlink()
            elif trouble == "changed":
                path.write_bytes(expected[::-1])
            elif trouble == "unavailable":
                server.fail("status", status=503, count=1000)
            else:
                server.fail("stall", count=1000, bytes=0, seconds=0.5)
            server.requests(clear=True)
            process.stdin.write("\n")
            process.stdin.close()
            assert process.stdout.read() == ""
            assert process.wait(30) == -signal.SIGBUS
            # One try and one retry, for the window; what was given up is not begun anew for the page that was touched.
            assert trouble != "unavailable" or len(server.requests()) == 2
        finally:
            process.kill()


def test_a_callable_and_a_file_system_of_this_process(content: Content, tmp_path: Path) -> None:
    expected = content(300_001)
    path = tmp_path / "f"
    path.write_bytes(expected)
    memory = fsspec.filesystem("memory")
    memory.pipe("/f", expected)
    for source in (_opener(path), "memory://f", str(path)):
        with prefault.device.map(RemoteFile(source)) as area:
            area.populate()
            assert bytes(area.memoryview()) == expected
    memory.store.clear()


def test_concurrent_readers_and_populate(server: HttpServer, content: Content) -> None:
    expected = content(9 * MIB + 5)
    (server.directory / "f").write_bytes(expected)
    device = RemoteFile(server.url("f"), patience=QUICK, fault_around=(64 * KIB, 256 * KIB), batch=MIB)
    found: list[bool] = []
    with prefault.device.map(device) as area, area.memoryview() as view:

        def read(start: int, step: int) -> None:
            at = start
            for _ in range(40):
                at = (at + step) % len(expected)
                found.append(bytes(view[at : at + 100]) == expected[at : at + 100])

        threads = [threading.Thread(target=read, args=(MIB * number, 777_777 + number)) for number in range(4)]
        threads.append(threading.Thread(target=area.populate))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bytes(view) == expected
    assert found == [True] * 160
    asked = sum(request.sent for request in server.requests()[1:])
    assert asked == len(expected)  # no byte twice


def test_a_silent_server_ends_populate_in_its_time(server: HttpServer, file: Served) -> None:
    device = RemoteFile(server.url("file.bin"), patience=Patience(retries=2, timeout_s=0.2, total_s=2, first_pause_s=0.01))
    with prefault.device.map(device) as area:
        server.fail("stall", count=1000, bytes=0, seconds=0.3)
        with pytest.raises(prefault.PopulateError, match="given up after 3 tries"):
            area.populate()
        time.sleep(0.3)
        server.heal()
        assert area.read() == file[1]


def test_two_areas_share_one_server(server: HttpServer, file: Served) -> None:
    device = RemoteFile(server.url("file.bin"), patience=QUICK)
    with prefault.device.map(device) as whole, prefault.device.map(device, 8 * PAGE_SIZE, offset=MIB) as part:
        whole.populate()
        server.requests(clear=True)
        assert bytes(part.memoryview()) == file[1][MIB : MIB + 8 * PAGE_SIZE]
        assert server.requests() == []


@pytest.mark.parametrize("kind", ["http", "cached", "callable", "zip", "bounded"])
def test_check_device_passes(server: HttpServer, content: Content, tmp_path: Path, kind: str) -> None:
    expected = content(40 * PAGE_SIZE + 100)
    (server.directory / "f").write_bytes(expected)
    (tmp_path / "f").write_bytes(expected)
    around = (4 * PAGE_SIZE, 8 * PAGE_SIZE)
    device = partial(RemoteFile, server.url("f"), workers=3, batch=8 * PAGE_SIZE, fault_around=around)
    if kind == "cached":
        device = partial(device, cache_dir=tmp_path / "cache")
    elif kind == "callable":
        device = partial(RemoteFile, _opener(tmp_path / "f"), workers=2)
    elif kind == "zip":
        import zipfile

        with zipfile.ZipFile(server.directory / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("f", expected)
        device = partial(RemoteFile, f"zip://f::{server.url('a.zip')}", fault_around=around)
    elif kind == "bounded":
        device = partial(device, capacity=16 * PAGE_SIZE)
    padded = expected.ljust(41 * PAGE_SIZE, b"\0")
    check_device(device, seed=1, expected=lambda page: padded[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

"""Server, warden and client are killed, or end: no client hangs, or reads bytes that the driver did not supply."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import struct
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import prefault
import prefault.device
import prefault.memory
from prefault._kernel import mman
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from prefault.device.warden import supervisor
from prefault.errors import DeviceGoneError, DriverError, PopulateError
from prefault.sizes import PAGE_SIZE
from support import needs, processes
from support.children import Child
from support.devices import Pattern, Remade
from support.wardens import PAGES, Forks, Gated, Peek, Unlucky, frames_of, holders_of, peek, right, roles

pytestmark = pytest.mark.usefixtures("no_leaks")


_used: list[int] = []


@pytest.fixture
def kernel_faults() -> None:
    """Require the capability that peek() needs in a child, where skipping is too late."""
    needs.capability(UFFD_KERNEL_FAULTS)


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with no process that has the frames of a device of its own."""
    if "kernel_faults" in request.fixturenames:  # first, so that a test that is skipped need not have used any
        request.getfixturevalue("kernel_faults")
    _used.clear()
    yield
    assert _used
    assert processes.eventually(lambda: not any(map(holders_of, _used)))


def _mapped(device: prefault.device.Device) -> prefault.device.Area:
    area = prefault.device.map(device)
    _used.append(frames_of(area))
    if area.user_mode_only:
        area.close()
        needs.missing("system calls cannot wait for a page of such memory (CAP_SYS_PTRACE)")
    return area


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert processes.eventually(lambda: not processes.alive(pid))


def _await(path: Path) -> None:
    assert processes.eventually(path.exists)


@pytest.mark.parametrize("device", [Pattern(PAGES, restartable=True), Remade(PAGES)], ids=["fork", "recipe"])
def test_a_restartable_server_is_replaced(device: Pattern) -> None:
    with _mapped(device) as area:
        assert peek(area, 1) == right(1)
        before = roles()
        _kill(before["server"])
        assert peek(area, 1) == right(1)
        assert peek(area, 2) == right(2)
        prefault.populate(area)
        after = roles()
        assert after["warden"] == before["warden"]
        assert after["server"] != before["server"]


def test_a_thread_that_waits_for_a_page_is_served_by_the_next_server(tmp_path: Path) -> None:
    with _mapped(Gated(str(tmp_path / "gate"), restartable=True)) as area:
        waiting = Peek(area, 4)
        _await(tmp_path / "asked")
        _kill(roles()["server"])
        (tmp_path / "gate").touch()
        assert waiting.result() == right(4)


def test_without_a_restart_what_was_supplied_stays_and_the_rest_is_sigbus(tmp_path: Path) -> None:
    with _mapped(Gated(str(tmp_path / "gate"))) as area:
        assert peek(area, 1) == right(1)
        prefault.populate(area, offset=8 * PAGE_SIZE, length=4 * PAGE_SIZE)
        waiting = Peek(area, 4)
        _await(tmp_path / "asked")
        _kill(roles()["server"])
        assert waiting.result() is None
        assert [peek(area, page) for page in (1, 8, 11)] == [right(1), right(8), right(11)]
        assert peek(area, 20) is None
        with pytest.raises(DeviceGoneError, match="ended by SIGKILL"):
            prefault.populate(area)
        # An entry that goes, as when the kernel writes the page to swap, is made again by the warden.
        with area.memoryview() as view, prefault.memory.borrow(view) as memory:
            mman.madvise(memory.address + 8 * PAGE_SIZE, PAGE_SIZE, mman.MADV_DONTNEED)
        assert peek(area, 8) == right(8)


@pytest.mark.parametrize("device", [Remade(PAGES), Pattern(PAGES, restartable=True)], ids=["recipe", "fork"])
def test_a_killed_warden_is_replaced(device: Pattern) -> None:
    with _mapped(device) as area:
        assert peek(area, 1) == right(1)
        before = roles()
        _kill(before["warden"])
        assert peek(area, 2) == right(2)
        assert processes.eventually(lambda: processes.children(before["server"]) != set())
        prefault.populate(area, length=8 * PAGE_SIZE)
        _kill(before["server"])
        if device.recipe() is not None:
            assert peek(area, 20) == right(20)
        else:  # the fresh warden cannot make it
            assert peek(area, 7) == right(7)
            assert peek(area, 20) is None


def test_a_killed_warden_is_replaced_once() -> None:
    """Its server finds out twice at the same time: it cannot tell the warden of something, and sees that it has ended."""
    device = Pattern(PAGES)
    with _mapped(device) as area:
        other = prefault.device.map(device)
        before = roles()
        os.kill(before["server"], signal.SIGSTOP)
        try:
            unmapping = threading.Thread(target=other.close)
            unmapping.start()
            assert area._memory is not None
            connection = area._memory.connection.connection
            unread = struct.pack("i", 0)
            assert processes.eventually(lambda: fcntl.ioctl(connection, termios.TIOCOUTQ, unread) != unread)
            _kill(before["warden"])
        finally:
            os.kill(before["server"], signal.SIGCONT)
        unmapping.join()
        assert processes.eventually(lambda: processes.children(before["server"]) != set())
        assert area.stats().errors == 0  # an answer that the server gave after all that
        assert len(processes.children(before["server"])) == 1


def test_a_warden_that_is_killed_before_any_message_is_replaced_as_well() -> None:
    with _mapped(Unlucky(PAGES)) as area:
        assert peek(area, 1) == right(1)
        before = roles()
        _kill(before["warden"])
        assert peek(area, 2) == right(2)
        children = partial(processes.children, before["server"])
        assert processes.eventually(lambda: any(processes.name(pid) == "prefault-warden" for pid in children()))
        _kill(before["server"])
        assert peek(area, 2) == right(2)
        assert peek(area, 20) is None


def test_wardens_are_replaced_time_and_again() -> None:
    with _mapped(Remade(PAGES)) as area:
        server = roles()["server"]
        _kill(roles()["warden"])
        for page in range(3):
            assert peek(area, page) == right(page)
            assert processes.eventually(lambda: len(processes.children(server)) == 1)
            _kill(processes.children(server).pop())
        assert peek(area, 4) == right(4)
        assert peek(area, 5) == right(5)


def test_without_server_and_warden_the_client_ends_by_sigbus() -> None:
    reader, writer = os.pipe()

    def client() -> None:
        faulthandler.disable()
        with prefault.device.map(Pattern(PAGES)) as area:
            found = roles()
            os.write(writer, str(frames_of(area)).encode())
            os.kill(found["warden"], signal.SIGSTOP)  # so that neither sees the other go
            os.kill(found["server"], signal.SIGKILL)
            os.kill(found["warden"], signal.SIGKILL)
            time.sleep(20)

    with Child(client) as child, pytest.raises(AssertionError, match=f"died: -{signal.SIGBUS.value}"):
        child.result()
    _used.append(int(os.read(reader, 100)))
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("kernel_faults")
def test_a_child_of_the_driver_does_not_keep_the_client_from_seeing_the_end() -> None:
    reader, writer = os.pipe()

    def client() -> None:
        faulthandler.disable()
        with prefault.device.map(Forks(PAGES)) as area:
            assert peek(area, 1) == right(1)
            found = roles()
            (child,) = processes.children(found["server"])
            os.write(writer, f"{frames_of(area)} {child}".encode())
            os.kill(found["warden"], signal.SIGSTOP)
            os.kill(found["server"], signal.SIGKILL)
            os.kill(found["warden"], signal.SIGKILL)
            time.sleep(20)

    with Child(client) as child:
        # Its result is not waited for: the other one has that pipe too.
        assert processes.eventually(lambda: not processes.alive(child.pid))
        _, status = os.waitpid(child.pid, 0)
        child.pid = 0
    assert os.waitstatus_to_exitcode(status) == -signal.SIGBUS
    inode, grandchild = map(int, os.read(reader, 100).split())
    assert processes.alive(grandchild)
    os.kill(grandchild, signal.SIGKILL)
    _used.append(inode)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("device", [Remade(PAGES), Pattern(PAGES)], ids=["recipe", "fork"])
def test_with_the_client_all_ends(device: Pattern) -> None:
    reader, writer = os.pipe()

    def client() -> None:
        area = prefault.device.map(device)
        with area.memoryview() as view:
            assert view[0] == right(0)[0]
        found = roles()
        os.write(writer, f"{found['warden']} {found['server']} {frames_of(area)}".encode())
        time.sleep(30)

    with Child(client):
        *pids, inode = map(int, os.read(reader, 100).split())
        assert len(pids) == 2
        _used.append(inode)
        assert all(map(processes.alive, pids))
    assert processes.eventually(lambda: not any(map(processes.alive, pids)))
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("restartable", [False, True])
def test_a_driver_that_does_not_return_loses_its_process(tmp_path: Path, restartable: bool) -> None:
    device = Gated(str(tmp_path / "never"), restartable=restartable, timeout_s=0.3)
    with _mapped(device) as area:
        assert peek(area, 1) == right(1)
        assert peek(area, 4) is None
        if restartable:
            assert peek(area, 5) == right(5)
            with pytest.raises(DriverError, match=r"did not come back from a call within 0\.3 s"):
                prefault.populate(area)
        else:
            assert peek(area, 5) is None
            with pytest.raises(DeviceGoneError, match=r"did not come back from a call within 0\.3 s"):
                prefault.populate(area)
        assert peek(area, 1) == right(1)


def test_a_driver_that_ends_its_process_fails_only_for_the_pages_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    with _mapped(Gated(str(tmp_path / "gate"), restartable=True, deadly=True)) as area:
        assert peek(area, 4) is None
        assert peek(area, 5) == right(5)
        with pytest.raises(DriverError, match="ended by itself, with exit status 3"):
            prefault.populate(area, offset=4 * PAGE_SIZE, length=PAGE_SIZE)
        assert peek(area, 6) == right(6)


def test_a_server_that_keeps_dying_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MOST", 1)  # as seen by a fork
    with _mapped(Pattern(PAGES, restartable=True)) as area:
        for page in (1, 2):
            assert peek(area, page) == right(page)
            _kill(roles()["server"])
        assert peek(area, 1) == right(1)
        assert peek(area, 3) is None
        with pytest.raises(PopulateError):
            prefault.populate(area)


def test_an_orderly_end_leaves_what_was_supplied_without_any_process() -> None:
    with _mapped(Pattern(PAGES)) as area:
        prefault.populate(area, length=8 * PAGE_SIZE)
        found = roles()
        os.kill(found["warden"], signal.SIGTERM)
        assert processes.eventually(lambda: not any(map(processes.alive, found.values())))
        assert [peek(area, page) for page in range(8)] == [right(page) for page in range(8)]
        assert peek(area, 8) is None
        # The kernel takes entries away, and finds the pages again without anybody's help.
        with area.memoryview() as view, prefault.memory.borrow(view) as memory:
            mman.madvise(memory.address, 8 * PAGE_SIZE, mman.MADV_DONTNEED)
        assert peek(area, 3) == right(3)
        with pytest.raises(DeviceGoneError):
            prefault.populate(area)


def test_a_stopped_warden_does_not_stop_the_server() -> None:
    with _mapped(Pattern(PAGES)) as area:
        found = roles()
        os.kill(found["warden"], signal.SIGSTOP)
        try:
            assert peek(area, 3) == right(3)
            prefault.populate(area)
        finally:
            os.kill(found["warden"], signal.SIGCONT)


def test_the_end_of_the_server_and_the_request_to_end_come_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = prefault.device.serve(Pattern(PAGES), tmp_path / "socket")
    with prefault.device.connect(tmp_path / "socket") as client, client.map() as area:
        _used.append(frames_of(area))
        found = roles()
        os.kill(found["warden"], signal.SIGSTOP)
        try:
            os.kill(found["server"], signal.SIGTERM)
            assert processes.eventually(lambda: not processes.alive(found["server"]))
            closing = threading.Thread(target=server.close)
            closing.start()
            time.sleep(0.1)
        finally:
            os.kill(found["warden"], signal.SIGCONT)
        closing.join()
    assert "a warden failed" not in capfd.readouterr().err

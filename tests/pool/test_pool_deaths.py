"""A pool that processes share, when a member's process or the server dies, hangs or loses its connection."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import prefault
from prefault import TemporaryFile
from prefault._system import hugetlb
from prefault.errors import PoolFullError, PoolGoneError
from prefault.pool import Pool, connect
from prefault.pool.members import MemberTable
from prefault.pool.service import pool_protocol
from prefault.pool.service.pool_client import PoolClient
from support import needs
from support.pools import BLOCK, HeldChild, charges, serve_forever, shared_pool, stop_process, wait_until

# --- a member process that dies


def test_killed_its_memory_returns(tmp_path: Path, small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("2m")

    def used() -> int:
        found = os.statvfs(directory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * BLOCK, reserved=9 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        return client, memory

    with shared_pool(tmp_path, backing=TemporaryFile(directory)) as (pool, path), pool.sparse(64 * BLOCK) as mine:
        mine.populate(0, 2 * BLOCK)
        mine.write(0, b"mine")
        before = used()
        with HeldChild(member) as held:
            assert used() == before + 8 * BLOCK
            assert charges(pool) == [(2 * BLOCK, 2 * BLOCK), (8 * BLOCK, 8 * BLOCK)]
            with pytest.raises(PoolFullError):
                mine.populate(0, 8 * BLOCK)
            held.kill()
            # By itself: nobody asks the pool meanwhile.
            wait_until(lambda: used() == before, "the tmpfs gets the memory of the dead process back")
        wait_until(lambda: len(pool.statistics().members) == 1, "the books are closed")
        mine.populate(0, 16 * BLOCK)
        assert mine.read(0, 4) == b"mine"


def test_killed_its_huge_pages_return(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    block = needs.HUGE
    free = hugetlb.read_pool(block).free

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * block)
        memory.populate(8 * block, 3 * block)
        return client, memory

    with shared_pool(tmp_path, 4 * block, block=block, backing="memfd-hugetlb") as (pool, path):
        with HeldChild(member) as held:
            assert hugetlb.read_pool(block).free == free - 3
            held.kill()
            wait_until(lambda: hugetlb.read_pool(block).free == free, "the huge pages return")
        wait_until(lambda: pool.statistics().members == (), "the books are closed")
        assert pool.statistics().unbacked == 0


def test_killed_with_a_fork_that_lives_on(tmp_path: Path) -> None:
    """The fork holds the connection and the mapping. Its parent is dead all the same, and the fork's memory is cut off."""

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        pid = os.fork()
        if not pid:
            os.close(read)
            time.sleep(60)
            os._exit(0)
        os.write(write, pid.to_bytes(4, "little"))
        return client, memory

    read, write = os.pipe()
    with shared_pool(tmp_path) as (pool, path), HeldChild(member) as held:
        grandchild = int.from_bytes(os.read(read, 4), "little")
        try:
            held.kill()
            wait_until(lambda: pool.statistics().members == (), "the pool takes back what the dead process had")
            os.kill(grandchild, 0)
        finally:
            os.kill(grandchild, signal.SIGKILL)
            os.close(read)
            os.close(write)


def test_a_process_that_hangs_up_keeps_its_memory_until_it_ends(tmp_path: Path) -> None:
    """The process may still touch it: to cut the file off would kill it."""

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        memory.write(0, b"kept")
        client._link.shut_down()
        with pytest.raises(PoolGoneError):
            memory.populate(20 * BLOCK, BLOCK)
        assert memory.read(0, 4) == b"kept"
        return client, memory

    with shared_pool(tmp_path) as (pool, path), HeldChild(member) as held:
        wait_until(lambda: pool.statistics().members[0].orphaned, "the server sees the hang-up")
        assert charges(pool) == [(8 * BLOCK, 8 * BLOCK)]
        held.let_go()
        wait_until(lambda: pool.statistics().members == (), "the process ends")
        assert pool.statistics().available == pool.capacity


def test_detached_members_of_a_closed_server_are_reaped_later(tmp_path: Path) -> None:
    def member() -> object:
        client = connect(tmp_path / "s")
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        return client, memory

    with Pool(8 * BLOCK, block=BLOCK) as pool:
        server = pool.serve(tmp_path / "s")
        with HeldChild(member) as held:
            server.close()
            assert pool.statistics().members[0].orphaned
            with pool.sparse(8 * BLOCK) as memory:
                with pytest.raises(PoolFullError):
                    memory.populate()
                held.kill()
                wait_until(lambda: pool.statistics().available == pool.capacity, "the process ends")
                memory.populate()


def test_emptying_the_files_of_a_dead_process_does_not_delay_others(
    tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many GiB take seconds. Nor does a client that closes a member without emptying its file."""
    dismiss, slow, begun = MemberTable.remove, threading.Event(), threading.Semaphore(0)

    def slowly(self: MemberTable, number: int) -> None:
        if number in self._members and self.allocated(number):
            begun.release()
            assert slow.wait(30)
        dismiss(self, number)

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        return client, memory

    monkeypatch.setattr(MemberTable, "remove", slowly)
    try:
        with shared_pool(tmp_path) as (pool, path), connect(path, timeout=20) as client, client.sparse(64 * BLOCK) as memory:
            with HeldChild(member) as held:
                held.kill()
                assert begun.acquire(timeout=30)
            memory.populate(0, 2 * BLOCK)
            with pytest.raises(PoolFullError):
                memory.populate(0, 16 * BLOCK)
            created, fd = client._link.call(pool_protocol.Create(0, BLOCK, 0, None, None), pool_protocol.Created)
            assert fd is not None
            os.pwrite(fd, b"x", 0)
            client._link.call(pool_protocol.Close(0, created.member), pool_protocol.PoolDone)
            os.close(fd)
            assert client.statistics().charged == 10 * BLOCK
            slow.set()
            wait_until(lambda: len(pool.statistics().members) == 1, "both are gone in the end")
            memory.populate(0, 16 * BLOCK)
    finally:
        slow.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_descriptor_for_a_detached_member(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lives, and its own descriptor tells it of the end."""

    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        client._link.shut_down()
        return client, memory

    monkeypatch.setattr(MemberTable, "detach", exhausted)
    with shared_pool(tmp_path) as (pool, path), connect(path) as client:
        with HeldChild(member):
            wait_until(lambda: len(pool._servers[0]._disconnected) == 1, "the server sees the hang-up")
            assert client.statistics().charged == 8 * BLOCK
        wait_until(lambda: client.statistics().members == (), "the process ends")


def test_no_descriptor_for_a_new_member(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with shared_pool(tmp_path) as (pool, path), connect(path) as client:
        with monkeypatch.context() as patched:
            patched.setattr(MemberTable, "descriptor", exhausted)
            with pytest.raises(OSError, match="Too many open files"):
                client.sparse(64 * BLOCK, reserved=16 * BLOCK)
        assert pool.statistics().members == ()
        client.sparse(64 * BLOCK, reserved=16 * BLOCK).close()


def test_detached_members_of_a_closed_server_are_reaped_by_the_next_one(tmp_path: Path, no_leaks: None) -> None:
    def member() -> object:
        client = connect(tmp_path / "first")
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 8 * BLOCK)
        return client, memory

    with Pool(8 * BLOCK, block=BLOCK) as pool:
        first = pool.serve(tmp_path / "first")
        with HeldChild(member) as held:
            first.close()
            with pool.serve(tmp_path / "second") as second, connect(second.path) as client:
                assert client.statistics().charged == 8 * BLOCK
                held.kill()
                wait_until(lambda: client.statistics().members == (), "the process ends")


# --- a server that dies


@pytest.mark.parametrize("stopped", [False, True])
def test_the_server_dies_or_hangs(tmp_path: Path, no_leaks: None, stopped: bool) -> None:
    path = tmp_path / "s"
    with HeldChild(lambda: serve_forever(path)) as held:
        client = connect(path, timeout=1.5 if stopped else 30)
        memory = client.sparse(64 * BLOCK, unpopulated="zeros" if stopped else "fault")
        memory.populate(0, 4 * BLOCK)
        view = memory.view(0, 4 * BLOCK)
        view[:5] = b"alive"
        if stopped:
            stop_process(held.child.pid)
        else:
            held.kill()
        for patience in ("1.5", "0.2"):
            with pytest.raises(
                PoolGoneError, match=f"did not answer within {patience} s" if stopped else "is gone"
            ) as caught:
                memory.populate(0, 5 * BLOCK)
            assert isinstance(caught.value, prefault.PopulateError)
            assert isinstance(caught.value, ConnectionError)
            client._link._timeout = 0.2  # the requests that follow wait in vain as well
        memory.populate(0, 4 * BLOCK)  # they are charged
        with pytest.raises(PoolGoneError):
            client.statistics()
        with pytest.raises(PoolGoneError):
            client.sparse(BLOCK)
        with pytest.raises(ValueError, match="a name has"):
            client.sparse(BLOCK, name="n" * 5000)  # never asked: it would be no message
        assert bytes(view[:5]) == b"alive"
        view[:5] = b"still"
        memory.discard(BLOCK, 3 * BLOCK)
        assert memory.read(0, 5) == b"still"
        del view
        client.close()  # it needs no server for that, and the memory stays
        assert memory.read(0, 5) == b"still"
        memory.close()
        client.close()
        if stopped:
            os.kill(held.child.pid, signal.SIGCONT)
    with pytest.raises(ConnectionRefusedError, match="no server is alive there"):
        connect(path)


@contextmanager
def _stopped(server: int, client: PoolClient) -> Iterator[None]:
    """A server that answers no more until the end of the block; the client waits for it a moment only."""
    stop_process(server)
    patience, client._link._timeout = client._link._timeout, 0.2
    try:
        yield
    finally:
        client._link._timeout = patience
        os.kill(server, signal.SIGCONT)


def test_a_client_can_be_used_again_when_a_stopped_server_goes_on(tmp_path: Path, no_leaks: None) -> None:
    """Its late answers are of other requests, and what it carries out late is undone."""
    path = tmp_path / "s"
    with HeldChild(lambda: serve_forever(path)) as held, connect(path, timeout=30) as client, connect(path) as witness:
        memory, other = client.sparse(64 * BLOCK), client.sparse(64 * BLOCK)
        memory.populate(0, 2 * BLOCK)
        other.populate(0, 2 * BLOCK)
        late: list[Callable[[], object]] = [
            client.statistics,
            lambda: client.sparse(8 * BLOCK, reserved=4 * BLOCK),
            lambda: memory.populate(0, 3 * BLOCK),
        ]
        for first in late:
            with _stopped(held.child.pid, client):
                for request in (first, late[-1]):
                    with pytest.raises(PoolGoneError, match=r"did not answer within 0\.2 s") as caught:
                        request()
                    assert caught.value.errno == errno.ETIMEDOUT
            if first is late[-1]:  # without a further word of this client
                wait_until(lambda: witness.statistics().charged == 4 * BLOCK, "what was carried out late is undone")
            statistics = client.statistics()
            assert (statistics.charged, statistics.reserved_free, len(statistics.members)) == (4 * BLOCK, 0, 2)
            with pytest.raises(PoolFullError):
                memory.populate(0, 20 * BLOCK)
        with _stopped(held.child.pid, client):
            with pytest.raises(PoolGoneError):
                client.statistics()
            memory.discard(BLOCK, BLOCK)
            other.close()
        wait_until(lambda: [member.charged for member in witness.statistics().members] == [BLOCK], "it is told of both")
        memory.populate(0, 16 * BLOCK)
        assert client.statistics().charged == 16 * BLOCK
        memory.close()


def test_what_is_given_back_while_the_server_is_stopped_does_not_fill_the_socket(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    with HeldChild(lambda: serve_forever(path)) as held, connect(path, timeout=30) as client:
        memories = [client.sparse(BLOCK) for _ in range(16)]
        with _stopped(held.child.pid, client):
            with pytest.raises(PoolGoneError):
                client.statistics()
            for memory in memories[:8]:
                memory.close()
            for account in list(client._members):
                for charged in range(500):
                    client._link.post(pool_protocol.Settle(0, account._number, charged % 2 * BLOCK))
        statistics = client.statistics()
        assert (len(statistics.members), statistics.charged) == (8, 8 * BLOCK)
        for memory in memories[8:]:
            memory.close()


def test_a_new_server_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with HeldChild(lambda: serve_forever(path)) as held:
        held.kill()
    assert path.exists()
    with Pool(BLOCK, block=BLOCK) as pool, pool.serve(path), connect(path) as client:
        assert client.capacity == BLOCK


def test_a_fork_of_the_server_does_not_keep_its_clients_waiting(tmp_path: Path) -> None:
    """The fork has copies of all sockets; it lets go of them, so that the death of the server is seen."""
    path = tmp_path / "s"

    def serve() -> object:
        kept = serve_forever(path)
        wait_until(lambda: len(kept[1]._clients) == 1, "the client is connected")
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        os.write(write, pid.to_bytes(4, "little"))
        return kept

    read, write = os.pipe()
    held = HeldChild(serve)
    wait_until(path.exists, "the server is there")
    client = connect(path)
    with held:
        grandchild = int.from_bytes(os.read(read, 4), "little")
        try:
            held.kill()
            with pytest.raises(PoolGoneError, match="is gone"):
                client.statistics()
            client.close()
        finally:
            os.kill(grandchild, signal.SIGKILL)
            os.close(read)
            os.close(write)

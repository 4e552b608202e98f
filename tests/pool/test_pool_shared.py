"""A pool that processes share: what each has, and what becomes of it when one of them dies."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, TemporaryFile
from prefault._system import hugetlb
from prefault.errors import PoolFullError, PoolGoneError
from prefault.ipc import transport
from prefault.pool import Pool, PoolStatistics, connect
from prefault.pool.members import MemberTable
from prefault.pool.service import pool_protocol
from prefault.pool.service.pool_client import PoolClient
from prefault.pool.service.pool_server import PoolServer
from support import needs
from support.children import Child, in_child

_BLOCK = 4 * PAGE_SIZE


def _until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process or the server's thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"this never happened: {what}"
        time.sleep(0.005)


class _Held:
    """A child process that has set something up and waits, to be killed or let go."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._ready, told = os.pipe()
        waits, self._go = os.pipe()

        def run() -> object:
            kept = work()
            os.write(told, b"x")
            os.read(waits, 1)
            return None if kept is None else 1

        self.child = Child(run)
        os.close(told)
        os.close(waits)

    def __enter__(self) -> _Held:
        ready, _, _ = select.select([self._ready], [], [], 30)
        assert ready
        if not os.read(self._ready, 1):
            self.child.result()
        return self

    def kill(self) -> None:
        os.kill(self.child.pid, signal.SIGKILL)

    def let_go(self) -> None:
        os.write(self._go, b"x")

    def __exit__(self, *_: object) -> None:
        os.close(self._ready)
        os.close(self._go)
        self.child.__exit__()


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    _until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the process stops")


@contextmanager
def _shared(directory: Path, capacity: int = 16 * _BLOCK, **options: Any) -> Iterator[tuple[Pool, str]]:
    with Pool(capacity, **{"block": _BLOCK, **options}) as pool, pool.serve(directory / "s") as server:
        yield pool, server.path


def _charges(pool: Pool) -> list[tuple[int, int]]:
    return [(member.charged, member.allocated_bytes) for member in pool.statistics().members]


def test_it_is_the_same_pool(tmp_path: Path, no_leaks: None) -> None:
    with _shared(tmp_path) as (pool, path), connect(path) as client, pool.sparse(64 * _BLOCK, name="here") as here:
        assert (client.capacity, client.block, client.notes) == (pool.capacity, pool.block, pool.notes)
        with client.sparse("1 GiB", reserved=2 * _BLOCK, limit=12 * _BLOCK, name="there") as there:
            there.populate(100 * _BLOCK, 10 * _BLOCK)
            here.populate(0, 4 * _BLOCK)
            assert _charges(pool) == [(4 * _BLOCK, 4 * _BLOCK), (10 * _BLOCK, 10 * _BLOCK)]
            assert client.statistics() == pool.statistics()
            with pytest.raises(PoolFullError, match=r"there needs 48\.0 KiB more, beyond its limit of 192\.0 KiB"):
                there.populate(0, 3 * _BLOCK)
            with pytest.raises(PoolFullError, match=r"here .*which leaves 32\.0 KiB"):
                here.populate(4 * _BLOCK, 3 * _BLOCK)
            there.discard(100 * _BLOCK, 9 * _BLOCK)
            with pytest.raises(PoolFullError, match=r"16\.0 KiB are reserved for others"):
                here.populate(0, 15 * _BLOCK)
            here.populate(0, 14 * _BLOCK)
            with pytest.raises(PoolFullError, match="cannot reserve"):
                client.sparse(_BLOCK, reserved=1)
            with pytest.raises(ValueError, match="negative"):
                client.sparse(-1)
            with pytest.raises(BufferError, match="1 sparse memory is still open"):
                client.close()
        assert _charges(pool) == [(14 * _BLOCK, 14 * _BLOCK)]


def test_an_unrelated_process(tmp_path: Path) -> None:
    """Not a fork, which has everything anyway: it gets its memory from the socket."""
    script = """
import sys
import prefault.pool
with prefault.pool.connect(sys.argv[1]) as client, client.sparse("1 GiB", name="guest") as memory:
    memory.populate(0, client.block)
    memory.write(0, b"hello")
    print(client.statistics().charged, memory.read(0, 5).decode(), flush=True)
    sys.stdin.read()
"""
    with _shared(tmp_path) as (pool, path):
        process = subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == f"{_BLOCK} hello\n"
            (member,) = pool.statistics().members
            assert (member.pid, member.name, member.allocated_bytes) == (process.pid, "guest", _BLOCK)
            process.stdin.close()
        assert process.returncode == 0
        assert pool.statistics().members == ()


def test_a_hundred_thousand_scattered_blocks_through_the_socket(tmp_path: Path, no_leaks: None) -> None:
    count = 100_000
    starts = numpy.arange(count) * 2 * PAGE_SIZE
    ranges = numpy.column_stack((starts, numpy.full(count, PAGE_SIZE)))
    size = count * PAGE_SIZE
    with _shared(tmp_path, size, block=PAGE_SIZE) as (pool, path), connect(path) as client:
        with client.sparse(2 * size) as memory, pytest.raises(PoolFullError):
            memory.populate()
        with client.sparse(2 * size) as memory:
            memory.populate_many(ranges)
            assert _charges(pool) == [(count * PAGE_SIZE, count * PAGE_SIZE)]
            with pytest.raises(PoolFullError):
                memory.populate(PAGE_SIZE, PAGE_SIZE)
            memory.discard_many(ranges[: count // 2])
            assert _charges(pool) == [(count // 2 * PAGE_SIZE, count // 2 * PAGE_SIZE)]


# --- a member process that dies


def test_killed_its_memory_returns(tmp_path: Path, small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("2m")

    def used() -> int:
        found = os.statvfs(directory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * _BLOCK, reserved=9 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        return client, memory

    with _shared(tmp_path, backing=TemporaryFile(directory)) as (pool, path), pool.sparse(64 * _BLOCK) as mine:
        mine.populate(0, 2 * _BLOCK)
        mine.write(0, b"mine")
        before = used()
        with _Held(member) as held:
            assert used() == before + 8 * _BLOCK
            assert _charges(pool) == [(2 * _BLOCK, 2 * _BLOCK), (8 * _BLOCK, 8 * _BLOCK)]
            with pytest.raises(PoolFullError):
                mine.populate(0, 8 * _BLOCK)
            held.kill()
            # By itself: nobody asks the pool meanwhile.
            _until(lambda: used() == before, "the tmpfs gets the memory of the dead process back")
        _until(lambda: len(pool.statistics().members) == 1, "the books are closed")
        mine.populate(0, 16 * _BLOCK)
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

    with _shared(tmp_path, 4 * block, block=block, backing="memfd-hugetlb") as (pool, path):
        with _Held(member) as held:
            assert hugetlb.read_pool(block).free == free - 3
            held.kill()
            _until(lambda: hugetlb.read_pool(block).free == free, "the huge pages return")
        _until(lambda: pool.statistics().members == (), "the books are closed")
        assert pool.statistics().unbacked == 0


def test_killed_with_a_fork_that_lives_on(tmp_path: Path) -> None:
    """The fork holds the connection and the mapping. Its parent is dead all the same, and the fork's memory is cut off."""

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        pid = os.fork()
        if not pid:
            os.close(read)
            time.sleep(60)
            os._exit(0)
        os.write(write, pid.to_bytes(4, "little"))
        return client, memory

    read, write = os.pipe()
    with _shared(tmp_path) as (pool, path), _Held(member) as held:
        grandchild = int.from_bytes(os.read(read, 4), "little")
        try:
            held.kill()
            _until(lambda: pool.statistics().members == (), "the pool takes back what the dead process had")
            os.kill(grandchild, 0)
        finally:
            os.kill(grandchild, signal.SIGKILL)
            os.close(read)
            os.close(write)


def test_a_process_that_hangs_up_keeps_its_memory_until_it_ends(tmp_path: Path) -> None:
    """The process may still touch it: to cut the file off would kill it."""

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        memory.write(0, b"kept")
        client._link.shut_down()
        with pytest.raises(PoolGoneError):
            memory.populate(20 * _BLOCK, _BLOCK)
        assert memory.read(0, 4) == b"kept"
        return client, memory

    with _shared(tmp_path) as (pool, path), _Held(member) as held:
        _until(lambda: pool.statistics().members[0].orphaned, "the server sees the hang-up")
        assert _charges(pool) == [(8 * _BLOCK, 8 * _BLOCK)]
        held.let_go()
        _until(lambda: pool.statistics().members == (), "the process ends")
        assert pool.statistics().available == pool.capacity


def test_detached_members_of_a_closed_server_are_reaped_later(tmp_path: Path) -> None:
    def member() -> object:
        client = connect(tmp_path / "s")
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        return client, memory

    with Pool(8 * _BLOCK, block=_BLOCK) as pool:
        server = pool.serve(tmp_path / "s")
        with _Held(member) as held:
            server.close()
            assert pool.statistics().members[0].orphaned
            with pool.sparse(8 * _BLOCK) as memory:
                with pytest.raises(PoolFullError):
                    memory.populate()
                held.kill()
                _until(lambda: pool.statistics().available == pool.capacity, "the process ends")
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
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        return client, memory

    monkeypatch.setattr(MemberTable, "remove", slowly)
    try:
        with _shared(tmp_path) as (pool, path), connect(path, timeout=20) as client, client.sparse(64 * _BLOCK) as memory:
            with _Held(member) as held:
                held.kill()
                assert begun.acquire(timeout=30)
            memory.populate(0, 2 * _BLOCK)
            with pytest.raises(PoolFullError):
                memory.populate(0, 16 * _BLOCK)
            created, fd = client._link.call(pool_protocol.Create(0, _BLOCK, 0, None, None), pool_protocol.Created)
            assert fd is not None
            os.pwrite(fd, b"x", 0)
            client._link.call(pool_protocol.Close(0, created.member), pool_protocol.PoolDone)
            os.close(fd)
            assert client.statistics().charged == 10 * _BLOCK
            slow.set()
            _until(lambda: len(pool.statistics().members) == 1, "both are gone in the end")
            memory.populate(0, 16 * _BLOCK)
    finally:
        slow.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_descriptor_for_a_detached_member(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server lives, and its own descriptor tells it of the end."""

    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def member() -> object:
        client = connect(path)
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        client._link.shut_down()
        return client, memory

    monkeypatch.setattr(MemberTable, "detach", exhausted)
    with _shared(tmp_path) as (pool, path), connect(path) as client:
        with _Held(member):
            _until(lambda: len(pool._servers[0]._disconnected) == 1, "the server sees the hang-up")
            assert client.statistics().charged == 8 * _BLOCK
        _until(lambda: client.statistics().members == (), "the process ends")


def test_no_descriptor_for_a_new_member(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with _shared(tmp_path) as (pool, path), connect(path) as client:
        with monkeypatch.context() as patched:
            patched.setattr(MemberTable, "descriptor", exhausted)
            with pytest.raises(OSError, match="Too many open files"):
                client.sparse(64 * _BLOCK, reserved=16 * _BLOCK)
        assert pool.statistics().members == ()
        client.sparse(64 * _BLOCK, reserved=16 * _BLOCK).close()


def test_detached_members_of_a_closed_server_are_reaped_by_the_next_one(tmp_path: Path, no_leaks: None) -> None:
    def member() -> object:
        client = connect(tmp_path / "first")
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 8 * _BLOCK)
        return client, memory

    with Pool(8 * _BLOCK, block=_BLOCK) as pool:
        first = pool.serve(tmp_path / "first")
        with _Held(member) as held:
            first.close()
            with pool.serve(tmp_path / "second") as second, connect(second.path) as client:
                assert client.statistics().charged == 8 * _BLOCK
                held.kill()
                _until(lambda: client.statistics().members == (), "the process ends")


# --- a server that dies


def _serve_forever(path: Path) -> tuple[Pool, PoolServer]:
    pool = Pool(16 * _BLOCK, block=_BLOCK)
    return pool, pool.serve(path)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_server_dies_or_hangs(tmp_path: Path, no_leaks: None, stopped: bool) -> None:
    path = tmp_path / "s"
    with _Held(lambda: _serve_forever(path)) as held:
        client = connect(path, timeout=1.5 if stopped else 30)
        memory = client.sparse(64 * _BLOCK, unpopulated="zeros" if stopped else "fault")
        memory.populate(0, 4 * _BLOCK)
        view = memory.view(0, 4 * _BLOCK)
        view[:5] = b"alive"
        if stopped:
            _stop(held.child.pid)
        else:
            held.kill()
        for patience in ("1.5", "0.2"):
            with pytest.raises(
                PoolGoneError, match=f"did not answer within {patience} s" if stopped else "is gone"
            ) as caught:
                memory.populate(0, 5 * _BLOCK)
            assert isinstance(caught.value, prefault.PopulateError)
            assert isinstance(caught.value, ConnectionError)
            client._link._timeout = 0.2  # the requests that follow wait in vain as well
        memory.populate(0, 4 * _BLOCK)  # they are charged
        with pytest.raises(PoolGoneError):
            client.statistics()
        with pytest.raises(PoolGoneError):
            client.sparse(_BLOCK)
        with pytest.raises(ValueError, match="a name has"):
            client.sparse(_BLOCK, name="n" * 5000)  # never asked: it would be no message
        assert bytes(view[:5]) == b"alive"
        view[:5] = b"still"
        memory.discard(_BLOCK, 3 * _BLOCK)
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
    _stop(server)
    patience, client._link._timeout = client._link._timeout, 0.2
    try:
        yield
    finally:
        client._link._timeout = patience
        os.kill(server, signal.SIGCONT)


def test_a_client_can_be_used_again_when_a_stopped_server_goes_on(tmp_path: Path, no_leaks: None) -> None:
    """Its late answers are of other requests, and what it carries out late is undone."""
    path = tmp_path / "s"
    with _Held(lambda: _serve_forever(path)) as held, connect(path, timeout=30) as client, connect(path) as witness:
        memory, other = client.sparse(64 * _BLOCK), client.sparse(64 * _BLOCK)
        memory.populate(0, 2 * _BLOCK)
        other.populate(0, 2 * _BLOCK)
        late: list[Callable[[], object]] = [
            client.statistics,
            lambda: client.sparse(8 * _BLOCK, reserved=4 * _BLOCK),
            lambda: memory.populate(0, 3 * _BLOCK),
        ]
        for first in late:
            with _stopped(held.child.pid, client):
                for request in (first, late[-1]):
                    with pytest.raises(PoolGoneError, match=r"did not answer within 0\.2 s") as caught:
                        request()
                    assert caught.value.errno == errno.ETIMEDOUT
            if first is late[-1]:  # without a further word of this client
                _until(lambda: witness.statistics().charged == 4 * _BLOCK, "what was carried out late is undone")
            statistics = client.statistics()
            assert (statistics.charged, statistics.reserved_free, len(statistics.members)) == (4 * _BLOCK, 0, 2)
            with pytest.raises(PoolFullError):
                memory.populate(0, 20 * _BLOCK)
        with _stopped(held.child.pid, client):
            with pytest.raises(PoolGoneError):
                client.statistics()
            memory.discard(_BLOCK, _BLOCK)
            other.close()
        _until(lambda: [member.charged for member in witness.statistics().members] == [_BLOCK], "it is told of both")
        memory.populate(0, 16 * _BLOCK)
        assert client.statistics().charged == 16 * _BLOCK
        memory.close()


def test_what_is_given_back_while_the_server_is_stopped_does_not_fill_the_socket(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    with _Held(lambda: _serve_forever(path)) as held, connect(path, timeout=30) as client:
        memories = [client.sparse(_BLOCK) for _ in range(16)]
        with _stopped(held.child.pid, client):
            with pytest.raises(PoolGoneError):
                client.statistics()
            for memory in memories[:8]:
                memory.close()
            for account in list(client._members):
                for charged in range(500):
                    client._link.post(pool_protocol.Settle(0, account._number, charged % 2 * _BLOCK))
        statistics = client.statistics()
        assert (len(statistics.members), statistics.charged) == (8, 8 * _BLOCK)
        for memory in memories[8:]:
            memory.close()


def test_a_new_server_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with _Held(lambda: _serve_forever(path)) as held:
        held.kill()
    assert path.exists()
    with Pool(_BLOCK, block=_BLOCK) as pool, pool.serve(path), connect(path) as client:
        assert client.capacity == _BLOCK


def test_a_fork_of_the_server_does_not_keep_its_clients_waiting(tmp_path: Path) -> None:
    """The fork has copies of all sockets; it lets go of them, so that the death of the server is seen."""
    path = tmp_path / "s"

    def serve() -> object:
        kept = _serve_forever(path)
        _until(lambda: len(kept[1]._clients) == 1, "the client is connected")
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        os.write(write, pid.to_bytes(4, "little"))
        return kept

    read, write = os.pipe()
    held = _Held(serve)
    _until(path.exists, "the server is there")
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


# --- forks of a client


def test_a_fork_of_a_client(tmp_path: Path, no_leaks: None) -> None:
    with _shared(tmp_path) as (pool, path), connect(path, timeout=10) as client, client.sparse(64 * _BLOCK) as memory:
        memory.populate(0, 2 * _BLOCK)
        memory.write(0, b"before")

        def child() -> bytes:
            with pytest.raises(PoolGoneError, match="of which this one is a fork"):
                memory.populate(4 * _BLOCK, _BLOCK)
            with pytest.raises(PoolGoneError, match="connect again here"):
                client.statistics()
            found = memory.read(0, 6)
            memory.write(0, b"after.")
            memory.discard(_BLOCK, _BLOCK)
            memory.close()
            client.close()
            with connect(path) as own, own.sparse(_BLOCK) as mine:
                mine.populate()
            return found

        assert in_child(child) == b"before"
        assert memory.read(0, 6) == b"after."
        memory.populate(2 * _BLOCK, 6 * _BLOCK)
        # What the fork discarded stays charged until its owner discards it.
        assert _charges(pool) == [(8 * _BLOCK, 7 * _BLOCK)]
        memory.discard(0, 2 * _BLOCK)
        assert _charges(pool) == [(6 * _BLOCK, 6 * _BLOCK)]


# --- Ctrl-C


def test_an_interrupted_request_leaves_the_connection_usable(tmp_path: Path, no_leaks: None) -> None:
    """The reply without a waiting thread is skipped, and the member without a user is closed."""
    path = tmp_path / "s"
    with _Held(lambda: _serve_forever(path)) as held, connect(path, timeout=30) as client:
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, _BLOCK)

        def interrupted(work: Callable[[], object]) -> None:
            _stop(held.child.pid)
            timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.start()
            resume = threading.Timer(0.2, os.kill, (held.child.pid, signal.SIGCONT))
            resume.start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    work()
            finally:
                timer.join()
                resume.join()

        interrupted(client.statistics)
        interrupted(lambda: client.sparse(8 * _BLOCK, reserved=4 * _BLOCK))
        interrupted(lambda: memory.populate(0, 3 * _BLOCK))
        assert client.statistics().charged in (_BLOCK, 3 * _BLOCK)
        memory.populate(0, 2 * _BLOCK)
        statistics = client.statistics()
        assert (statistics.charged, statistics.reserved_free, len(statistics.members)) == (2 * _BLOCK, 0, 1)
        memory.close()


def test_a_finalizer_in_the_middle_of_a_request(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes memory while this very thread waits for an answer: neither loses what is its own."""
    with _shared(tmp_path) as (pool, path), connect(path, timeout=10) as client, client.sparse(64 * _BLOCK) as kept:
        kept.populate(0, 4 * _BLOCK)
        memory = client.sparse(64 * _BLOCK)
        memory.populate(0, 4 * _BLOCK)
        receive, refused = transport.receive, list[RuntimeError]()

        def interrupted(*arguments: Any) -> Any:
            if not memory.closed:
                memory.close()
                kept.discard(0, 2 * _BLOCK)
                try:
                    kept.populate(8 * _BLOCK, _BLOCK)
                except RuntimeError as error:
                    refused.append(error)
            return receive(*arguments)

        monkeypatch.setattr(transport, "receive", interrupted)
        created = client.sparse(64 * _BLOCK)
        assert memory.closed
        assert len(refused) == 1
        assert "a signal handler or a finalizer cannot ask the pool now" in str(refused[0])
        assert client.statistics().charged == 2 * _BLOCK
        assert _charges(pool) == [(2 * _BLOCK, 2 * _BLOCK), (0, 0)]
        created.populate(0, 14 * _BLOCK)
        created.close()


# --- the high-water mark


def test_clients_receive_the_high_water_mark(tmp_path: Path, no_leaks: None) -> None:
    told, seen = threading.Semaphore(0), list[PoolStatistics]()

    def callback(statistics: PoolStatistics) -> None:
        seen.append(statistics)
        told.release()

    with (
        _shared(tmp_path, high_water=0.5) as (pool, path),
        connect(path, on_high_water=callback) as client,
        client.sparse(64 * _BLOCK) as there,
        pool.sparse(64 * _BLOCK) as here,
    ):
        for _ in range(3):
            here.populate(0, 4 * _BLOCK)
            there.populate(0, 4 * _BLOCK)
            assert told.acquire(timeout=30)
            assert seen[-1].charged == 8 * _BLOCK
            here.populate(0, 8 * _BLOCK)
            here.discard()
        assert not told.acquire(timeout=0.05)
        assert len(seen) == 3


def test_a_subscriber_that_never_reads_delays_no_other(tmp_path: Path, no_leaks: None) -> None:
    from prefault.pool.service.pool_connection import PoolConnection

    with _shared(tmp_path, 2 * PAGE_SIZE, block=PAGE_SIZE, high_water=1) as (pool, path):
        deaf = PoolConnection(path, 10)
        deaf.greet(events=True)
        with pool.sparse(PAGE_SIZE) as memory, connect(path) as client:
            for _ in range(1000):
                memory.populate()
                memory.discard()
            assert client.statistics().peak == PAGE_SIZE
        deaf.close()


# --- many at once


def _work(path: str, seed: int, steps: int) -> int:
    """Populate and discard at random from two threads; how often the pool was full."""
    full = 0

    def churn(client: PoolClient, number: int) -> None:
        nonlocal full
        rng = random.Random(seed * 10 + number)
        with client.sparse(64 * _BLOCK, reserved=_BLOCK) as memory:
            for _ in range(steps):
                at, length = rng.randrange(56), rng.randrange(1, 8)
                try:
                    if rng.random() < 0.6:
                        memory.populate(at * _BLOCK, length * _BLOCK)
                    else:
                        memory.discard(at * _BLOCK, length * _BLOCK)
                except PoolFullError:
                    full += 1
            memory.discard()
            memory.populate(0, _BLOCK)  # what was reserved is there, whatever the others do

    with connect(path) as client:
        threads = [threading.Thread(target=churn, args=(client, number)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return full


def _processes(directory: Path, count: int, steps: int, kills: int) -> None:
    with _shared(directory, 24 * _BLOCK) as (pool, path), pool.sparse(64 * _BLOCK, reserved=4 * _BLOCK) as mine:
        mine.populate(0, 4 * _BLOCK)
        mine.write(0, b"safe" * _BLOCK)
        workers = [Child(lambda seed=seed: _work(path, seed, steps)) for seed in range(count)]  # type: ignore[misc]
        victims = [Child(lambda seed=seed: _work(path, seed, 1 << 30)) for seed in range(kills)]  # type: ignore[misc]
        for victim in victims:
            time.sleep(0.05)
            os.kill(victim.pid, signal.SIGKILL)
        while not all(worker.ended() for worker in workers):
            statistics = pool.statistics()
            assert statistics.charged + statistics.reserved_free + statistics.available == statistics.capacity
            assert statistics.available >= 0
            assert statistics.allocated_bytes <= statistics.capacity
            time.sleep(0.01)
        for worker in workers:
            worker.result()
        for child in (*workers, *victims):
            child.__exit__()
        _until(lambda: len(pool.statistics().members) == 1, "all others are gone")
        assert _charges(pool) == [(4 * _BLOCK, 4 * _BLOCK)]
        assert mine.read(0, 4 * _BLOCK) == b"safe" * _BLOCK


def test_several_processes(tmp_path: Path, no_descriptors: None) -> None:
    _processes(tmp_path, 3, 60, 2)


@pytest.mark.stress
def test_several_processes_for_long(tmp_path: Path, no_descriptors: None) -> None:
    _processes(tmp_path, 6, 3000, 40)

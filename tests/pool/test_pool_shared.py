"""A pool that processes share: members, forks, Ctrl-C, the high-water mark, many processes at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from prefault import PAGE_SIZE
from prefault.errors import PoolFullError, PoolGoneError
from prefault.ipc import transport
from prefault.pool import PoolStatistics, connect
from prefault.pool.service.pool_client import PoolClient
from support.children import Child, in_child
from support.pools import BLOCK, HeldChild, charges, serve_forever, shared_pool, stop_process, wait_until


def test_it_is_the_same_pool(tmp_path: Path, no_leaks: None) -> None:
    with shared_pool(tmp_path) as (pool, path), connect(path) as client, pool.sparse(64 * BLOCK, name="here") as here:
        assert (client.capacity, client.block, client.notes) == (pool.capacity, pool.block, pool.notes)
        with client.sparse("1 GiB", reserved=2 * BLOCK, limit=12 * BLOCK, name="there") as there:
            there.populate(100 * BLOCK, 10 * BLOCK)
            here.populate(0, 4 * BLOCK)
            assert charges(pool) == [(4 * BLOCK, 4 * BLOCK), (10 * BLOCK, 10 * BLOCK)]
            assert client.statistics() == pool.statistics()
            with pytest.raises(PoolFullError, match=r"there needs 48\.0 KiB more, beyond its limit of 192\.0 KiB"):
                there.populate(0, 3 * BLOCK)
            with pytest.raises(PoolFullError, match=r"here .*which leaves 32\.0 KiB"):
                here.populate(4 * BLOCK, 3 * BLOCK)
            there.discard(100 * BLOCK, 9 * BLOCK)
            with pytest.raises(PoolFullError, match=r"16\.0 KiB are reserved for others"):
                here.populate(0, 15 * BLOCK)
            here.populate(0, 14 * BLOCK)
            with pytest.raises(PoolFullError, match="cannot reserve"):
                client.sparse(BLOCK, reserved=1)
            with pytest.raises(ValueError, match="negative"):
                client.sparse(-1)
            with pytest.raises(BufferError, match="1 sparse memory is still open"):
                client.close()
        assert charges(pool) == [(14 * BLOCK, 14 * BLOCK)]


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
    with shared_pool(tmp_path) as (pool, path):
        process = subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == f"{BLOCK} hello\n"
            (member,) = pool.statistics().members
            assert (member.pid, member.name, member.allocated_bytes) == (process.pid, "guest", BLOCK)
            process.stdin.close()
        assert process.returncode == 0
        assert pool.statistics().members == ()


def test_a_hundred_thousand_scattered_blocks_through_the_socket(tmp_path: Path, no_leaks: None) -> None:
    count = 100_000
    starts = numpy.arange(count) * 2 * PAGE_SIZE
    ranges = numpy.column_stack((starts, numpy.full(count, PAGE_SIZE)))
    size = count * PAGE_SIZE
    with shared_pool(tmp_path, size, block=PAGE_SIZE) as (pool, path), connect(path) as client:
        with client.sparse(2 * size) as memory, pytest.raises(PoolFullError):
            memory.populate()
        with client.sparse(2 * size) as memory:
            memory.populate_many(ranges)
            assert charges(pool) == [(count * PAGE_SIZE, count * PAGE_SIZE)]
            with pytest.raises(PoolFullError):
                memory.populate(PAGE_SIZE, PAGE_SIZE)
            memory.discard_many(ranges[: count // 2])
            assert charges(pool) == [(count // 2 * PAGE_SIZE, count // 2 * PAGE_SIZE)]


# --- forks of a client


def test_a_fork_of_a_client(tmp_path: Path, no_leaks: None) -> None:
    with shared_pool(tmp_path) as (pool, path), connect(path, timeout=10) as client, client.sparse(64 * BLOCK) as memory:
        memory.populate(0, 2 * BLOCK)
        memory.write(0, b"before")

        def child() -> bytes:
            with pytest.raises(PoolGoneError, match="of which this one is a fork"):
                memory.populate(4 * BLOCK, BLOCK)
            with pytest.raises(PoolGoneError, match="connect again here"):
                client.statistics()
            found = memory.read(0, 6)
            memory.write(0, b"after.")
            memory.discard(BLOCK, BLOCK)
            memory.close()
            client.close()
            with connect(path) as own, own.sparse(BLOCK) as mine:
                mine.populate()
            return found

        assert in_child(child) == b"before"
        assert memory.read(0, 6) == b"after."
        memory.populate(2 * BLOCK, 6 * BLOCK)
        # What the fork discarded stays charged until its owner discards it.
        assert charges(pool) == [(8 * BLOCK, 7 * BLOCK)]
        memory.discard(0, 2 * BLOCK)
        assert charges(pool) == [(6 * BLOCK, 6 * BLOCK)]


# --- Ctrl-C


def test_an_interrupted_request_leaves_the_connection_usable(tmp_path: Path, no_leaks: None) -> None:
    """The reply without a waiting thread is skipped, and the member without a user is closed."""
    path = tmp_path / "s"
    with HeldChild(lambda: serve_forever(path)) as held, connect(path, timeout=30) as client:
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, BLOCK)

        def interrupted(work: Callable[[], object]) -> None:
            stop_process(held.child.pid)
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
        interrupted(lambda: client.sparse(8 * BLOCK, reserved=4 * BLOCK))
        interrupted(lambda: memory.populate(0, 3 * BLOCK))
        assert client.statistics().charged in (BLOCK, 3 * BLOCK)
        memory.populate(0, 2 * BLOCK)
        statistics = client.statistics()
        assert (statistics.charged, statistics.reserved_free, len(statistics.members)) == (2 * BLOCK, 0, 1)
        memory.close()


def test_a_finalizer_in_the_middle_of_a_request(tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes memory while this very thread waits for an answer: neither loses what is its own."""
    with shared_pool(tmp_path) as (pool, path), connect(path, timeout=10) as client, client.sparse(64 * BLOCK) as kept:
        kept.populate(0, 4 * BLOCK)
        memory = client.sparse(64 * BLOCK)
        memory.populate(0, 4 * BLOCK)
        receive, refused = transport.receive, list[RuntimeError]()

        def interrupted(*arguments: Any) -> Any:
            if not memory.closed:
                memory.close()
                kept.discard(0, 2 * BLOCK)
                try:
                    kept.populate(8 * BLOCK, BLOCK)
                except RuntimeError as error:
                    refused.append(error)
            return receive(*arguments)

        monkeypatch.setattr(transport, "receive", interrupted)
        created = client.sparse(64 * BLOCK)
        assert memory.closed
        assert len(refused) == 1
        assert "a signal handler or a finalizer cannot ask the pool now" in str(refused[0])
        assert client.statistics().charged == 2 * BLOCK
        assert charges(pool) == [(2 * BLOCK, 2 * BLOCK), (0, 0)]
        created.populate(0, 14 * BLOCK)
        created.close()


# --- the high-water mark


def test_clients_receive_the_high_water_mark(tmp_path: Path, no_leaks: None) -> None:
    told, seen = threading.Semaphore(0), list[PoolStatistics]()

    def callback(statistics: PoolStatistics) -> None:
        seen.append(statistics)
        told.release()

    with (
        shared_pool(tmp_path, high_water=0.5) as (pool, path),
        connect(path, on_high_water=callback) as client,
        client.sparse(64 * BLOCK) as there,
        pool.sparse(64 * BLOCK) as here,
    ):
        for _ in range(3):
            here.populate(0, 4 * BLOCK)
            there.populate(0, 4 * BLOCK)
            assert told.acquire(timeout=30)
            assert seen[-1].charged == 8 * BLOCK
            here.populate(0, 8 * BLOCK)
            here.discard()
        assert not told.acquire(timeout=0.05)
        assert len(seen) == 3


def test_a_subscriber_that_never_reads_delays_no_other(tmp_path: Path, no_leaks: None) -> None:
    from prefault.pool.service.pool_connection import PoolConnection

    with shared_pool(tmp_path, 2 * PAGE_SIZE, block=PAGE_SIZE, high_water=1) as (pool, path):
        deaf = PoolConnection(path, 10)
        deaf.greet(events=True)
        with pool.sparse(PAGE_SIZE) as memory, connect(path) as client:
            for _ in range(500):
                memory.populate()
                memory.discard()
            assert client.statistics().peak == PAGE_SIZE
            assert any(other.reply is not None for other in pool._servers[0]._clients), "its socket was not filled"
        deaf.close()


# --- many at once


def _work(path: str, seed: int, steps: int) -> int:
    """Populate and discard at random from two threads; how often the pool was full."""
    full = 0

    def churn(client: PoolClient, number: int) -> None:
        nonlocal full
        rng = random.Random(seed * 10 + number)
        with client.sparse(64 * BLOCK, reserved=BLOCK) as memory:
            for _ in range(steps):
                at, length = rng.randrange(56), rng.randrange(1, 8)
                try:
                    if rng.random() < 0.6:
                        memory.populate(at * BLOCK, length * BLOCK)
                    else:
                        memory.discard(at * BLOCK, length * BLOCK)
                except PoolFullError:
                    full += 1
            memory.discard()
            memory.populate(0, BLOCK)  # what was reserved is there, whatever the others do

    with connect(path) as client:
        threads = [threading.Thread(target=churn, args=(client, number)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return full


def _processes(directory: Path, count: int, steps: int, kills: int) -> None:
    with shared_pool(directory, 24 * BLOCK) as (pool, path), pool.sparse(64 * BLOCK, reserved=4 * BLOCK) as mine:
        mine.populate(0, 4 * BLOCK)
        mine.write(0, b"safe" * BLOCK)
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
        wait_until(lambda: len(pool.statistics().members) == 1, "all others are gone")
        assert charges(pool) == [(4 * BLOCK, 4 * BLOCK)]
        assert mine.read(0, 4 * BLOCK) == b"safe" * BLOCK


def test_several_processes(tmp_path: Path, no_descriptors: None) -> None:
    _processes(tmp_path, 3, 60, 2)


@pytest.mark.stress
def test_several_processes_for_long(tmp_path: Path, no_descriptors: None) -> None:
    _processes(tmp_path, 6, 3000, 40)

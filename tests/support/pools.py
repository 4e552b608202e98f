"""A pool that processes share, and processes that hold something until they are killed."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefault import PAGE_SIZE
from prefault.pool import Pool
from prefault.pool.service.pool_server import PoolServer
from support.children import Child

BLOCK = 4 * PAGE_SIZE


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process or the server's thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"this never happened: {what}"
        time.sleep(0.005)


class HeldChild:
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

    def __enter__(self) -> HeldChild:
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


def stop_process(pid: int) -> None:
    """Stop a process with SIGSTOP, and wait until it is stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the process stops")


@contextmanager
def shared_pool(directory: Path, capacity: int = 16 * BLOCK, **options: Any) -> Iterator[tuple[Pool, str]]:
    """Yield a pool and the path at which it is served."""
    with Pool(capacity, **{"block": BLOCK, **options}) as pool, pool.serve(directory / "s") as server:
        yield pool, server.path


def serve_forever(path: Path) -> tuple[Pool, PoolServer]:
    """Serve a pool of 16 blocks at ``path``; the caller keeps what is returned."""
    pool = Pool(16 * BLOCK, block=BLOCK)
    return pool, pool.serve(path)


def charges(pool: Pool) -> list[tuple[int, int]]:
    """Return the charged and the allocated bytes of each member."""
    return [(member.charged, member.allocated_bytes) for member in pool.statistics().members]

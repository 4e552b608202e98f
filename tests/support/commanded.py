"""A device that carries out what its client asks for: the operations of its pool, one control request each."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import threading
import time
from typing import Any

from prefault.device.device_pool import Access, ClientProcess, DevicePool, ShootDown
from prefault.device.driver import READ_ONLY, RETRY, Device, DeviceArea, Recipe, Supplied
from prefault.sizes import PAGE_SIZE


def command(area: Any, what: str, first: int = 0, stop: int = 0, **more: Any) -> Any:
    """Have the device of an area carry out a command on pages; return its answer."""
    return json.loads(area.control(json.dumps({"what": what, "first": first, "stop": stop, **more}).encode()))


class Commanded(Device):
    """Pages begin with their number; then its client decides what becomes of them.

    Args:
        pages: number of pages.
        workers, tracks_writes, page_size, capacity_pages, timeout_s: see :class:`Device`.
        retries: pages for which the driver answers RETRY, until told otherwise.
        read_only: pages that are supplied READ_ONLY.
        allows: ``mkwrite`` allows.
    """

    evicts = True
    restartable = True

    def __init__(
        self, pages: int = 16, *, workers: int = 0, tracks_writes: bool = False, page_size: int = PAGE_SIZE,
        capacity_pages: int | None = None, timeout_s: float = 30.0, retries: list[int] | None = None,
        read_only: list[int] | None = None, allows: bool = False,
    ) -> None:  # fmt: skip
        self._arguments = {
            "pages": pages, "workers": workers, "tracks_writes": tracks_writes, "page_size": page_size,
            "capacity_pages": capacity_pages, "timeout_s": timeout_s, "retries": retries or [],
            "read_only": read_only or [], "allows": allows,
        }  # fmt: skip
        self.length = pages * page_size
        self.page_size = page_size
        self.workers = workers
        self.tracks_writes = tracks_writes
        self.timeout_s = timeout_s
        self.capacity = None if capacity_pages is None else capacity_pages * page_size
        self.retries = set(retries or [])
        self.read_only = set(read_only or [])
        self.allows = allows
        self.saved: dict[int, bytes] = {}
        self.asked: list[tuple[int, str]] = []
        self.written: list[int] = []
        self._go_on = threading.Event()

    def recipe(self) -> Recipe:
        return Recipe("support.commanded:Commanded", self._arguments)

    def start(self, pool: DevicePool) -> None:
        self.pool = pool

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        self.asked.append((page, access))
        if page in self.retries:
            return RETRY
        area.frame(page)[:8] = (page + 1).to_bytes(8, "little")
        if page in self.saved:
            area.frame(page)[:] = self.saved[page]
        return READ_ONLY if page in self.read_only else None

    def mkwrite(self, area: DeviceArea, page: int) -> None:
        self.written.append(page)
        if not self.allows:
            raise PermissionError(errno.EACCES, f"page {page} is read-only")

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        asked = json.loads(request)
        return json.dumps(
            getattr(self, f"do_{asked.pop('what')}")(range(asked.pop("first"), asked.pop("stop")), **asked)
        ).encode()

    def _save(self, run: range, content: memoryview) -> None:
        for index, page in enumerate(run):
            self.saved[page] = bytes(content[index * self.page_size : (index + 1) * self.page_size])

    # --- commands

    def do_asked(self, pages: range) -> Any:
        return [list(call) for call in self.asked]

    def do_written(self, pages: range) -> Any:
        return self.written

    def do_saved(self, pages: range) -> Any:
        return sorted(self.saved)

    def do_ready(self, pages: range) -> Any:
        return [[run.start, run.stop] for run in self.pool.ready(pages)]

    def do_dirty(self, pages: range) -> Any:
        return [[run.start, run.stop] for run in self.pool.dirty(pages)]

    def do_evict(self, pages: range) -> Any:
        self.pool.evict(pages, self._save)

    def do_writeback(self, pages: range, slowly_s: float = 0.0) -> Any:
        def save(run: range, content: memoryview) -> None:
            time.sleep(slowly_s)
            self._save(run, content)

        return self.pool.writeback(pages, save)

    def do_retry(self, pages: range, retries: list[int]) -> None:
        self.retries = set(retries)
        self.pool.retry(pages)

    def do_supply(self, pages: range, byte: int | None = None, fail: bool = False) -> int:
        def write(run: range, frames: memoryview) -> None:
            if fail:
                raise ValueError("no content today")
            frames[:] = bytes([byte or 0]) * len(frames)

        return self.pool.supply(pages, None if byte is None else write)

    def do_protect(self, pages: range, access: Access) -> None:
        self.pool.protect(pages, access)

    def do_allow(self, pages: range, allows: bool) -> None:
        self.allows = allows

    def do_poison(self, pages: range, reason: str = "") -> None:
        self.pool.poison(pages, reason)

    def do_shoot_down(
        self, pages: range, *, add: int = 0, access: Access | None = None, drop: list[int] | None = None,
        sleep_s: float = 0.0, fail: bool = False, die: bool = False, nested: bool = False,
        largest_file: int = resource.RLIM_INFINITY,
    ) -> Any:  # fmt: skip
        """Shoot pages down; add a number to the first word of each, protect and drop them, and then end in some way."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))  # Python ignores SIGXFSZ
        try:
            return self._shoot_down(pages, add, access, drop, sleep_s, fail, die, nested)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def _shoot_down(
        self, pages: range, add: int, access: Access | None, drop: list[int] | None, sleep_s: float, fail: bool, die: bool,
        nested: bool,
    ) -> Any:  # fmt: skip
        with self.pool.shoot_down(pages) as move:
            found = {
                page: int.from_bytes(move.content(range(page, page + 1))[:8], "little") for run in move.runs for page in run
            }
            time.sleep(sleep_s)
            if add:
                self._add(move, add)
            if access is not None:
                move.protect(pages, access)
            if drop is not None:
                move.drop(range(*drop))
            if nested:
                with self.pool.shoot_down(pages):
                    pass
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            if fail:
                raise OSError(errno.ECANCELED, "changed my mind")
        return found

    def _add(self, move: ShootDown, number: int) -> None:
        for run in move.runs:
            before = move.content(run)
            frames = move.frames(run)
            for at in range(0, len(run) * self.page_size, self.page_size):
                word = int.from_bytes(before[at : at + 8], "little") + number
                frames[at : at + self.page_size] = before[at : at + self.page_size]
                frames[at : at + 8] = word.to_bytes(8, "little")

    def do_shake(self, pages: range, seconds: float, how: str) -> int:
        """Shoot down, evict, write back or protect these pages again and again, one after the other; return how often."""
        until, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            rounds += 1
            time.sleep(0.001)  # as a driver would: one that never lets go of the lock starves the loop
            with contextlib.suppress(BlockingIOError):
                if how == "shoot_down":
                    with self.pool.shoot_down(pages):
                        pass
                elif how == "replace":
                    with self.pool.shoot_down(pages) as move:
                        self._add(move, 0)
                elif how == "cancel":
                    with contextlib.suppress(ValueError), self.pool.shoot_down(pages) as move:
                        move.frames(move.runs[0] if move.runs else range(0))
                        raise ValueError
                elif how == "evict":
                    self.pool.evict(pages, self._save)
                elif how == "writeback":
                    self.pool.writeback(pages, self._save)
                else:
                    self.pool.protect(pages, "read")
        return rounds


class LocalCommanded(Commanded):
    """A commanded device of a test's own class: its server is a fork, which needs no recipe."""

    def recipe(self) -> None:  # type: ignore[override]
        return None

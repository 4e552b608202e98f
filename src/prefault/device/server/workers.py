"""Driver calls as jobs: run in the loop itself, or in worker threads that post their results back to the loop."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prefault.device import limit_messages
from prefault.device.frames import RESULTS
from prefault.device.page_states import DevicePageState
from prefault.device.pages import fault_resolution
from prefault.device.pages.fills import Fill, FillFailure
from prefault.device.server.driver_calls import DriverCalls
from prefault.errors import DeviceError

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServedArea, ServedClient, ServerState

_log = logging.getLogger("prefault.device")
_MISSING = int(DevicePageState.MISSING)
_SOFTWARE = 70  # EX_SOFTWARE

Work = Callable[[int], Callable[[], None]]
"""Function of a slot of the heartbeat, run in a worker; it returns a continuation for the loop."""


class _FillWork(partial[Callable[[], None]]):
    """Work that supplies the pages of a fill: :meth:`Workers.stop` drops what has not begun, and keeps all other work."""


class _Call(NamedTuple):
    """Work, and the name of the object that it is for, if any."""

    work: Work
    name: str | None


class Workers:
    """Threads that run only driver calls. Without threads, calls run at once in the calling thread, which is the loop.

    They are started when there is work for them, except the first. Only the loop calls the methods.

    Args:
        count: number of threads.
        each: most calls for one object that are given to threads at once; the others wait, whatever is idle.

    Attributes:
        count: most threads: the limit on processes may leave fewer than were asked for.

    Raises:
        DeviceError: the limit on processes leaves no thread.
    """

    def __init__(self, state: ServerState, count: int, each: int | None = None) -> None:
        self.count = count
        self._each = each
        self._state = state
        self._heartbeat = state.frames.heartbeat
        self._given: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting: deque[_Call] = deque()
        """Calls that wait for a thread."""
        self._held: dict[str, deque[Work]] = {}
        """Calls that wait for others of their object."""
        self._admitted: dict[str, int] = {}
        """Number of calls for an object that run or wait for a thread."""
        self._finished: deque[tuple[_Call, Callable[[], None]]] = deque()
        self._busy = 0
        self._threads: list[threading.Thread] = []
        if count:
            try:
                self._start_thread()
            except RuntimeError as error:  # as the interpreter calls EAGAIN
                raise DeviceError(
                    errno.EAGAIN, f"the workers of {state.name} cannot be started: {limit_messages.no_process()}"
                ) from error

    def _start_thread(self) -> None:
        slot = len(self._threads) + 1
        thread = threading.Thread(target=self._run, args=(slot,), name=f"prefault-device-{slot}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def idle_for(self, area: ServedArea) -> int:
        """Return the number of calls for an area that would start at once."""
        idle = self.count - self._busy - len(self._waiting)
        name = self._limited(area)
        if name is None or self._each is None:
            return idle
        return min(idle, self._each - self._admitted.get(name, 0) - len(self._held.get(name, ())))

    @property
    def busy(self) -> bool:
        """True while any worker runs a call."""
        return self._busy > 0

    def submit(self, work: Work, area: ServedArea | None = None) -> None:
        """Run work in a worker, for an area or for none, in order of submission as far as objects allow."""
        if not self.count:
            return work(0)()
        name = self._limited(area)
        if name is not None:
            if self._admitted.get(name, 0) == self._each:
                self._held.setdefault(name, deque()).append(work)
                return None
            self._admitted[name] = self._admitted.get(name, 0) + 1
        if self._busy < self.count and self._has_thread():
            self._busy += 1
            self._given.put(_Call(work, name))
        else:
            self._waiting.append(_Call(work, name))
        return None

    def _limited(self, area: ServedArea | None) -> str | None:
        """Return the name of an area's object, if calls for it are limited."""
        return None if area is None or area.object is None or self._each is None else area.object.name

    def _has_thread(self) -> bool:
        """Return whether a thread has nothing to do; start another one before there is none."""
        if self._busy == len(self._threads):
            try:
                self._start_thread()
            except RuntimeError:
                _log.warning(
                    "device %s: %d of its %d workers could be started: %s",
                    self._state.name, len(self._threads), self.count, limit_messages.no_process(),
                )  # fmt: skip
                self.count = len(self._threads)
                return False
        return True

    def collect(self) -> None:
        """Continue with finished work in the loop."""
        self._heartbeat[RESULTS] = 0  # first: a result that comes from now on is collected below, or announced again
        while self._finished:
            call, then = self._finished.popleft()
            if call.name is not None:
                self._admit_next(call.name)
            if self._waiting:
                self._given.put(self._waiting.popleft())
            else:
                self._busy -= 1
            then()

    def _admit_next(self, name: str) -> None:
        """Admit a call that waited for another one of its object to finish."""
        held = self._held.get(name)
        if held:
            self._waiting.append(_Call(held.popleft(), name))
            if not held:
                del self._held[name]
            return
        self._admitted[name] -= 1
        if not self._admitted[name]:
            del self._admitted[name]

    def stop(self, wait: Callable[[], None]) -> None:
        """Finish calls under way, and start no more fills; ``wait`` returns when one may be finished.

        The warden ends a call that does not return, as at any time.
        """
        for name, held in self._held.items():
            self._waiting.extend(_Call(work, name) for work in held)
            self._admitted[name] += len(held)
        self._held.clear()
        self._each = None
        self._waiting = deque(call for call in self._waiting if not isinstance(call.work, _FillWork))
        while self._busy:
            wait()
            self.collect()
        for _ in self._threads:
            self._given.put(None)

    def _run(self, slot: int) -> None:
        try:
            while (call := self._given.get()) is not None:
                self._finished.append((call, call.work(slot)))
                # Until the loop has it: the warden sees a loop that never takes it, or is stopped.
                self._heartbeat[RESULTS] = time.monotonic_ns()
                self._state.notify()
        except BaseException:  # noqa: BLE001  the process must end
            # The loop and its clients would wait for this thread. The end of the process is what the warden sees.
            try:
                _log.exception("device %s: a worker failed outside of its driver", self._state.name)
            finally:
                os._exit(_SOFTWARE)


class Jobs:
    """Fills under way, and other calls of the driver.

    Attributes:
        threaded: calls run in workers, and the loop does not wait for the driver.
    """

    def __init__(self, state: ServerState, calls: DriverCalls, workers: Workers) -> None:
        self._state = state
        self._calls = calls
        self._workers = workers
        self.threaded = workers.count > 0
        self._starts: list[int] = []
        self._fills: dict[int, Fill] = {}
        self._starved: list[Fill] = []

    def fill_of(self, page: int) -> Fill | None:
        """Return the fill that a FILLING page belongs to; None if the driver brings the page in by itself."""
        index = bisect_right(self._starts, page) - 1
        fill = self._fills[self._starts[index]] if index >= 0 else None
        return fill if fill is not None and page in fill.pages else None

    def start(self, fill: Fill) -> None:
        """Supply pages that are all MISSING. Not under the lock: the driver may be called right here."""
        fill.area.calls += 1
        state = self._state
        with state.lock:
            fill.rounds = state.parked.rounds
            fill.overtaken = state.frames.run_at(fill.pages.start, fill.pages.stop) != (_MISSING, fill.pages.stop)
            fill.overtaken |= bool(state.held.active) and state.held.overlaps(fill.pages)
            if fill.overtaken:  # since the caller looked: DevicePool.supply or shoot_down, in another thread
                self._fault_again(fill)
                fill.finished(fill)
            else:
                state.pool.begin_fill(fill.pages)
        if fill.overtaken:
            self._release(fill.area)
            return
        if not self._workers.count:
            self._calls.fill(fill, 0)
            self._finish(fill, listed=False)
            return
        insort(self._starts, fill.pages.start)
        self._fills[fill.pages.start] = fill
        self._workers.submit(_FillWork(self._run, fill), fill.area)

    def failed(self, fill: Fill, failure: FillFailure | None) -> None:
        """Finish a fill whose page :meth:`DriverCalls.fill_one` could not supply, or not yet; its frame counts already."""
        fill.area.calls += 1
        fill.reserved = True
        fill.failure = failure
        fill.retry = failure is None
        self._finish(fill, listed=False)

    def _run(self, fill: Fill, slot: int) -> Callable[[], None]:
        """Run a fill in a worker; return its continuation in the loop."""
        self._calls.fill(fill, slot)
        return lambda: self._finish(fill, listed=True)

    def _finish(self, fill: Fill, *, listed: bool) -> None:
        if listed and fill.failure is not None and fill.failure.over_capacity:
            # Pages that others are filling can be reclaimed once they are READY: before that it is no error.
            if len(self._fills) > len(self._starved) + 1:
                fill.failure = None
                self._starved.append(fill)
                return
            if fill.changes != self._state.changes:  # it became READY since
                fill.failure = None
                self._workers.submit(_FillWork(self._run, fill), fill.area)
                return
        if listed:
            del self._fills[fill.pages.start]
            del self._starts[bisect_right(self._starts, fill.pages.start) - 1]
        if fill.failure is not None:
            fill.area.counters.errors += 1
        with self._state.lock:
            self._state.pool.finish_fill(fill.pages, fill.done, fill.reserved)
            fill.area.counters.supplied_pages += fill.done - fill.pages.start
            if fill.retry:
                self._park(fill)
            again = fill.finished(fill)
            self._state.changes += 1
        if again is not None:
            self.start(again)
        starved, self._starved = self._starved, []
        for other in starved:
            self._workers.submit(_FillWork(self._run, other), other.area)
        self._release(fill.area)

    def _park(self, fill: Fill) -> None:
        """Have faults on pages that the driver could not supply yet wait until it can."""
        if fill.rounds != self._state.parked.rounds:  # it may be able to by now
            self._fault_again(fill)
            return
        waiting, fill.waiting = fill.waiting, []
        for area, page, write, read_ns in waiting:
            if page < fill.done:
                fill.waiting.append((area, page, write, read_ns))
            else:
                self._state.parked.park(area, page, write, read_ns)

    def _fault_again(self, fill: Fill) -> None:
        for area, page, _, _ in fill.waiting:
            if area.alive:
                fault_resolution.wake(area.fd, area.address(page), self._state.page_size)
        fill.waiting = []

    def call(self, area: ServedArea, name: str, *arguments: object, then: Callable[[FillFailure | None], None]) -> None:
        """Call another method of the driver with an area, and ``then`` in the loop with its failure."""
        area.calls += 1

        def work(slot: int) -> Callable[[], None]:
            failure = self._calls.call(slot, name, area, *arguments)

            def finish() -> None:
                then(failure)
                self._release(area)

            return finish

        self._workers.submit(work, area)

    def _release(self, area: ServedArea) -> None:
        area.calls -= 1
        if not area.calls and not area.alive:
            self.close(area)

    def close(self, area: ServedArea) -> None:
        """Close a released area at the driver, if it was opened there and no call of the driver has it."""
        if area.opened and not area.calls:
            area.opened = False
            self._state.release_object(area)  # first: the driver may delete the object when it closes the last area
            self.call(area, "close", then=lambda _: self.release_client(area.client))

    # --- clients

    def control(self, client: ServedClient, request: bytes, then: Callable[[bytes | FillFailure], None]) -> None:
        """Hand the driver a control request, and call ``then`` in the loop with the reply or the failure."""
        self.acquire_client(client)
        client.controls += 1

        def work(slot: int) -> Callable[[], None]:
            answer = self._calls.control(slot, client.process, request)

            def finish() -> None:
                client.controls -= 1
                then(answer)
                self.release_client(client)

            return finish

        self._workers.submit(work)

    def acquire_client(self, client: ServedClient) -> None:
        """Count a reference to a client: the driver is about to get an area or a request of it."""
        client.references += 1

    def release_client(self, client: ServedClient) -> None:
        """Drop a reference to a client. After the last one of a client that was removed, tell the driver of its end."""
        client.references -= 1
        self._disconnect(client)

    def remove_client(self, client: ServedClient) -> None:
        """Have the driver told that a client is gone, once all its areas are closed and its requests answered."""
        client.removed = True
        self._disconnect(client)

    def _disconnect(self, client: ServedClient) -> None:
        if not client.removed or client.references:
            return

        def work(slot: int) -> Callable[[], None]:
            self._calls.call(slot, "disconnect", client.process)  # a failure is logged
            return _nothing

        self._workers.submit(work)


def _nothing() -> None:
    """Continue with nothing after a call."""

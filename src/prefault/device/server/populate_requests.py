"""Populate requests: READY pages are mapped in large pieces, MISSING ones are supplied batch by batch."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefault.device import protocol
from prefault.device.page_runs import append_run, subtract
from prefault.device.page_states import DevicePageState
from prefault.device.pages.fills import Fill, FillFailure
from prefault.device.pages.frame_headroom import FrameHeadroom, FrameShortfall
from prefault.intervals import Intervals

if TYPE_CHECKING:
    from prefault.device.pages.page_tables import PageTables
    from prefault.device.pages.served_areas import ServedArea, ServedClient, ServerState
    from prefault.device.server.discards import Discards
    from prefault.device.server.workers import Jobs, Workers
    from prefault.device.server.write_requests import WriteRequests

PIECE = 4096
"""Entries that one UFFDIO_CONTINUE makes: about a millisecond, after which faults and Cancel are handled."""
_PAGES_ONE_BY_ONE = 64
_MAX_RETRIES = 100
_PROGRESS_NS = 50_000_000


class _PopulateRequest:
    """A populate request under way.

    Attributes:
        runs: pages that are left to be examined.
        keep: pages of the whole call.
        deferred: runs that are filled, evicted or discarded on behalf of others at the moment.
        deferred_at: ``ServerState.changes`` when that was seen.
        parked: runs that the driver could not supply yet.
        parked_at: ``ParkedFaults.rounds`` before it was asked.
        parked_ns: when it was asked last.
        mapped, supplied: runs that this request mapped, and had supplied.
        filling: batches that the driver has.
        failed: why it is to end.
    """

    def __init__(self, area: ServedArea, request: protocol.Populate, runs: list[range]) -> None:
        self.area = area
        self.request = request
        self.all = runs
        self.keep = [range(*run) for run in Intervals([*request.runs, *request.beside])]
        self.runs = deque(runs)
        self.deferred: list[range] = []
        self.deferred_at = -1
        self.parked: list[range] = []
        self.parked_at = -1
        self.parked_ns = 0
        self.mapped: list[range] = []
        self.supplied: list[range] = []
        self.poisoned: list[range] = []
        self.mapped_pages = self.done_pages = self.retried_pages = 0
        self.filling = self.most_filling = 0
        self.failed: FillFailure | FrameShortfall | tuple[str, int, str] | None = None
        self.reported_ns = 0
        self.over = False


class PopulateRequests:
    """All populate requests under way, served in turn.

    Args:
        page_by_page: the driver has no ``populate`` of its own.
        reply: sends a reply to a client.
    """

    def __init__(
        self, state: ServerState, page_tables: PageTables, jobs: Jobs, discards: Discards, workers: Workers, *,
        write_requests: WriteRequests, page_by_page: bool, reply: Callable[[ServedClient, protocol.Reply], None],
    ) -> None:  # fmt: skip
        self._state = state
        self._frames = state.frames
        self._page_tables = page_tables
        self._jobs = jobs
        self._discards = discards
        self._workers = workers
        self._write_requests = write_requests
        self._headroom = FrameHeadroom(state)
        self._active: deque[_PopulateRequest] = deque()
        self._piece_pages = max(1, PIECE * state.unit // state.page_size)
        self._batch_pages = max(1, state.device.batch // state.page_size)
        if page_by_page:  # a larger batch saves no call, and faults wait for it
            self._batch_pages = min(self._batch_pages, _PAGES_ONE_BY_ONE)
        if state.pool.capacity is not None:
            self._batch_pages = max(1, min(self._batch_pages, state.pool.capacity))
        self._reply = reply

    def __len__(self) -> int:
        return len(self._active)

    # --- requests

    def start(self, area: ServedArea, request: protocol.Populate) -> None:
        """Begin a request, or refuse it by its first reply. ValueError: it makes no sense."""
        runs = self._checked(area, request)
        for first, stop in request.beside:
            area.checked(first, stop)
        populate = _PopulateRequest(area, request, runs)
        populate.failed = self._refusal(populate)
        self._active.append(populate)

    def cancel(self, client: ServedClient, number: int) -> None:
        """End the client's request with that id, if it is under way."""
        for populate in self._active:
            if populate.area.client is client and populate.request.id == number and populate.failed is None:
                populate.failed = ("cancelled", errno.ECANCELED, "cancelled")

    def drop(self, area: ServedArea) -> None:
        """End the requests of a released area; pages that it may have written are exempt from the rollback of others."""
        for populate in self._active:
            if populate.area is area and populate.failed is None:
                populate.failed = ("gone", errno.ENODEV, "the area was unmapped while it was populated")
            if populate.area.client is not area.client and area.access == "write":  # rollback must not drop its writes
                populate.supplied = [part for run in populate.supplied for part in subtract(run, [area.pages])]

    def undo(self, area: ServedArea, runs: list[range]) -> None:
        """Discard pages that were supplied for a finished request, as a rollback does."""
        with self._state.lock:
            for run in runs:
                self._discard_unshared(area.client, run)

    def count(self, client: ServedClient) -> int:
        """Return the number of requests of a client under way."""
        return sum(populate.area.client is client for populate in self._active)

    def _checked(self, area: ServedArea, request: protocol.Populate) -> list[range]:
        if request.access == "write" and area.access == "read":
            raise ValueError("the area is mapped for reading: its pages cannot be populated for writing")
        for first, stop in request.runs:
            if not area.checked(first, stop):
                raise ValueError(f"there are no pages from {first} to {stop}")
        return [range(*run) for run in Intervals(request.runs)]

    def _refusal(self, populate: _PopulateRequest) -> FillFailure | FrameShortfall | tuple[str, int, str] | None:
        state = self._state
        if not state.device.populates:
            return ("no populate", errno.EOPNOTSUPP, f"device {state.name} declares population as meaningless")
        pages = sum(map(len, populate.keep))
        if state.pool.capacity is not None and pages > state.pool.capacity:
            return (
                "full", errno.ENOSPC,
                f"{pages} pages were asked for, and the device's capacity is {state.pool.capacity}: populate less at once",
            )  # fmt: skip
        if not populate.request.check_headroom:
            return None
        missing = sum(self._frames.count(run, DevicePageState.MISSING) for run in populate.all)
        return self._headroom.short_of(state.pool.new_frames(missing), whole=True)

    # --- work

    def step(self) -> bool:
        """Do one piece of one request; return whether there is more to do at once."""
        for _ in range(len(self._active)):
            populate = self._active[0]
            self._active.rotate(-1)
            worked = self._step(populate)
            if populate.over:
                self._active.remove(populate)
            if worked:
                return True
        return False

    def _step(self, populate: _PopulateRequest) -> bool:
        if populate.failed is not None:
            cancelled = isinstance(populate.failed, tuple) and populate.failed[0] in ("cancelled", "gone")
            if cancelled or not populate.filling:
                self._fail(populate)
            return False
        if not populate.runs and populate.deferred and populate.deferred_at != self._state.changes:
            populate.runs, populate.deferred = deque(populate.deferred), []
        if not populate.runs and populate.parked and populate.parked_at != self._state.parked.rounds:
            populate.runs, populate.parked = deque(populate.parked), []
        if not populate.runs:
            if populate.parked and self._parked_until(populate) <= time.monotonic():
                populate.failed = self._timed_out(populate.parked[0].start)
                return True
            if not populate.deferred and not populate.filling and not populate.parked:
                self._succeed(populate)
            return False
        run = populate.runs[0]
        with self._state.lock:
            changes = self._state.changes
            state, stop = self._frames.run_at(run.start, min(run.stop, run.start + self._piece_pages))
            if state == DevicePageState.READY:
                ready = self._not_read_only(populate, range(run.start, stop))
                if len(ready):
                    self._advance(populate, ready.stop)
                    self._map(populate, ready)
                    return True
        if state == DevicePageState.READY:
            self._advance(populate, run.start + 1)
            populate.filling += 1
            self._write_requests.ask_first(
                populate.area, run.start, lambda failure: self._allowed(populate, run.start, failure)
            )
            return True
        discarded, piece = self._discards.split_at(run.start, range(run.start, stop))
        with self._state.lock:
            held, piece = self._state.held.split_at(run.start, piece)
        stop = piece.stop
        if state != DevicePageState.MISSING or discarded or held:
            self._advance(populate, stop)
            populate.deferred.append(range(run.start, stop))
            populate.deferred_at = changes
            return True
        if self._workers.count and self._workers.idle_for(populate.area) <= 0:
            return False
        stop = min(stop, run.start + self._batch_pages)
        pages = range(run.start, stop)
        if populate.request.check_headroom:
            populate.failed = self._headroom.short_of(self._state.pool.new_frames(len(pages)), page=run.start)
            if populate.failed is not None:
                return True
        self._advance(populate, stop)
        populate.filling += 1
        populate.most_filling = max(populate.most_filling, populate.filling)
        populate.area.counters.log_run(pages.start, pages.stop)
        self._jobs.start(
            Fill(
                populate.area, pages, populate.request.access, single=False, keep=populate.keep,
                finished=lambda fill: self._filled(populate, fill),
            )
        )  # fmt: skip
        return True

    def _not_read_only(self, populate: _PopulateRequest, pages: range) -> range:
        """Return the first of these pages, as far as the populate need not ask the driver whether they may be written."""
        protections = self._state.protections
        if populate.request.access == "read" or not protections.in_use or not self._state.device.evicts:
            return pages
        runs = protections.not_read_only_runs(pages)
        return runs[0] if runs and runs[0].start == pages.start else range(pages.start, pages.start)

    def _allowed(self, populate: _PopulateRequest, page: int, failure: FillFailure | None) -> None:
        """Take the driver's answer whether a page may be written."""
        populate.filling -= 1
        if failure is None:
            populate.runs.appendleft(range(page, page + 1))
        elif populate.failed is None:
            populate.failed = failure._replace(page=page)

    def wait_until(self) -> float | None:
        """Return when the first request fails whose driver cannot supply pages yet (CLOCK_MONOTONIC); None without one."""
        return min((self._parked_until(populate) for populate in self._active if populate.parked), default=None)

    def _parked_until(self, populate: _PopulateRequest) -> float:
        return populate.parked_ns / 1e9 + self._state.device.timeout_s

    def _timed_out(self, page: int) -> FillFailure:
        limit = self._state.device.timeout_s
        return FillFailure(
            "driver",
            errno.ETIMEDOUT,
            f"page {page} was not supplied in {limit:g} s after the driver answered RETRY",
            page,
        )

    def _advance(self, populate: _PopulateRequest, stop: int) -> None:
        run = populate.runs[0]
        if stop < run.stop:
            populate.runs[0] = range(stop, run.stop)
        else:
            populate.runs.popleft()

    def _filled(self, populate: _PopulateRequest, fill: Fill) -> Fill | None:
        """Take a finished batch, under the lock."""
        populate.filling -= 1
        ready, left = range(fill.pages.start, fill.done), range(fill.done, fill.pages.stop)
        cancelled = populate.over
        if fill.overtaken:
            populate.runs.appendleft(left)
            return None
        if fill.retry:
            # The oldest round counts: one that came after it may have been for a batch that was parked before this one.
            populate.parked_at = min(populate.parked_at, fill.rounds) if populate.parked else fill.rounds
            populate.parked.append(left)
            populate.parked_ns = time.monotonic_ns()
        if len(ready):
            append_run(populate.supplied, ready)
            if not cancelled and populate.area.alive:
                if ready == self._not_read_only(populate, ready):
                    self._map(populate, ready)
                else:
                    populate.runs.appendleft(ready)  # READY by the next step
        self._answer_waiting(fill, mapped=not cancelled)
        failure, before = fill.failure, populate.failed
        # Several may fail at once, in workers: the first page is reported.
        if failure is not None and (before is None or (isinstance(before, FillFailure) and failure.page < before.page)):
            populate.failed = failure
        if cancelled and populate.request.rollback:
            self._undo(populate, [ready])
        return None

    def _answer_waiting(self, fill: Fill, *, mapped: bool) -> None:
        left = self._page_tables.answer_waiting(fill, mapped)
        if left is not None:  # the thread that touched the page asks for it alone, by a new fault
            area, page, _, _ = left
            self._page_tables.wake(area, page)

    def _map(self, populate: _PopulateRequest, pages: range) -> None:
        area = populate.area
        if not area.alive:
            return
        result = self._page_tables.map(area, pages)
        for span in result.mapped:
            mapped = self._page_tables.pages_of(area, span)
            append_run(populate.mapped, mapped)
            populate.mapped_pages += len(mapped)
        if area.poisoned:
            for span in result.present:
                for page in self._page_tables.pages_of(area, span):
                    if page in area.poisoned:
                        area.poisoned.discard(page)
                        append_run(populate.poisoned, range(page, page + 1))
        if result.holes and not result.unreachable:
            again = self._frames.runs(pages, DevicePageState.MISSING)
            populate.runs.extend(again)
            populate.retried_pages += sum(map(len, again))
            if populate.retried_pages > _MAX_RETRIES + sum(map(len, populate.all)):
                result.unreachable = True  # the client punches them faster than they are supplied
        if result.busy or result.failed or result.unreachable or result.gone:
            self._unmappable(populate, pages, result.failed, busy=result.busy)
        populate.done_pages += len(pages)
        if populate.request.progress:
            now = time.monotonic_ns()
            if now - populate.reported_ns >= _PROGRESS_NS:
                populate.reported_ns = now
                self._reply(populate.area.client, protocol.Progress(populate.request.id, populate.done_pages))

    def _unmappable(self, populate: _PopulateRequest, pages: range, number: int, *, busy: bool) -> None:
        if busy:
            reason, number = "the process keeps changing its mappings (fork, mremap)", errno.EAGAIN
        elif number:
            reason = f"the kernel cannot map them: {errno.errorcode.get(number, number)}"
        else:
            reason, number = "they are not mapped there, or not registered, any more", errno.ENOENT
        if populate.failed is None:
            populate.failed = ("gone", number, f"pages {pages.start} to {pages.stop - 1} were not all mapped: {reason}")

    # --- the end

    def _succeed(self, populate: _PopulateRequest) -> None:
        populate.over = True
        populate.area.counters.populated_pages += populate.mapped_pages
        threads = max(1, populate.most_filling)
        poisoned = tuple((run.start, run.stop) for run in populate.poisoned[: protocol.MAX_RUNS])
        supplied = tuple((run.start, run.stop) for run in populate.supplied[: protocol.MAX_RUNS])
        reply = protocol.Populated(
            populate.request.id, populate.mapped_pages, threads, poisoned, supplied if populate.request.rollback else ()
        )
        self._reply(populate.area.client, reply)

    def _fail(self, populate: _PopulateRequest) -> None:
        populate.over = True
        if populate.request.rollback:
            with self._state.lock:
                self._undo(populate, populate.supplied)
        populate.area.counters.populated_pages += sum(map(len, populate.mapped))
        mapped = tuple((run.start, run.stop) for run in populate.mapped[: protocol.MAX_RUNS])
        number, why = populate.request.id, populate.failed
        page = populate.runs[0].start if populate.runs else populate.all[-1].stop - 1 if populate.all else 0
        match why:
            case FillFailure():
                reply = protocol.Failed(number, why.kind, why.number, why.message, why.page, mapped, "", 0, 0)
            case FrameShortfall():
                reply = protocol.Failed(
                    number, "headroom", errno.ENOMEM, why.message, why.page or page, mapped,
                    why.limit, why.needed_bytes, why.available_bytes,
                )  # fmt: skip
            case (kind, code, message):
                reply = protocol.Failed(number, kind, code, message, page, mapped, "", 0, 0)  # type: ignore[arg-type]
            case _:
                raise AssertionError("the request did not fail")
        self._reply(populate.area.client, reply)

    def _undo(self, populate: _PopulateRequest, supplied: list[range]) -> None:
        """Discard the supplied pages of a request that no other client can have written to; under the lock."""
        for run in supplied:
            for piece in self._discard_unshared(populate.area.client, run):
                populate.mapped = [part for mapped in populate.mapped for part in subtract(mapped, [piece])]

    def _discard_unshared(self, client: ServedClient, run: range) -> list[range]:
        """Discard the pages of a run that no other client can have written to; return them in runs. Under the lock."""
        kept: list[range] = []
        if self._state.device.writable:
            kept = [area.overlap(run) for area, _, _ in self._state.areas_over(run) if area.client is not client]
        pieces = subtract(run, kept)
        for piece in pieces:
            self._state.pool.discard(piece)
        return pieces

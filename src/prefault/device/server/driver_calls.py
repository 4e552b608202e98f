"""Calls into the driver: exceptions become results, the warden sees when each call began, and the capacity is kept."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from prefault._kernel.mman import EHWPOISON
from prefault.device import protocol
from prefault.device.device_pool import Access, ClientProcess
from prefault.device.driver import READ_ONLY, RETRY, ZERO, Device, FaultAnswer
from prefault.device.pages.fills import Fill, FillFailure
from prefault.sizes import format_size

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServedArea, ServerState

_log = logging.getLogger("prefault.device")
_MESSAGE_MOST = 2000
_VALUE_MOST = 100
_RECLAIMS_MOST = 1000
_EVICTING_S = 0.001
_MAX_ERRNO = 4095  # the largest that the kernel returns


class DriverCalls:
    """The driver, as the rest of the server calls it, in any thread. Each thread has a slot of the heartbeat.

    Attributes:
        page_by_page: the driver has no ``populate`` of its own.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._frames = state.frames
        self._pool = state.pool
        self._device = state.device
        self._heartbeat = state.frames.heartbeat
        self._secure_one = state.frames.secure_one
        self._reclaim_lock = threading.Lock()
        self.page_by_page = type(state.device).populate is Device.populate and "populate" not in vars(state.device)

    def fill(self, fill: Fill, slot: int) -> None:
        """Call the driver to supply the pages of a fill. Never raises: the failure is in ``fill``."""
        pages = fill.pages
        heartbeat = self._frames.heartbeat
        heartbeat[slot] = time.monotonic_ns()
        try:
            self._raise_if_poisoned(fill)
            self._reserve(fill, slot)
            try:
                self._frames.secure(pages)
            except OSError as error:
                raise _FillError(FillFailure("full", errno.ENOSPC, str(error.strerror), pages.start)) from None
            heartbeat[slot] = time.monotonic_ns()
            if fill.single or self.page_by_page:
                fault, area, access = self._device.fault, fill.area, fill.access
                for page in pages:
                    answer = fault(area, page, access)
                    if answer is not None and answer is not ZERO and not self._apply(answer, range(page, page + 1), "fault"):
                        fill.retry = True
                        break
                    fill.done = page + 1
                    if fill.done < pages.stop:
                        heartbeat[slot] = time.monotonic_ns()
            else:
                done: Any = self._device.populate(fill.area, pages, fill.access)
                if done is None or done is ZERO or self._apply(done, pages, "populate"):
                    fill.done = pages.stop
                else:
                    fill.retry = True
        except _FillError as error:
            fill.failure = error.failure
        except BaseException as error:  # noqa: BLE001  a driver's SystemExit is its own affair as well
            name = "fault" if fill.single or self.page_by_page else "populate"
            fill.failure = self._driver_failure(
                name, error, range(fill.done, fill.done + 1 if name == "fault" else pages.stop), fill.area
            )
        finally:
            heartbeat[slot] = 0
        if fill.done == self._frames.pages:
            self._frames.clear_tail(range(pages.start, fill.done))

    def _apply(self, answer: object, pages: range, name: str) -> bool:
        """Carry out an answer of the driver that asks for more than plain pages; return False for RETRY."""
        if answer is RETRY:
            return False
        if answer is not READ_ONLY:
            raise TypeError(f"{name}() returns None, ZERO, READ_ONLY or RETRY of prefault.device, not {_describe(answer)}")
        if self._device.writable and not self._device.evicts:
            raise RuntimeError(f"{self._state.name} supplies read-only pages: it has to declare evicts = True")
        with self._state.lock:
            self._state.protections.set(pages, "read")
        return True

    def fill_one(
        self, area: ServedArea, page: int, access: Access, now: int
    ) -> FillFailure | Literal[FaultAnswer.RETRY] | None:
        """Call the driver in the loop to supply one FILLING page of a device without a capacity; return its failure, if any.

        The caller counts the frame.
        """
        heartbeat = self._heartbeat
        heartbeat[0] = now
        try:
            try:
                self._secure_one(page)
            except OSError as error:
                return FillFailure("full", errno.ENOSPC, str(error.strerror), page)
            answer = self._device.fault(area, page, access)
            if answer is not None and answer is not ZERO and not self._apply(answer, range(page, page + 1), "fault"):
                return RETRY
        except BaseException as error:  # noqa: BLE001  drivers may raise anything
            return self._driver_failure("fault", error, range(page, page + 1), area)
        finally:
            heartbeat[0] = 0
        return None

    def call(self, slot: int, name: str, *arguments: object) -> FillFailure | None:
        """Call another method of the driver; return its failure, if any."""
        self._frames.heartbeat[slot] = time.monotonic_ns()
        try:
            getattr(self._device, name)(*arguments)
        except BaseException as error:  # noqa: BLE001  drivers may raise anything
            return self._driver_failure(name, error, None)
        finally:
            self._frames.heartbeat[slot] = 0
        return None

    def control(self, slot: int, client: ClientProcess, request: bytes) -> bytes | FillFailure:
        """Hand the driver a control request; return its reply, or the failure."""
        self._frames.heartbeat[slot] = time.monotonic_ns()
        try:
            reply: Any = self._device.control(client, request)
            if not isinstance(reply, bytes):
                raise TypeError(f"control() returns bytes, not {_describe(reply)}")
        except OSError as error:
            number = _number_of(error)
            if number != error.errno:
                return self._driver_failure("control", error, None)
            # A refusal, which is part of any conversation: the client gets it as the driver worded it, and the log nothing.
            where = "" if error.filename is None else f": {_describe(error.filename)}"
            return FillFailure("driver", number, f"{_describe(error.strerror, str)}{where}")
        except BaseException as error:  # noqa: BLE001  drivers may raise anything
            return self._driver_failure("control", error, None)
        finally:
            self._frames.heartbeat[slot] = 0
        if len(reply) > protocol.MAX_CONTROL:
            message = (
                f"the driver's reply has {len(reply)} bytes, and a reply to a control request at most {protocol.MAX_CONTROL}"
            )
            return FillFailure("driver", errno.EMSGSIZE, message)
        return reply

    def _driver_failure(
        self, name: str, error: BaseException, pages: range | None, area: ServedArea | None = None
    ) -> FillFailure:
        text = _describe(error, str)
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        where = "" if pages is None or area is None else f" ({area.describe(pages)})"
        message = f"the driver raised in {name}(){where}: {reason}"[:_MESSAGE_MOST] + _raising_line(error)
        _log.error("device %s: %s", self._state.name, message)
        return FillFailure("driver", _number_of(error), message, pages[0] if pages else 0)

    # --- checks before a call

    def _raise_if_poisoned(self, fill: Fill) -> None:
        """Raise _FillError if the driver poisoned one of the pages, or a server died of it."""
        if self._state.protections.in_use:
            with self._state.lock:
                poisoned = self._state.protections.poisoned(fill.pages)
            if poisoned is not None:
                page, reason = poisoned
                raise _FillError(FillFailure("driver", EHWPOISON, f"page {page} is poisoned: {reason}", page))
        blamed = self._state.registry.blamed
        if not blamed:
            return
        with self._state.lock:
            found = [page for page in blamed if page in fill.pages]
            if not found:
                return
            message = blamed[found[0]]
            # A window has pages that were not asked for: the one that was touched is asked for alone next, which counts.
            if not fill.around:
                for page in found:
                    del blamed[page]
            raise _FillError(FillFailure("driver", errno.EIO, message, found[0]))

    def _reserve(self, fill: Fill, slot: int) -> None:
        """Reserve frames: they count against the capacity from now on.

        Raises:
            _FillError: the capacity is exhausted.
            BaseException: raised by the driver's ``reclaim``.
        """
        pool, state = self._pool, self._state
        if pool.capacity is None:
            self._take_room(fill)
            return
        # One at a time: another thread must not take the room that was made for this one. Waiting is not a call's time.
        self._heartbeat[slot] = 0
        with self._reclaim_lock:
            if self._take_room(fill):
                return
            for _ in range(_RECLAIMS_MOST):
                fill.changes = changes = state.changes
                self._heartbeat[slot] = time.monotonic_ns()
                state.reclaiming_for = fill.keep
                try:
                    self._device.reclaim(fill.area, len(fill.pages))
                finally:
                    state.reclaiming_for = []
                self._heartbeat[slot] = 0
                if self._take_room(fill):
                    return
                # Pages that another thread of the driver is evicting did not help reclaim, and make room in a moment.
                if pool.evicting:
                    time.sleep(_EVICTING_S)
                elif state.changes == changes:
                    break
        message = (
            f"the device's capacity of {pool.capacity} pages has no room for {len(fill.pages)} more: {pool.used} are taken,"
            f" of {format_size(self._device.page_size)} each"
        )
        if type(self._device).reclaim is Device.reclaim:
            message += "; discard some, or give the device a larger capacity"
        else:
            message += ", and reclaim() made no room"
        raise _FillError(FillFailure("full", errno.ENOSPC, message, fill.pages.start, over_capacity=True))

    def _take_room(self, fill: Fill) -> bool:
        with self._state.lock:
            fill.reserved = self._pool.reserve(len(fill.pages), fill.keep)
        return fill.reserved


class _FillError(Exception):
    """A fill that fails before its driver is called."""

    def __init__(self, failure: FillFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _number_of(error: BaseException) -> int:
    """Return the errno of what a driver raised: its own, if it has one, else EIO."""
    number: Any = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) and 0 < number <= _MAX_ERRNO else errno.EIO


def _raising_line(error: BaseException) -> str:
    """Name the driver's line that raised, for its author; an empty string if the call itself failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if len(frames) < 2:
        return ""
    frame, line = frames[-1]
    return f" ({os.path.basename(frame.f_code.co_filename)}, line {line})"


def _describe(value: object, show: Callable[[object], str] = repr) -> str:
    try:
        text = show(value)
    except BaseException:  # noqa: BLE001  it is a driver's, and may call exit as well
        text = f"a {type(value).__name__} that cannot be shown"
    most = _VALUE_MOST if show is repr else _MESSAGE_MOST
    return text if len(text) < most else f"{text[:most]}..."

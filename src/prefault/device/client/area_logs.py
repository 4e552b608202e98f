"""Access logs of the areas of this process, kept when an area ends, and replayed when one is mapped: for recordings.

A parent that runs a program sets environment variables for it, see ``docs/design/recordings.md``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from typing import Protocol

from prefault.device.access_log import AccessLog, Content
from prefault.engine.outcomes import PopulateResult

SAVE = "PREFAULT_SAVE_ACCESS_LOGS"
"""Environment variable: a directory in which each area saves its access log when it ends."""
REPLAY = "PREFAULT_REPLAY_ACCESS_LOGS"
"""Environment variable: a directory with access logs; an area of the same content replays its own when it is mapped."""


class Logged(Protocol):
    """Memory of a device, with the log of what was touched of it."""

    def access_log(self) -> AccessLog:
        """Return what was touched."""
        ...


class LoggedArea(Logged, Protocol):
    """The part of :class:`prefault.device.Area` that recordings need."""

    content: Content

    @property
    def closed(self) -> bool:
        """True after the area was closed."""
        ...

    def fits(self, log: AccessLog) -> bool:
        """Tell whether a log is of what the area maps."""
        ...

    def replay(self, log: AccessLog) -> PopulateResult:
        """Populate the pages of a log."""
        ...


_numbers = itertools.count()
_areas: weakref.WeakSet[LoggedArea] = weakref.WeakSet()
_collectors: list[list[AccessLog]] = []


def add(area: LoggedArea, content: Content) -> None:
    """Add an area that was just mapped, and replay the log of its last use, if there is one in the directory of REPLAY."""
    area.content = content
    _areas.add(area)
    directory = os.environ.get(REPLAY)
    if directory is None:
        return
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
        with contextlib.suppress(OSError, ValueError):  # a page that cannot be had raises when it is touched
            log = AccessLog.load(os.path.join(directory, name))
            if area.fits(log):
                area.replay(log)


def ending(memory: Logged) -> None:
    """Keep the log of an area that ends, if it is being recorded: the server is about to forget it."""
    directory = os.environ.get(SAVE)
    if directory is None and not _collectors:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the server is gone: there is no log
        log = memory.access_log()
        for collector in _collectors:
            collector.append(log)
        if directory is not None:
            log.save(os.path.join(directory, f"{os.getpid()}-{next(_numbers)}.log"))


def areas() -> list[LoggedArea]:
    """Return the areas of this process that are open."""
    return [area for area in _areas if not area.closed]


def start_collecting() -> list[AccessLog]:
    """Return a list to which the logs of areas are appended when they end, until :func:`stop_collecting`."""
    collector: list[AccessLog] = []
    _collectors.append(collector)
    return collector


def stop_collecting(collector: list[AccessLog]) -> None:
    """Stop to append to a list."""
    _collectors[:] = [each for each in _collectors if each is not collector]

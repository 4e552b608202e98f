"""Device memory in recordings: access logs of a command's areas, and areas that populate what was recorded."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prefault.recordings.recording_file import RecordedArea, Recording, plain

if TYPE_CHECKING:
    from prefault.device.access_log import AccessLog
    from prefault.device.client.area_logs import LoggedArea


def recorded_areas(logs: Iterable[AccessLog]) -> list[RecordedArea]:
    """Return logs as a recording has them: one for each content, in the order of the first touch."""
    runs: dict[tuple[str, str, int, str], dict[tuple[int, int], None]] = {}
    for log in logs:
        key = (plain(log.device), plain(log.content.source), log.length, plain(log.content.version))
        runs.setdefault(key, {}).update(dict.fromkeys((run.offset, run.length) for run in log.runs))
    return [RecordedArea(*key, [number for run in found for number in run]) for key, found in sorted(runs.items()) if found]


def log_of(area: RecordedArea) -> AccessLog:
    """Return a recorded area as an access log."""
    from prefault.device.access_log import AccessLog, Content, LoggedRun

    runs = tuple(map(LoggedRun, area.runs[::2], area.runs[1::2]))
    return AccessLog(area.device, area.length, runs, Content(area.source, area.version))


class CommandLogs:
    """Access logs of the areas of a command and its children, in a directory; a context manager that removes it.

    Attributes:
        environment: environment for the command.
    """

    def __init__(self) -> None:
        from prefault.device.client import area_logs

        self._directory = tempfile.TemporaryDirectory(prefix="prefault-logs-")
        self.environment = {**os.environ, area_logs.SAVE: self._directory.name}

    def areas(self) -> list[RecordedArea]:
        """Return what the command touched; logs of processes that were killed are missing or cut off."""
        from prefault.device.access_log import AccessLog

        found = []
        for name in sorted(os.listdir(self._directory.name)):
            with contextlib.suppress(ValueError, OSError):
                found.append(AccessLog.load(os.path.join(self._directory.name, name)))
        return recorded_areas(found)

    def __enter__(self) -> CommandLogs:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()


@contextlib.contextmanager
def replaying_environment(recording: Recording) -> Iterator[dict[str, str]]:
    """Yield an environment for a command whose areas populate what was recorded when they are mapped."""
    from prefault.device.client import area_logs

    with tempfile.TemporaryDirectory(prefix="prefault-logs-") as directory:
        for number, area in enumerate(recording.areas):
            log_of(area).save(os.path.join(directory, f"{number}.log"))
        yield {**os.environ, area_logs.REPLAY: directory}


def replay_areas(recording: Recording, areas: Iterable[LoggedArea]) -> tuple[int, list[str]]:
    """Populate what was recorded of areas; where a server on this machine serves the device, its frames.

    Returns:
        The bytes that were populated or present, and the names of recorded areas that nothing here fits.
    """
    done, skipped = 0, []
    here = list(areas)
    for recorded in recording.areas:
        log = log_of(recorded)
        fitting = [area for area in here if area.fits(log)]
        for area in fitting:
            result = area.replay(log)
            done += result.bytes + result.present_bytes
        if not fitting:
            count = _replay_at_server(recorded, log)
            if count is None:
                skipped.append(recorded.source or recorded.device)
            else:
                done += count
    return done, skipped


def _replay_at_server(recorded: RecordedArea, log: AccessLog) -> int | None:
    """Have the server of a device at a socket supply the recorded pages; None where there is none."""
    try:
        if not recorded.source.startswith("/") or not stat.S_ISSOCK(os.stat(recorded.source).st_mode):
            return None
        from prefault.device.opening import connect

        with connect(recorded.source) as client, client.map(access="read") as area:
            if not area.fits(log):
                return None
            result = area.replay(log)
            return result.bytes + result.present_bytes
    except (OSError, ValueError):  # no server, one of another user, or a device that cannot supply the pages
        return None

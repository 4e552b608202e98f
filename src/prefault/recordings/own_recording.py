"""Recording of a part of this program: ``with prefault.recording("start.rec"):``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from prefault.recordings.recorder import Recorder, WayChoice
from prefault.recordings.recording_file import Recording


class recording:  # noqa: N801  used as a function
    """Context manager that records which pages of files and of device memory this process touches in its block.

    Threads and child processes that the block starts are part of it.

    Args:
        path: file that gets the recording at the end of the block; None: no file.
        way: ``"trace"``: by the kernel's tracepoints (root); ``"residency"``: by the page cache before and after;
            ``"auto"``: the first where the kernel allows it.
        files: by residency: files and directories whose cached pages are compared before and after.
        evict: evict ``files`` from the page cache first.
        roots: directories by name; files below one are kept by that name and the path below it.

    Attributes:
        result: the recording; None before the end of the block.

    Raises:
        OSError: the kernel does not let this process trace (``way="trace"``), or the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, way: WayChoice = "auto",
        files: Iterable[str | os.PathLike[str]] = (), evict: bool = False,
        roots: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:  # fmt: skip
        self._path = path
        self._way: WayChoice = way
        self._files = list(files)
        self._evict = evict
        self._roots = roots
        self._recorder: Recorder | None = None
        self.result: Recording | None = None

    def __enter__(self) -> recording:
        from prefault.device.client import area_logs

        tids = [int(name) for name in os.listdir("/proc/self/task")]
        self._recorder = Recorder(tids, way=self._way, files=self._files, evict=self._evict, roots=self._roots, is_own=True)
        self._logs = area_logs.start_collecting()
        # Pages that areas had been asked for before the block began.
        self._before = {id(area): set(area.access_log().runs) for area in area_logs.areas()}
        return self

    def __exit__(self, *_: object) -> None:
        from prefault.device.access_log import AccessLog
        from prefault.device.client import area_logs
        from prefault.recordings.area_replay import recorded_areas

        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        area_logs.stop_collecting(self._logs)
        logs = list(self._logs)
        for area in area_logs.areas():
            log = area.access_log()
            before = self._before.get(id(area), set())
            logs.append(AccessLog(log.device, log.length, tuple(run for run in log.runs if run not in before), log.content))
        recorder.look_at([os.getpid()])
        self.result = recorder.finish([], recorded_areas(logs))
        if self._path is not None:
            self.result.save(self._path)

"""Small files, several at one time: of each, opening and the first answer take longer than its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

from prefault.files.failures import FileFailure
from prefault.files.file_plan import FilePlan
from prefault.files.open_file import OpenFile
from prefault.files.step_workers import ReadStep, StepFailure
from prefault.files.warm_methods import PieceReader, WarmMethod
from prefault.files.warm_result import FileState, Tally
from prefault.sizes import PAGE_SIZE

_METHOD = WarmMethod("readahead", 1)


class SmallFiles:
    """Batch of small files, each of which is one step of the workers.

    Args:
        missing_only: False: read what is cached as well.

    Attributes:
        bytes: sizes of the files in all, as they were listed.
        grown: files that have more pages now than when they were listed. They are left alone: one may be of any size by now.
    """

    def __init__(self, *, missing_only: bool) -> None:
        self._missing_only = missing_only
        self._paths: dict[int, str] = {}
        self._tally = Tally()
        self._lock = threading.Lock()
        self.bytes = 0
        self.grown: list[str] = []

    def add(self, path: str, size: int) -> None:
        """Add a file of ``size`` bytes."""
        self._paths[self.bytes] = path
        self.bytes += size

    def steps(self) -> Iterator[ReadStep]:
        """Yield a step for each file; its start stands for the file."""
        starts = [*self._paths, self.bytes]
        return (ReadStep(start, stop) for start, stop in pairwise(starts))

    def reader(self) -> _SmallFileReader:
        """Return the means of one thread."""
        return _SmallFileReader(self._paths, self._add, self.grown, missing_only=self._missing_only)

    def _add(self, tally: Tally) -> None:
        with self._lock:
            self._tally.add(tally)

    def tally(self) -> Tally:
        """Return the sums over the files that are done."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
        return tally


class _SmallFileReader:
    def __init__(
        self, paths: dict[int, str], add: Callable[[Tally], None], grown: list[str], *, missing_only: bool
    ) -> None:  # fmt: skip
        self._paths = paths
        self._add = add
        self._grown = grown
        self._missing_only = missing_only

    def bring_in(self, start: int, stop: int, *, exact: bool) -> int:  # noqa: ARG002  always exact
        """Warm one file, whatever becomes of it."""
        tally = Tally()
        path = self._paths[start]
        try:
            with OpenFile(path) as file:
                if file.size > stop - start + -(stop - start) % PAGE_SIZE:
                    self._grown.append(path)
                    return stop
                self._warm(file, tally)
        except OSError as error:
            tally.failures.append(FileFailure.of(path, error))
        self._add(tally)
        return stop

    def _warm(self, file: OpenFile, tally: Tally) -> None:
        plan = FilePlan.of(file, None, missing_only=self._missing_only)
        tally.begin(file, plan)
        if not plan.missing:
            return
        state = FileState(file)
        reader = PieceReader(file, "readahead")
        try:
            for pages in plan.missing:
                stop = min(pages.stop, file.size)
                try:
                    reached = reader.bring_in(pages.start, stop, exact=True)
                except OSError as error:
                    state.failures.append(StepFailure(ReadStep(pages.start, stop), error))
                    continue
                state.read_bytes += max(0, reached - pages.start)
                if reached < stop:
                    state.end = reached
                    break
        finally:
            reader.close()
        tally.count(_METHOD, state.read_bytes)
        tally.check(state, plan.fresh, is_known=plan.is_known)
        tally.note(state)

    def close(self) -> None:
        """Do nothing: no descriptor is kept between two files."""

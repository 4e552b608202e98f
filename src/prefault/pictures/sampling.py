"""Frames of a heat map: rows of files or of a process, taken again and again, with the rate of change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import NamedTuple

from prefault.files.failures import FileFailure
from prefault.files.file_status import FilesStatus
from prefault.files.file_status import status as status_of_files
from prefault.files.formats.tensor_ranges import tensor_ranges
from prefault.pictures.heat_rows import HeatRow, by_missing, row_of_file, rows_of_process, rows_of_tensors
from prefault.processes import status as status_of_process
from prefault.processes.other_process import OtherProcess

_MODELS = (".safetensors", ".gguf", ".npy")

MOST_FILES_BY_PAGE = 1000
"""Files up to which each page is looked at; of more only counts are asked for."""


class Frame(NamedTuple):
    """Rows at one moment.

    Attributes:
        seconds: time since the first frame.
        rows: by missing bytes, the most first.
        rates: bytes a second that came in (negative: went) since the frame before, by the key of the row; empty in the
            first.
        rate: of all rows together; None in the first frame.
    """

    seconds: float
    rows: list[HeatRow]
    rates: dict[tuple[str, str, str, int], float]
    rate: float | None

    @property
    def size_bytes(self) -> int:
        """Sum of the rows that are known."""
        return sum(row.size_bytes for row in self.rows if row.present_bytes is not None)

    @property
    def present_bytes(self) -> int:
        """Sum of the rows that are known."""
        return sum(row.present_bytes or 0 for row in self.rows)

    @property
    def unknown(self) -> int:
        """Number of rows that are not known."""
        return sum(row.present_bytes is None for row in self.rows)


def rows_of_files(paths: Iterable[str | os.PathLike[str]]) -> list[HeatRow]:
    """Take the rows of files and trees as they are now. A file that cannot be looked at is a row that is not known."""
    found = _status(list(paths))
    return [*map(row_of_file, found.files), *map(_row_of_failure, found.failures)]


def rows_of_models(paths: Iterable[str | os.PathLike[str]]) -> list[HeatRow]:
    """Take the rows of files as :func:`rows_of_files`, and a row for each tensor of model files among them.

    Headers are read after residency was looked at, and are cached from then on. A model file whose header cannot be read has
    a row that says so instead of its tensors. Of more than :data:`MOST_FILES_BY_PAGE` model files the largest have tensors.
    """
    found = _status(list(paths))
    files = found.files
    models = [file for file in files if file.path.endswith(_MODELS)]
    if len(files) > MOST_FILES_BY_PAGE and models:
        models = sorted(models, key=lambda file: -file.size)[:MOST_FILES_BY_PAGE]
        looked = {file.path: file for file in status_of_files([model.path for model in models], pages=True).files}
        files = [looked.get(file.path, file) for file in files]
    rows = [*map(row_of_file, files), *map(_row_of_failure, found.failures)]
    for file in files:
        if file.ranges is not None and file.path.endswith(_MODELS):
            try:
                places = {name: (place.start, place.stop) for name, place in tensor_ranges(file.path).items()}
            except OSError as error:
                reason = FileFailure.of(file.path, error).reason
                rows.append(HeatRow("tensors", "tensor", file.path, 0, 0, None, None, (), reason))
            else:
                rows += rows_of_tensors(file, places)
    return rows


@contextmanager
def opened_process(pid: int) -> Iterator[Callable[[], list[HeatRow]]]:
    """Hold a process by a pidfd, and yield the function that takes its rows as they are now.

    The function raises a ProcessLookupError when the process has ended, also if another one has its pid by then.

    Raises:
        OSError: the process is gone, or is a kernel thread; PermissionError: its mappings may not be read.
    """
    with OtherProcess(pid) as process:

        def take() -> list[HeatRow]:
            process.ensure_running()
            found = status_of_process(pid)
            process.ensure_running()
            if found.unknown:
                raise PermissionError(13, found.unknown)
            return list(rows_of_process(found))

        yield take


def rows_of_pid(pid: int) -> list[HeatRow]:
    """Take the rows of a process as they are now; errors are those of :func:`opened_process`."""
    with opened_process(pid) as take:
        return take()


def frames(take: Callable[[], list[HeatRow]]) -> Iterator[Frame]:
    """Take frames, one for each step of the iteration.

    Args:
        take: takes the rows as they are now.
    """
    began = monotonic()
    before: Frame | None = None
    while True:
        rows = by_missing(take())
        now = monotonic() - began if before is not None else 0.0
        before = _frame(now, rows, before)
        yield before


def _status(paths: list[str | os.PathLike[str]]) -> FilesStatus:
    found = status_of_files(paths)
    return status_of_files(paths, pages=True) if len(found.files) <= MOST_FILES_BY_PAGE else found


def _frame(seconds: float, rows: list[HeatRow], before: Frame | None) -> Frame:
    if before is None:
        return Frame(seconds, rows, {}, None)
    passed = max(seconds - before.seconds, 1e-6)
    earlier = {row.key: row.present_bytes for row in before.rows}
    rates = {
        row.key: (row.present_bytes - present) / passed
        for row in rows
        if row.present_bytes is not None and (present := earlier.get(row.key)) is not None
    }
    return Frame(seconds, rows, rates, sum(rates.values()))


def _row_of_failure(failure: FileFailure) -> HeatRow:
    return HeatRow(failure.path, "file", "", 0, 0, None, None, (), failure.reason)

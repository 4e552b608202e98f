"""Runs of pages: ranges of page numbers, in lists."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence


def append_run(runs: MutableSequence[range], run: range) -> None:
    """Append a run, or join it to the last one if it continues that."""
    if runs and runs[-1].stop == run.start:
        runs[-1] = range(runs[-1].start, run.stop)
    else:
        runs.append(run)


def subtract(run: range, keep: list[range]) -> list[range]:
    """Return the pieces of a run that lie in none of the runs in ``keep``."""
    pieces = [run]
    for other in keep:
        pieces = [
            part
            for piece in pieces
            for part in (range(piece.start, min(piece.stop, other.start)), range(max(piece.start, other.stop), piece.stop))
            if len(part)
        ]
    return pieces


def with_gaps(runs: list[range], pages: range) -> list[tuple[range, bool]]:
    """Split pages at sorted runs of them: each piece, and whether it is one of the runs."""
    pieces, at = [], pages.start
    for run in runs:
        if at < run.start:
            pieces.append((range(at, run.start), False))
        pieces.append((run, True))
        at = run.stop
    if at < pages.stop:
        pieces.append((range(at, pages.stop), False))
    return pieces


def split_at(page: int, pages: range, taken: Iterable[range]) -> tuple[bool, range]:
    """Return whether ``page`` is in a range of ``taken``, and the run of ``pages`` around it that shares the answer."""
    start, stop = pages.start, pages.stop
    for other in taken:
        if other.start > page:
            stop = min(stop, other.start)
        elif other.stop <= page:
            start = max(start, other.stop)
        else:
            return True, range(max(start, other.start), min(stop, other.stop))
    return False, range(start, stop)

"""populate, plan, residency and lock of paths, with the results of those of memory."""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Callable
from typing import Any

from prefault.engine.outcomes import PopulateResult
from prefault.engine.planning import Plan
from prefault.errors import HeadroomError
from prefault.files.budget import MemoryBudget
from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import FewLostPages, FileError, FileFailure, LostPages
from prefault.files.file_locks import FileLock, lock_files
from prefault.files.file_plan import FilePlan
from prefault.files.file_status import pages_of
from prefault.files.method_choice import MethodChoice
from prefault.files.open_file import OpenFile
from prefault.files.selection import SelectedFile, Selection, as_selection
from prefault.files.warm_result import WarmResult, length_in_file
from prefault.files.warming import warm
from prefault.inspection.result import PageState, Residency
from prefault.limits.memory_use import MemoryUse
from prefault.limits.table import shortfall_of
from prefault.memory.borrowing import Span
from prefault.memory.file_verbs import FileVerbs
from prefault.memory.vma import Backing
from prefault.ranges import RangeSet
from prefault.sizes import Size, format_size, parse_size

_ONLY_CACHE = "a path is looked at in the page cache; map the file to see its pages in this process"

_REFUSED = {
    "rollback": "pages that were brought into the page cache stay: prefault.evict takes them out; leave rollback out",
    "huge": "huge pages of files are the file system's to choose: leave huge out",
    "node": "files come from the node that reads them: leave node out",
    "interleave": "files come from the node that reads them: leave interleave out",
}


class PagesOfFiles(FileVerbs):
    """Verbs on the page cache of files, in the shape of those on memory."""

    def populate(
        self, files: Any, *, offset: Size, length: Size | None, method: Any = None, threads: Any = None,
        progress: Any = False, rate: Any = None, headroom: Any = "check", **others: Any,
    ) -> PopulateResult:  # fmt: skip
        """Bring all of it into the page cache, or raise the first file that could not be, as OSError."""
        _check(others)
        ranges, checked = _ranges(offset, length), headroom == "check"
        select = _selecting(files)
        total = _ensure_room(select, ranges) if checked else 0
        budget = MemoryBudget(check_headroom=checked)
        result = warm(
            select(), ranges=ranges, method=method, threads=_number(threads), budget=budget, rate=rate, progress=progress
        )
        forgiven = FewLostPages if checked else LostPages
        failures = [failure for failure in result.failures if not isinstance(failure, forgiven)]
        if result.stopped:
            raise _stopped(result, budget, total)
        if failures:
            raise _error_of(failures, result.bytes)
        notes = [f"into the page cache, {_files(result.files)}"]
        if result.evicted_bytes:
            why = "a few, as the kernel takes cold pages at any time" if checked else "as memory is short"
            notes.append(f"{format_size(result.evicted_bytes)} evicted again, {why}")
        if result.hole_bytes:
            notes.append(f"{format_size(result.hole_bytes)} are holes, which have nothing to read")
        if result.unchecked_bytes:
            notes.append(f"{format_size(result.unchecked_bytes)} not checked: the kernel tells only a file's owner")
        return PopulateResult(
            result.bytes, result.present_bytes, result.seconds, "read", result.method or "none", max(1, result.threads),
            tuple(notes),
        )  # fmt: skip

    def plan(
        self, files: Any, *, offset: Size, length: Size | None, method: Any = None, threads: Any = None, **others: Any
    ) -> Plan:
        """Look at the page cache of all files; the notes tell what is missing, and how the first of them would be read."""
        _check(others)
        choice = MethodChoice(_number(threads), method)
        ranges = _ranges(offset, length)
        missing = lacking = present = holes = unknown = count = 0
        words, workers = "", 1
        for found in as_selection(files):
            if isinstance(found, FileFailure):
                raise _error_of((found,), 0)
            with OpenFile(found.path) as file:
                plan = FilePlan.of(file, None if ranges is None else pages_of(file, ranges), missing_only=True)
                count += 1
                missing_here = length_in_file(file, plan.missing) if plan.missing else 0
                missing, present, holes = missing + missing_here, present + plan.present.length, holes + plan.hole_bytes
                unknown += not plan.is_known
                lacking += missing_here if plan.is_known else 0
                if not words and plan.missing:
                    way = choice.first(file)
                    workers, words = way.threads, f"by {way.name}, {way.threads} at a time ({file.file_system})"
                    if choice.place_to_measure(file, plan.missing) is not None:
                        words += ", or by what is faster on its first MiB"
        notes = [
            f"{format_size(missing)} of {_files(count)} are missing from the page cache, {format_size(present)} are in it"
        ]
        notes += [words] if words else []
        notes += [f"{format_size(holes)} are holes, which have nothing to read"] if holes else []
        notes += [f"{_files(unknown)} of which the kernel does not tell taken as missing"] if unknown else []
        short = shortfall_of(_PAGE_CACHE, lacking)
        notes += [f"it does not fit: {short.sentence}"] if short is not None else []
        return Plan(Span(0, 0), (), workers, tuple(notes), words)

    def residency(self, files: Any, *, offset: Size, length: Size | None, nodes: bool) -> Residency:
        """Return the pages of one file that are in the page cache; its range counts from the start of the file."""
        if not isinstance(files, str | os.PathLike):
            raise TypeError("residency takes one file: prefault.status takes several, and tells of each")
        if nodes:
            raise ValueError(
                "the kernel does not tell the node of pages of the page cache: map the file, or leave nodes out"
            )
        if os.path.isdir(files):
            raise FileError(errno.EISDIR, "is a directory", os.fspath(files), "prefault.status tells of each file in it")
        start = parse_size(offset)
        with OpenFile(files) as file:
            pages = file.pages(start, None if length is None else start + parse_size(length))
            cached = cached_ranges(file, pages.start, pages.stop) if pages else RangeSet()
        words = array("Q")
        for run in cached:
            words.extend((run.start, run.stop, int(PageState.PRESENT)))
        unknown: dict[PageState, str] = {state: _ONLY_CACHE for state in PageState if state is not PageState.PRESENT}
        found = Residency(pages, words, "page cache", unknown)
        found.cached_bytes = cached.length
        return found

    def lock(
        self, files: Any, *, offset: Size, length: Size | None, access: Any = None, ranges: Any = None, **options: Any
    ) -> FileLock:
        """Bring all of it into the page cache and lock it, or raise where no file could be locked."""
        _check({"access": access})
        wanted = _ranges(offset, length) if ranges is None else ranges
        made = lock_files(files, ranges=wanted, **options)
        if made.closed and made.failures:
            raise _error_of(made.failures[:1], 0)
        return made


def _check(options: dict[str, Any]) -> None:
    if options.get("access") not in (None, "read"):
        raise ValueError(f"files are brought in as they are: access is None or 'read', not {options['access']!r}")
    for name, reason in _REFUSED.items():
        if not (options.get(name) is None or options[name] is False):  # node 0 is a node
            raise ValueError(reason)


_PAGE_CACHE = MemoryUse(backing=Backing.FILE, shared=True, access="read")


def _selecting(files: Any) -> Callable[[], Selection]:
    """Return a function that selects the files anew; what a selection has found is kept, as it can be read once."""
    if not isinstance(files, Selection):
        return lambda: as_selection(files)
    found = list(files)
    return lambda: Selection(lambda _: iter(found))


def _ensure_room(select: Callable[[], Selection], ranges: list[tuple[int, int | None]] | None) -> int:
    """Return the bytes that were asked for.

    Raises:
        HeadroomError: memory does not hold what is missing of them, whatever the kernel evicts.
    """
    total = sum(_length_within(found.size, ranges) for found in select() if isinstance(found, SelectedFile))
    if shortfall_of(_PAGE_CACHE, total) is None:
        return total
    missing = count = 0
    for found in select():
        if not isinstance(found, SelectedFile):
            continue
        with contextlib.suppress(OSError), OpenFile(found.path) as file:  # warm() finds the error, too
            plan = FilePlan.of(file, None if ranges is None else pages_of(file, ranges), missing_only=True)
            missing += plan.missing.length if plan.is_known else 0
            count += 1
    short = shortfall_of(_PAGE_CACHE, missing)
    if short is not None:
        raise short.error(
            f"cannot bring in the {format_size(missing)} of {_files(count)} that are missing: {short.sentence};"
            " nothing was brought in"
        )
    return total


def _length_within(size: int, ranges: list[tuple[int, int | None]] | None) -> int:
    if ranges is None:
        return size
    return sum(max(0, (size if stop is None else min(stop, size)) - start) for start, stop in ranges)


def _stopped(result: WarmResult, budget: MemoryBudget, total: int) -> HeadroomError:
    """Return the exception for a call that ended before it would have evicted what it had brought in."""
    # Files that were at work beside it may have failed after it.
    ended = next((failure for failure in result.failures if failure.remedy == result.stopped), result.stopped)
    return HeadroomError(
        errno.ENOMEM,
        f"{ended}, take fewer files (prefault.stream reads any), or go on regardless with headroom='ignore';"
        f" {format_size(result.bytes)} were brought in",
        limit=budget.limit, needed_bytes=max(total - result.present_bytes, result.bytes), available_bytes=result.bytes,
    )  # fmt: skip


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def _number(threads: Any) -> int | None:
    return None if threads == "auto" else threads


def _ranges(offset: Size, length: Size | None) -> list[tuple[int, int | None]] | None:
    start = parse_size(offset)
    if length is None:
        return [(start, None)] if start else None
    return [(start, start + parse_size(length))]


def _error_of(failures: tuple[FileFailure, ...] | list[FileFailure], brought_in: int) -> FileError:
    """Return the exception of the first of several failures, which says how many there are."""
    path, reason, remedy, number = failures[0][:4]
    if len(failures) > 1:
        reason += f" ({len(failures)} failures: prefault.warm returns them all)"
    if brought_in:
        reason += f"; {format_size(brought_in)} were brought in"
    return FileError(number or errno.EIO, reason, path, remedy)

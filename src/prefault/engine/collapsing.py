"""collapse: make huge pages of memory that is populated already."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any, NamedTuple

from prefault._kernel import mman
from prefault._system import capabilities, thp
from prefault.engine.chunking import ChunkSize
from prefault.engine.progress import Progress, check_progress, reporting
from prefault.inspection.result import PageState, Residency
from prefault.inspection.scan import residency_of
from prefault.intervals import Intervals
from prefault.memory.borrowing import Borrowed, borrow, provided_spans
from prefault.memory.vma import Backing, Vma, vm_flags, vma_at, vmas
from prefault.ranges import PageRange
from prefault.sizes import Size, format_size

_TRIES = 3


class NotCollapsed(NamedTuple):
    """Memory that stays in base pages for one reason.

    Attributes:
        bytes: how much.
        reason: why, in words.
        errno: the kernel's error number; None where the kernel was not asked.
        offset: distance of the first such byte from the start of the buffer.
    """

    bytes: int
    reason: str
    errno: int | None
    offset: int

    def __str__(self) -> str:
        name = f" [{errno.errorcode[self.errno]}]" if self.errno is not None else ""
        return f"{format_size(self.bytes)} from offset {self.offset} on: {self.reason}{name}"


class CollapseResult(NamedTuple):
    """Huge pages that a range has after a collapse.

    Attributes:
        made_bytes: bytes that the call put into huge pages.
        huge_before_bytes: bytes that were in huge pages before; None where the kernel does not tell (before Linux 6.7), and
            ``made_bytes`` counts them too.
        left: memory that stays in base pages, by reason.
        seconds: time that the call took.
    """

    made_bytes: int
    huge_before_bytes: int | None
    left: tuple[NotCollapsed, ...]
    seconds: float

    @property
    def left_bytes(self) -> int:
        """Bytes that stay in base pages."""
        return sum(item.bytes for item in self.left)

    def __str__(self) -> str:
        parts = [f"{format_size(self.made_bytes)} made huge in {self.seconds:.2g} s"]
        if self.huge_before_bytes:
            parts.append(f"{format_size(self.huge_before_bytes)} were before")
        return "; ".join([", ".join(parts), *(f"left: {item}" for item in self.left)])


def collapse(
    buffer: Any, *, offset: Size = 0, length: Size | None = None, progress: Progress | bool = False
) -> CollapseResult:
    """Make huge pages of memory that is populated, so that one page-table entry maps 2 MiB. No byte changes.

    Memory that stays in base pages is no error; the result says how much, and why. Missing pages of a huge page that has
    some are filled with zeros, which takes memory. Shared memory becomes huge for every process.

    Args:
        buffer: any buffer, as for :func:`prefault.populate`. Only whole huge pages inside it are collapsed.
        offset: where to start, in bytes from the start of the buffer.
        length: how far; None: to its end.
        progress: as for :func:`prefault.populate`.

    Raises:
        KeyboardInterrupt: Ctrl-C, some milliseconds late. Huge pages that were made stay; a note says how many.
        TypeError, ValueError: not a buffer; an offset or length outside.

    Source: madvise(2), MADV_COLLAPSE (Linux 6.1, commit 7d8faaf15545).
    """
    began = perf_counter()
    check_progress(progress)
    with borrow(buffer) as memory, ExitStack() as stack:
        span = memory.select(offset, length)
        if memory.access_guard is not None:
            # Nothing is admitted: other calls on these blocks wait, and none is charged or unprotected.
            stack.enter_context(memory.access_guard.populating(span))
        report = stack.enter_context(reporting(progress, "collapse"))
        return _Collapse(memory, PageRange.outward(*span)).run(began, report)


class _Collapse:
    """One collapse at work on whole base pages."""

    def __init__(self, memory: Borrowed, pages: PageRange) -> None:
        self._memory = memory
        self._pages = pages
        self._huge = thp.pmd_size()
        self._left: dict[tuple[int | None, str], tuple[int, int]] = {}
        self._made = 0

    def run(self, began: float, report: Progress | None) -> CollapseResult:
        size = self._huge
        if size is None or not capabilities.MADV_COLLAPSE.available:
            refusal = "no transparent huge pages" if size is None else "no MADV_COLLAPSE (Linux 6.1)"
            self._leave(self._pages, None, f"this kernel has {refusal}")
            return self._result(None, began)
        before = residency_of(self._pages)
        told = PageState.HUGE not in before.unknown
        huge = _addresses(before, PageState.HUGE) if told else Intervals()
        todo = self._candidates(before, size) - huge
        try:
            self._work(todo, size, report)
        except KeyboardInterrupt as interruption:
            interruption.add_note(f"collapse was interrupted: {format_size(self._made)} made huge by then")
            raise
        if told:
            self._made = max(0, residency_of(self._pages).bytes_in(PageState.HUGE) - huge.length)
        return self._result(huge.length if told else None, began)

    def _result(self, before: int | None, began: float) -> CollapseResult:
        origin = self._memory.address
        left = (NotCollapsed(count, why, number, at - origin) for (number, why), (count, at) in self._left.items())
        return CollapseResult(self._made, before, tuple(sorted(left, key=lambda item: item.offset)), perf_counter() - began)

    def _leave(self, pages: PageRange, number: int | None, reason: str) -> None:
        if pages:
            count, first = self._left.get((number, reason), (0, pages.start))
            self._left[number, reason] = count + pages.length, min(first, pages.start)

    def _leave_all(self, pages: Intervals, reason: str) -> None:
        for start, stop in pages:
            self._leave(PageRange(start, stop), None, reason)

    def _candidates(self, before: Residency, size: int) -> Intervals:
        """Return the huge pages that the kernel is asked for; the others are left, each with its reason."""
        pages, present = self._pages, _addresses(before, PageState.PRESENT)
        hugetlb = [(vma.start, vma.stop) for vma in vmas(*pages) if vma.backing is Backing.HUGETLB]
        provided = Intervals((start, stop) for start, stop, _ in provided_spans(*pages)) - Intervals(hugetlb)
        others = Intervals([pages]) - Intervals(hugetlb)
        self._leave_all(others & provided, "device memory: its driver decides about huge pages")
        # Neighbours of one huge page may lie in different mappings, which the kernel never joins in one.
        mapped = Intervals.union_of(
            Intervals([(max(vma.start, pages.start), min(vma.stop, pages.stop))]).inward(size) for vma in vmas(*pages)
        )
        others -= provided
        whole = mapped & others
        ends = others - whole
        if PageState.HUGE not in before.unknown:
            ends -= _addresses(before, PageState.HUGE)
        self._leave_all(ends, f"no whole huge page of {format_size(size)} in one mapping")
        some = present.outward(size) & whole
        self._leave_all(whole - some, "nothing is populated there: populate it first")
        if self._memory.access_guard is None:
            return some
        full = present.inward(size) & some
        self._leave_all(some - full, "a part of it is not populated, and sparse memory populates whole blocks only")
        return full

    def _work(self, todo: Intervals, size: int, report: Progress | None) -> None:
        pace, done, total = ChunkSize(on_disk=False), 0, todo.length
        for start, stop in todo:
            at = start
            while at < stop:
                chunk = PageRange(at, min(stop, at + max(size, pace.size - pace.size % size)))
                pace.start()
                self._collapse(chunk, size)
                pace.finish()
                at, done = chunk.stop, done + chunk.length
                if report is not None:
                    report(done, total)

    def _collapse(self, chunk: PageRange, size: int) -> None:
        if _advise(chunk) is None:
            self._made += chunk.length
            return
        # The kernel goes on behind some failures and not behind others: each huge page tells.
        for page in chunk.chunks(size):
            number = next((number for number in map(_advise, [page] * _TRIES) if number != errno.EAGAIN), errno.EAGAIN)
            if number is None:
                self._made += page.length
            else:
                self._leave(page, number, _reason(number, page))


def _advise(pages: PageRange) -> int | None:
    """Collapse the pages; return the errno of a failure."""
    try:
        mman.madvise(pages.start, pages.length, mman.MADV_COLLAPSE)
    except OSError as error:
        return error.errno or 0
    return None


def _addresses(found: Residency, state: PageState) -> Intervals:
    return Intervals.union_of([found.ranges(state).shifted(found.range.start)])


def _reason(number: int, page: PageRange) -> str:
    """Explain the kernel's refusal of one huge page by what lies there; after the failure, so perhaps not its cause."""
    vma = vma_at(page.start)
    if vma is None or vma.start > page.start:
        return "it was unmapped meanwhile"
    if number == errno.ENOMEM:
        return f"no {format_size(page.length)} of free memory in one piece, even after compaction"
    if number == errno.EAGAIN:
        return "a page of it is pinned (direct I/O, RDMA), locked or moved by another just now: try again later"
    if number == errno.EBUSY:
        if "um" in vm_flags(page.start):
            return "a userfaultfd watches for its missing pages"
        return "a limit of the memory cgroup leaves no room for a huge page: raise it, or use less"
    return next(_obstacles(vma, page), "the kernel refuses without saying why")


def _obstacles(vma: Vma, page: PageRange) -> Iterator[str]:
    if vma.backing is Backing.SPECIAL:
        yield "special memory, which has no huge pages"
    if "nh" in vm_flags(page.start):
        yield "MADV_NOHUGEPAGE forbids it (huge='never')"
    if thp.is_disabled_for_process():
        yield "prctl(PR_SET_THP_DISABLE) forbids it for this process"
    if vma.inode and (vma.file_offset - vma.start) % page.length:
        yield f"its address and its offset in the file differ modulo {format_size(page.length)}: map it at another address"
    if vma.backing is Backing.FILE:
        yield "this kernel makes no huge pages of this file (CONFIG_READ_ONLY_THP_FOR_FS, for read-only mappings)"
    states = [run.state for run in residency_of(page).runs]
    if any(state & PageState.GUARD for state in states):
        yield "guard pages lie in it"
    if vma.inode and not vma.shared and any(not state & PageState.FILE for state in states):
        yield "it has private copies of a file's pages"
    if not any(state & PageState.ALLOCATED for state in states):
        yield "only the zero page is there: populate it with access='write'"

"""Decide which method populates which pages in how many threads, and explain why, before anything is done."""

import errno
import os
from collections.abc import Iterator
from operator import itemgetter
from typing import Literal, NamedTuple, TypeAlias

from prefault._system import capabilities, thp
from prefault._system.cpus import usable_cpus, why_not_more_cpus
from prefault.engine.methods import Access, Method, Target, best, by_name
from prefault.intervals import Intervals
from prefault.limits.memory_use import MemoryUse
from prefault.memory.borrowing import Borrowed, Span, other_spans, provided_spans
from prefault.memory.vma import Backing, Vma, file_descriptor, vmas_by_kind
from prefault.sizes import MIB, PAGE_SIZE, Size, format_size

Threads: TypeAlias = int | Literal["auto"] | None
"""How many threads populate at once; ``"auto"`` and None: chosen by size, affinity and CPU quota."""

Huge: TypeAlias = Literal["auto"] | None
"""Transparent huge pages of a populate call: ``"auto"`` asks for them where that pays, None leaves the memory as it is."""

THREAD_BYTES = 32 * MIB
"""Starting a thread pays from about this much memory for each (docs/design/populate.md)."""

MAX_THREADS = 8
"""More than this are not started unasked: clearing pages is bound by memory bandwidth."""


class Segment(NamedTuple):
    """Stretch that is populated by one method: addresses ``[start, stop)``, with the reason for the choice.

    Where ``pages`` is not None only these addresses of it are populated, and what lies between is not.
    """

    start: int
    stop: int
    method: Method
    target: Target
    backing: Backing | None
    reason: str
    pages: Intervals | None = None

    @property
    def length(self) -> int:
        """Bytes to populate."""
        return self.stop - self.start if self.pages is None else self.pages.length

    @property
    def use(self) -> MemoryUse:
        """The segment as the limits see it."""
        target, method = self.target, self.method
        return MemoryUse(
            self.start, self.stop, self.backing, target.page_size, target.shared, method.access,
            allocates=method.allocates, locks=method.locks, is_hint=method.hint, fd=target.fd, file_base=target.file_base,
            file_size=None if target.fd is None else target.file_size,
        )  # fmt: skip


class Plan(NamedTuple):
    """Work of one :func:`prefault.populate` call, decided and not done.

    Attributes:
        span: the bytes that were asked for, as addresses; the first segment starts at the page that holds the first.
        segments: in order of address. One, unless the buffer lies in mappings of different kinds; device memory is not among
            them.
        threads: how many work at once.
        notes: sentences that a user should know.
        threads_reason: why that many threads, in words.
    """

    span: Span
    segments: tuple[Segment, ...]
    threads: int
    notes: tuple[str, ...]
    threads_reason: str = ""

    @property
    def length(self) -> int:
        """Bytes of whole pages, without device memory."""
        return sum(segment.length for segment in self.segments)

    @property
    def method(self) -> str:
        """The names of the methods, joined by commas where there are several."""
        return ", ".join(dict.fromkeys(segment.method.name for segment in self.segments)) or "none"

    @property
    def access(self) -> Access:
        """``"write"`` where any part is populated writable."""
        return "write" if any(segment.method.access == "write" for segment in self.segments) else "read"

    def __str__(self) -> str:
        if not self.segments:
            return "\n".join(self.notes) or "nothing to populate: the buffer is empty"
        lines = [f"{format_size(segment.length)} by {segment.method.name}: {segment.reason}" for segment in self.segments]
        if not any(self.threads_reason in note for note in self.notes):
            lines.append(f"{_count_of(self.threads)}: {self.threads_reason}")
        return "\n".join([*lines, *self.notes])


def make_plan(
    memory: Borrowed, access: Access | None, offset: Size, length: Size | None, method: str | None, threads: Threads
) -> Plan:
    """Return the plan for borrowed memory."""
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read', 'write' or None, not {access!r}")
    span = memory.select(offset, length)
    provided = provided_spans(*span) if method is None and span.start < span.stop else ()
    if not provided:
        return plan_span(memory, span, access, method, threads)
    plans = [plan_span(memory, part, access, None, threads) for part in other_spans(*span, provided)]
    size = sum(stop - start for start, stop, _ in provided)
    notes = [
        f"{'' if not plans else f'{format_size(size)} of it are '}device memory: one call of its driver's populate hook"
    ]
    notes += dict.fromkeys(note for part in plans for note in part.notes)
    segments = tuple(segment for part in plans for segment in part.segments)
    threads_of, why = max(((part.threads, part.threads_reason) for part in plans), default=(1, ""), key=itemgetter(0))
    return Plan(span, segments, threads_of, tuple(notes), why)


def plan_span(
    memory: Borrowed, span: Span, access: Access | None, method: str | None, threads: Threads
) -> Plan:  # fmt: skip
    """Return the plan for a part of borrowed memory that the kernel shall populate."""
    chosen = None if method is None else chosen_method(method, access)
    if span.start == span.stop:
        return Plan(span, (), 1, ())
    return explained(memory, span, tuple(segments_of(memory, span, access, chosen)), access, chosen, threads)


def explained(
    memory: Borrowed, span: Span, segments: tuple[Segment, ...], access: Access | None, chosen: Method | None,
    threads: Threads,
) -> Plan:  # fmt: skip
    """Return the plan for segments of borrowed memory, with the number of threads and the notes."""
    notes: list[str] = []
    kinds = {segment[2:5]: segment for segment in segments}.values()
    notes += dict.fromkeys(note for segment in kinds for note in _notes(segment))
    if access is None and chosen is None and not memory.readonly:
        notes += dict.fromkeys(_LEFT_TO_THE_FILE for segment in kinds if _is_left_to_the_file(segment))
    count, reason, in_place_of = _threads(threads, segments)
    if in_place_of is not None:
        notes.append(f"{_count_of(count)} in place of {in_place_of}: {reason}")
    return Plan(span, segments, count, tuple(notes), reason)


def chosen_method(name: str, access: Access | None) -> Method:
    """Return the method that a caller asks for by name; ValueError if it is not for populating memory that is in use."""
    method = by_name(name, access)
    if method.by_hand or method.overwrites:
        raise ValueError(
            f"method {name!r} is for measurements on empty mappings: it overwrites memory, or dies of SIGBUS where"
            " there is none"
        )
    if access is not None and method.access != access and not method.hint:
        raise ValueError(f"method {name!r} populates for {method.access}, not for {access}")
    return method


def segments_of(memory: Borrowed, span: Span, access: Access | None, chosen: Method | None) -> Iterator[Segment]:
    """Yield one segment per mapping, neighbours of the same kind joined, a hole with the mapping before it.

    The kernel itself stops at a hole, so that none need be found here.
    """
    pending: Segment | None = None
    for found in _pieces(memory, span, access, chosen):
        if pending is not None and _same_kind(pending, found):
            pending = pending._replace(stop=found.stop)
            continue
        if pending is not None:
            yield pending
        pending = found
    if pending is not None:
        yield pending


def _pieces(memory: Borrowed, span: Span, access: Access | None, chosen: Method | None) -> Iterator[Segment]:
    """Yield one segment for each mapping and each hole."""
    at = span.start - span.start % PAGE_SIZE
    stop = span.stop + -span.stop % PAGE_SIZE
    known: dict[Vma, tuple[Method, Target, Backing | None, str]] = {}
    for first, last, vma in vmas_by_kind(at, stop):
        if first > at:
            yield _hole(at, first, access, chosen)
            at = first
        # Whole huge pages: the kernel populates no less of hugetlb memory.
        start = at - (at - first) % vma.page_size
        end = min(stop + (first - stop) % vma.page_size, last)
        like = known.get(vma)
        if like is None:
            # Blocks that the access guard protects are unprotected by the time that the plan is carried out.
            seen = vma if memory.access_guard is None else vma.unprotected()
            like = known[vma] = _segment(memory, seen, start, end, access, chosen)[2:6]
        yield Segment(start, end, *like)
        at = end
    if at < stop:
        yield _hole(at, stop, access, chosen)


def _hole(start: int, stop: int, access: Access | None, chosen: Method | None) -> Segment:
    return Segment(start, stop, chosen or best(access or "write", allocate=False), Target(), None, "nothing is mapped")


def _same_kind(one: Segment, other: Segment) -> bool:
    return one.method is other.method and one.target == other.target and one.backing is other.backing


def _copies_a_file(shared: bool, backing: Backing | None) -> bool:
    """Return whether the first store to a page copies it from a file: populating writable would copy all of the file."""
    # Not hugetlb, anonymous or not: a store that finds its pool empty is a SIGBUS.
    return not shared and backing is not None and (backing is Backing.FILE or backing.is_shmem)


def _segment(memory: Borrowed, vma: Vma, start: int, stop: int, access: Access | None, chosen: Method | None) -> Segment:
    on_disk = vma.shared and vma.backing is Backing.FILE
    of_file = on_disk or _copies_a_file(vma.shared, vma.backing)
    wish = access or ("write" if vma.writable and not memory.readonly and not of_file else "read")
    if chosen is not None:
        fd = _descriptor(memory, vma) if chosen.allocates else None
        if fd is None and chosen.allocates:
            raise ValueError(f"method {chosen.name!r} needs a shared mapping with a descriptor that is open for writing")
        return Segment(start, stop, chosen, _target(vma, fd), vma.backing, "asked for by name")
    may_allocate = vma.shared and vma.writable and (wish == "write" or (on_disk and access is None))
    if memory.huge and vma.backing.is_shmem:
        # fallocate does not see the advice on the mapping: where shmem_enabled (or the mount) says "advise" it allocates
        # base pages, and a later fault finds them there. Seen on Linux 6.18.
        may_allocate = False
    if memory.has_policy and vma.backing is Backing.HUGETLB:
        may_allocate = False  # nor does it see a memory policy, which hugetlb keeps with the mapping. Seen on Linux 6.12
    # A descriptor is looked for only where it matters: shared memory without one is allocated by populating it.
    fd = _descriptor(memory, vma) if may_allocate and (memory.fd is not None or on_disk) else None
    method = best(wish, allocate=fd is not None)
    reason = _reason(vma, wish, fd, on_disk)
    if method.falls_back and vma.backing in (Backing.FILE, Backing.TMPFS):
        reason += f" ({method.without_fallocate.name} alone, if the file system has no fallocate)"
    return Segment(start, stop, method, _target(vma, fd), vma.backing, reason)


def _descriptor(memory: Borrowed, vma: Vma) -> int | None:
    if not vma.shared or not vma.inode:
        return None
    return memory.fd if memory.fd is not None else file_descriptor(vma)


def _target(vma: Vma, fd: int | None) -> Target:
    if fd is None:
        return Target(vma.page_size, shared=vma.shared, writable=vma.writable)
    size = os.fstat(fd).st_size
    return Target(vma.page_size, fd, vma.file_offset - vma.start, size, vma.shared, vma.writable)


def _reason(vma: Vma, wish: Access, fd: int | None, on_disk: bool) -> str:
    kind = vma.backing.value
    if vma.backing not in (Backing.ANONYMOUS, Backing.SHARED_ANONYMOUS):
        kind = f"{'shared' if vma.shared else 'private'} mapping of {kind}"
    if on_disk and wish == "read" and fd is not None:
        return f"{kind}: disk space first, then readable, so that nothing has to be written back"
    if on_disk and wish == "read" and vma.writable:
        return f"{kind}: readable, so that nothing has to be written back; no descriptor to allocate holes with"
    if on_disk and wish == "write":
        return f"{kind}: writable, as asked, so every page becomes dirty and will be written back"
    if wish == "read":
        return f"{kind}: readable" + ("" if vma.writable else ", as it may not be written")
    if fd is not None:
        return f"{kind} with a descriptor: memory first, then the page tables"
    return f"{kind}: writable"


_LEFT_TO_THE_FILE = "copy-on-write pages stay the file's: pass access='write' to copy them into memory of their own now"


def _is_left_to_the_file(segment: Segment) -> bool:
    return segment.target.writable and _copies_a_file(segment.target.shared, segment.backing)


def _notes(segment: Segment) -> Iterator[str]:
    if segment.method.hint:
        yield f"{segment.method.name} is a hint: nothing is promised, and the pages are counted afterwards"
    elif segment.method.is_fallback and not capabilities.MADV_POPULATE.available:
        yield f"this kernel has no MADV_POPULATE_*: {segment.method.name} does it, slower"
    if segment.backing is Backing.FILE and segment.target.shared and segment.method.access == "write":
        yield "every page of the file becomes dirty and will be written back"


class _ThreadChoice(NamedTuple):
    """Number of threads, the reason in words, and how many there would be without the limit that a user should know of."""

    threads: int
    reason: str
    in_place_of: int | None = None


def _threads(asked: Threads, segments: tuple[Segment, ...]) -> _ThreadChoice:
    if isinstance(asked, str) and asked != "auto":
        raise ValueError(f"threads is a number, 'auto' or None, not {asked!r}")
    if asked is None or asked == "auto":
        return _chosen_threads(segments)
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"threads is a number or 'auto', not {type(asked).__name__}")
    if asked < 1:
        raise ValueError(f"threads is at least 1, not {asked}")
    usable = 1 if asked == 1 else usable_cpus()
    return _ThreadChoice(asked, "as asked") if asked <= usable else _ThreadChoice(usable, why_not_more_cpus(), asked)


def _chosen_threads(segments: tuple[Segment, ...]) -> _ThreadChoice:
    each = max(THREAD_BYTES, *(segment.target.page_size for segment in segments))
    worth = sum(segment.length for segment in segments) // each
    if worth < 2:
        return _ThreadChoice(1, f"a second one pays from {format_size(2 * each)} on")
    if any(segment.backing is Backing.FILE for segment in segments):
        return _ThreadChoice(1, "a disk likes its requests in order")
    wanted, usable = min(worth, MAX_THREADS), usable_cpus()
    if usable < wanted:
        # How many CPUs the machine has is no news; a container's quota or an affinity may be.
        return _ThreadChoice(usable, why_not_more_cpus(), wanted if usable < (os.cpu_count() or 1) else None)
    if worth > MAX_THREADS:
        return _ThreadChoice(wanted, "memory bandwidth bounds clearing pages, so more are started only if asked for")
    return _ThreadChoice(wanted, f"one for each {format_size(each)}")


def _count_of(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def wants_huge(huge: Huge) -> bool:
    """Return whether huge pages are to be asked for; ValueError for another word."""
    if huge not in (None, "auto"):
        raise ValueError(f"huge is 'auto' or None, not {huge!r}: Mapping(huge=) takes 'advise' and 'never'")
    return huge == "auto"


def huge_page_candidates(plan: Plan, memory: Borrowed) -> tuple[Intervals, str | None]:
    """Return the memory of a plan that may be advised MADV_HUGEPAGE, or else a note that says why none may be."""
    private = Intervals(
        (item.start, item.stop)
        for item in plan.segments
        if item.backing is Backing.ANONYMOUS and item.target.writable and item.method.access == "write"
    )
    size = thp.pmd_size() or PAGE_SIZE
    from prefault.memory.huge_advice import obstacle  # most programs do not ask for huge pages, and import is to be quick

    reason = obstacle()
    if reason is None and memory.access_guard is not None:
        reason = "the huge= of sparse memory decides"
    if reason is None and not private:
        reason = "it is not private anonymous memory that is populated for writing"
    if reason is None and not private.inward(size):
        reason = f"no whole huge page of {format_size(size)} lies in it"
    return (private, None) if reason is None else (Intervals(), f"no huge pages asked for: {reason}")


def huge_note(plan: Plan, memory: Borrowed) -> str:
    """Return a sentence about what huge="auto" would do."""
    private, note = huge_page_candidates(plan, memory)
    size = format_size(private.inward(thp.pmd_size() or PAGE_SIZE).length)
    return note or (
        f"huge pages for {size}, by MADV_HUGEPAGE: unless MADV_NOHUGEPAGE was given, and until compaction makes them slow"
    )


NO_FALLOCATE = "the file system has no fallocate: holes stay holes, and a later store may find it full"


def without_fallocate(segment: Segment, error: OSError) -> Segment | None:
    """Return the segment for a file system without fallocate, if ``error`` says so (NFS before 4.2, FAT, ramfs); else None.

    Populating finds this out: a plan touches nothing.
    """
    method = segment.method
    if method.falls_back and error.errno == errno.EOPNOTSUPP:
        return segment._replace(method=method.without_fallocate)
    return None

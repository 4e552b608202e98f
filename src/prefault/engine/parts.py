"""Parts of a populate call: memory of the kernel and of page providers, one part after the other, undone together."""

import abc
from collections.abc import Sequence
from time import perf_counter_ns
from typing import NamedTuple

from prefault.engine.chunk_queue import PlaceOf
from prefault.engine.execution import Execution
from prefault.engine.methods import Access
from prefault.engine.outcomes import PopulateResult, Settlement, evicted, interrupted
from prefault.engine.planning import Segment, Threads
from prefault.engine.progress import Progress
from prefault.engine.rate import RateLimit
from prefault.errors import PopulateError, PopulateInterrupted
from prefault.intervals import Intervals
from prefault.limits.admission import AdmissionControl, HeadroomChoice
from prefault.memory.borrowing import Borrowed, GuardedPopulate, PageProvider, ProvidedPages
from prefault.memory.node_policy import NodePolicy
from prefault.memory.vma import Backing
from prefault.ranges import RangeSet
from prefault.sizes import MIB, format_size

_NONE = Intervals()


FOREIGN_NODES = "the server of a device decides where its memory comes from: leave node and interleave out"


class PopulateOptions(NamedTuple):
    """Arguments of :func:`prefault.populate`, and when it began, by :func:`time.perf_counter_ns`."""

    access: Access | None
    method: str | None
    threads: Threads
    rollback: bool
    progress: Progress | bool
    rate: RateLimit | None
    headroom: HeadroomChoice
    began: int
    huge: bool
    node_policy: NodePolicy | None = None


class Part(abc.ABC):
    """Memory that one supplier populates: the kernel or a page provider.

    Attributes:
        length: bytes of it.
    """

    length: int

    @abc.abstractmethod
    def run(self) -> PopulateResult:
        """Populate it; PopulateError or PopulateInterrupted, which count this part only, if that fails."""

    @abc.abstractmethod
    def settle(self) -> Settlement:
        """Return what this part brought in, rolled back if that was asked for; the call fails elsewhere. Idempotent."""


class KernelPart(Part):
    """Memory that the kernel populates."""

    def __init__(self, execution: Execution) -> None:
        self.length = execution.length
        self._execution = execution
        execution.is_part = True

    def run(self) -> PopulateResult:
        """See :class:`Part`."""
        return self._execution.run(perf_counter_ns())

    def settle(self) -> Settlement:
        """See :class:`Part`."""
        return self._execution.settle()


class DevicePart(Part):
    """Pages of one page provider.

    Args:
        page_provider: supplies them.
        pages: their addresses.
        origin: the address that offsets in errors are counted from.
        access: ``"read"`` or ``"write"``.
        rollback: undo a call that fails.
        progress: called with the bytes done and in all.
        rate: limit of bytes a second; None: as fast as the device is.
        check_headroom: the device's server checks the limits of memory.
    """

    def __init__(
        self, page_provider: PageProvider, pages: Intervals, origin: int, access: Access, *, rollback: bool,
        progress: Progress | None, rate: RateLimit | None, check_headroom: bool,
    ) -> None:  # fmt: skip
        self.length = pages.length
        self._page_provider = page_provider
        self._pages = pages
        self._origin = origin
        self._access = access
        self._rollback = rollback
        self._progress = progress
        self._rate = rate
        self._check_headroom = check_headroom
        self._done: ProvidedPages | None = None
        self._undone = False

    def run(self) -> PopulateResult:
        """See :class:`Part`."""
        began = perf_counter_ns()
        if self._rate is not None:
            self._rate.wait(self.length)
        self._done = done = self._page_provider.populate(
            self._pages, self._origin, self._access, rollback=self._rollback, progress=self._progress,
            check_headroom=self._check_headroom,
        )  # fmt: skip
        took = (perf_counter_ns() - began) / 1e9
        return PopulateResult(done.bytes, done.present_bytes, took, self._access, "device", done.threads, done.notes)

    def settle(self) -> Settlement:
        """See :class:`Part`."""
        done = self._done
        if done is None:
            return Settlement(0, RangeSet(), self._rollback)
        if self._rollback and not self._undone:
            done.undo()
            self._undone = True
        return Settlement(done.bytes, RangeSet() if self._rollback else done.brought_in, self._rollback)


class ProgressOfParts:
    """Progress of all parts together, of which each reports its own.

    Args:
        progress: called with the bytes done and in all; None: not reported.
        total: bytes in all.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._before = 0

    def of_next(self, length: int) -> Progress | None:
        """Return the progress function of the next part, of ``length`` bytes."""
        progress, total, before = self._progress, self._total, self._before
        self._before += length
        if progress is None:
            return None
        # A device counts whole pages of its own, which may be more bytes than were asked for.
        return lambda done, whole: progress(before + (done if whole <= length else done * length // whole), total)


_SLOWEST_CHUNK = 4 * MIB
"""Bytes that a device is asked for at once at least, however low the rate: a request costs some 100 us."""


def device_parts(
    page_provider: PageProvider, pages: Intervals, origin: int, access: Access, *, rollback: bool,
    progresses: ProgressOfParts, rate: RateLimit | None, check_headroom: bool,
) -> list[Part]:  # fmt: skip
    """Return the parts for pages of one page provider: one, or many with a rate limit, as a device does each at once."""
    cuts = [pages]
    if rate is not None:
        step = 1 << max(rate.chunk_bytes, _SLOWEST_CHUNK).bit_length() - 1  # a multiple of the device's pages
        start, stop = pages.span
        cuts = [pages.clipped(at, at + step) for at in range(start - start % step, stop, step)]
    return [
        DevicePart(
            page_provider, some, origin, access, rollback=rollback, progress=progresses.of_next(some.length), rate=rate,
            check_headroom=check_headroom,
        )
        for some in cuts if some
    ]  # fmt: skip


def run_parts(
    parts: Sequence[Part], origin: int, began: int, admission: AdmissionControl | None = None,
    place_of: PlaceOf | None = None,
) -> PopulateResult:  # fmt: skip
    """Populate all parts in order; if one fails, those before it are settled with it.

    Args:
        parts: in order of address, or as they shall be populated.
        origin: the address that offsets in errors are counted from.
        began: when the call began, by :func:`time.perf_counter_ns`.
        admission: checked the limits for the memory of the kernel in all parts; None did not.
        place_of: returns the origin for an address, and words for the place; None: ``origin``, and none.

    Raises:
        PopulateError, PopulateInterrupted: a part failed. ``populated`` counts all parts.
    """
    results: list[PopulateResult] = []
    try:
        for part in parts:
            results.append(part.run())  # noqa: PERF401  those before a failure are needed
        eviction = None if admission is None else admission.look_again()
    except BaseException as error:
        settlements, ctrl_c = _settle(parts)
        if ctrl_c is None and isinstance(error, PopulateError | PopulateInterrupted):
            _add_others(error, _sum(settlements[: len(results)]))
            raise
        length = sum(part.length for part in parts)
        failure = interrupted(error if ctrl_c is None else ctrl_c, origin, length, _sum(settlements))
        if failure is error:
            raise
        raise failure from None
    if eviction is not None:
        settlements, ctrl_c = _settle(parts)
        if ctrl_c is not None:
            raise interrupted(ctrl_c, origin, sum(part.length for part in parts), _sum(settlements)) from None
        place = (origin, "") if place_of is None else place_of(eviction.pages.span[0])
        raise evicted(eviction, *place, _sum(settlements))
    return PopulateResult(
        sum(result.bytes for result in results),
        sum(result.present_bytes for result in results),
        (perf_counter_ns() - began) / 1e9,
        "write" if any(result.access == "write" for result in results) else "read",
        ", ".join(dict.fromkeys(name for result in results for name in result.method.split(", "))),
        max(result.threads for result in results),
        tuple(dict.fromkeys(note for result in results for note in result.notes)),
    )


def _settle(parts: Sequence[Part]) -> tuple[list[Settlement], KeyboardInterrupt | None]:
    """Settle all parts, whatever Ctrl-C interrupts; return the interruption as well."""
    settlements: list[Settlement] = []
    ctrl_c: KeyboardInterrupt | None = None
    while len(settlements) < len(parts):
        try:
            settlements.append(parts[len(settlements)].settle())
        except KeyboardInterrupt as interruption:
            ctrl_c = interruption
    return settlements, ctrl_c


def _sum(settlements: Sequence[Settlement]) -> Settlement:
    return Settlement(
        sum(settlement.brought_in_bytes for settlement in settlements),
        RangeSet.union_of(settlement.kept for settlement in settlements),
        rolled_back=any(settlement.rolled_back for settlement in settlements),
    )


def _add_others(error: PopulateError | PopulateInterrupted, others: Settlement) -> None:
    """Have an error, which counts the part that failed, count the parts before it as well."""
    if not others.brought_in_bytes:
        return
    error.populated |= others.kept
    text = f"; before that {format_size(others.brought_in_bytes)} in other parts of the range{others.rollback_text}"
    if isinstance(error, PopulateError):
        error.strerror = f"{error.strerror}{text}"
        error.args = (error.errno, error.strerror)
    else:
        error.args = (f"{error}{text}",)


def access_to(page_provider: PageProvider, memory: Borrowed, access: Access | None) -> Access:
    """Return how the pages of a page provider are populated: as asked, else as they may be used."""
    return access or ("write" if page_provider.writable and not memory.readonly else "read")


def admit(segment: Segment | None, admission: AdmissionControl | None, guarded: GuardedPopulate | None) -> Intervals:
    """Check the limits, then have the owner of guarded memory charge and unprotect its blocks.

    Args:
        segment: the first of those that the kernel populates; None where all is device memory.
        admission: checks the limits; None does not.
        guarded: the owner's part in it; None for memory without an access guard.

    Returns:
        The pages that were protected and cannot have been populated: guards look like pages in swap before Linux 6.15.
    """
    protected = _NONE
    # A pool sets huge pages aside until they are charged: only then their limit has room for them.
    if guarded is not None and segment is not None and segment.backing is Backing.HUGETLB:
        protected, guarded = guarded.admit(), None
    if admission is not None:
        admission.start()
    return protected if guarded is None else guarded.admit()

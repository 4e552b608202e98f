"""Outcomes of a populate call: its result, or what it brought in, what is left of that, and the exception."""

import errno
from collections.abc import Callable
from typing import NamedTuple

from prefault.engine.attempts import ChunkFailure
from prefault.engine.diagnosis import diagnose
from prefault.engine.methods import Access
from prefault.errors import HeadroomError, OutOfMemoryError, PopulateError, PopulateInterrupted
from prefault.limits.evicted_meanwhile import EvictedPages
from prefault.limits.limit import Shortfall
from prefault.ranges import RangeSet
from prefault.sizes import format_size

NO_MEMORY = "Python found no memory for its own objects during the call: free some, or raise RLIMIT_AS or the cgroup's limit"


class PopulateResult(NamedTuple):
    """Result of a populate call that succeeded: all of the range is populated.

    Attributes:
        bytes: bytes that this call brought in.
        present_bytes: bytes that were populated before.
        seconds: time that the call took.
        access: ``"read"`` or ``"write"``.
        method: the name of the method, or several, joined by commas.
        threads: number of threads that worked.
        notes: sentences about what is slower, weaker or otherwise worth knowing.
    """

    bytes: int
    present_bytes: int
    seconds: float
    access: Access
    method: str
    threads: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.bytes and not self.present_bytes:
            text = "nothing to populate: the buffer is empty" if self.method == "none" else "nothing was populated"
        elif not self.bytes:
            text = f"{format_size(self.present_bytes)} were populated already ({self.seconds:.2g} s)"
        else:
            how = "writable" if self.access == "write" else "readable"
            workers = f", {self.threads} threads" if self.threads > 1 else ""
            text = (
                f"{format_size(self.bytes)} populated {how} in {self.seconds:.2g} s"
                f" ({format_size(int(self.bytes / max(self.seconds, 1e-9)))}/s, {self.method}{workers})"
            )
            if self.present_bytes:
                text += f", {format_size(self.present_bytes)} were populated already"
        return "; ".join((text, *self.notes))


class Settlement(NamedTuple):
    """Pages that a call brought in before it ended early.

    Attributes:
        brought_in_bytes: bytes that it brought in.
        kept: pages of these that are still there.
        rolled_back: the others were discarded; else nothing was.
    """

    brought_in_bytes: int
    kept: RangeSet
    rolled_back: bool

    @property
    def rollback_text(self) -> str:
        """Continuation of a sentence about the pages that were brought in."""
        if not self.rolled_back:
            return ""
        if not self.kept:
            return ", and discarded again"
        return (
            f", and discarded again except {format_size(self.kept.length)}, which cannot be taken back (locked or sealed"
            " memory, a file without a descriptor to punch holes with, the rest of a huge page)"
        )


def failed(failure: ChunkFailure, origin: int, place: str, settle: Callable[[], Settlement]) -> PopulateError:
    """Return the exception for the lowest page that failed.

    Args:
        failure: the page, and the error.
        origin: the address that offsets are counted from.
        place: continuation of ``offset 5`` in the message.
        settle: rolls back; called once the cause is known, since it changes what lies at the page.
    """
    address, segment, error = failure
    cause = error if isinstance(error, Shortfall) else diagnose(address, segment.method, error, segment.target.fd)
    settled = settle()
    offset = address - origin
    where = f"offset {offset} ({address:#x}){place}"
    # Other threads may have populated some of it behind the page that failed.
    done = f"{format_size(settled.brought_in_bytes)} populated in all{settled.rollback_text}"
    if isinstance(cause, Shortfall):
        message = f"stopped at {where}: for the next part {cause.sentence}; {done}"
        return cause.error(message, address=address, offset=offset, populated=settled.kept)
    result = cause.error(
        cause.errno, f"cannot populate the page at {where}: {cause.sentence}; {done}",
        address=address, offset=offset, populated=settled.kept,
    )  # fmt: skip
    result.__cause__ = error if isinstance(error, OSError) else None
    return result


def evicted(eviction: EvictedPages, origin: int, place: str, settled: Settlement) -> HeadroomError:
    """Return the exception for a call that populated all pages, of which the kernel evicted some for others.

    Args:
        eviction: the pages that are gone.
        origin: the address that offsets are counted from.
        place: continuation of ``offset 5`` in the message.
        settled: what the call brought in, gone or not.
    """
    address, _ = eviction.pages.span
    offset, there = address - origin, settled.kept - eviction.unmapped
    rest = settled.rollback_text or f", of which {format_size(there.length)} are there"
    return eviction.shortfall.error(
        f"{format_size(eviction.pages.length)} of {format_size(eviction.whole_bytes)} were evicted while the others came in,"
        f" the first at offset {offset} ({address:#x}){place}: {eviction.shortfall.sentence};"
        f" {format_size(settled.brought_in_bytes)} populated in all{rest}",
        address=address, offset=offset, populated=there,
    )  # fmt: skip


def interrupted(interruption: BaseException, origin: int, length: int, settled: Settlement) -> BaseException:
    """Return the exception for a call on ``length`` bytes that another exception ended.

    PopulateInterrupted for Ctrl-C, OutOfMemoryError for want of memory for Python objects; else the exception itself, with a
    note.
    """
    text = f"{format_size(settled.brought_in_bytes)} of {format_size(length)} populated{settled.rollback_text}"
    if isinstance(interruption, KeyboardInterrupt):
        return PopulateInterrupted(f"interrupted: {text}", settled.kept)
    if isinstance(interruption, MemoryError) and not interruption.args:
        failure = OutOfMemoryError(errno.ENOMEM, f"{NO_MEMORY}; {text}", address=origin, populated=settled.kept)
        failure.__cause__ = interruption.with_traceback(None)
        return failure
    interruption.add_note(f"populate was stopped: {text}")
    return interruption

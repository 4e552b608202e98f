"""Members of a call on many buffers: each borrowed, with its name and the pages that it touches, the pages of all once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault.errors import PopulateError
from prefault.intervals import Intervals
from prefault.memory.borrowing import Borrowed, borrow
from prefault.memory.collecting import Leaves, leaves_of
from prefault.memory.strides import touched_pages
from prefault.sizes import PAGE_SIZE, Size, format_size, parse_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from prefault.memory.many_exports import ManyExports

_MANY = 64
"""Buffers from which on they are borrowed together."""


class Member(NamedTuple):
    """One buffer of a call on many.

    Attributes:
        name: its key or index in the collection, as ``['layer1']['weight']``; empty for the only buffer of a call.
        memory: its borrowed memory.
        pages: base pages that hold one of its bytes, as addresses.
    """

    name: str
    memory: Borrowed
    pages: Intervals


class Members:
    """Buffers of a call on many, borrowed until :meth:`release`; a context manager.

    There are two kinds: those that were borrowed one by one, and those of a large collection that export their memory by the
    buffer protocol, which are rows of an array: a :class:`Member` of one of these is made only when it is asked for.
    """

    def __init__(self) -> None:
        self._singles: list[Member] = []
        self._many: ManyExports | None = None
        self._name_of: Callable[[int], str] = str

    @classmethod
    def of_one(cls, member: Member) -> Members:
        """Return the only member of a call, which the caller releases."""
        made = cls()
        made._singles.append(member)
        return made

    @classmethod
    def of_leaves(cls, leaves: Leaves) -> Members:
        """Borrow all leaves of a collection.

        Raises:
            TypeError, ValueError, BufferError: one of them cannot be borrowed; the message has its name.
        """
        made = cls()
        try:
            made._borrow(leaves)
        except BaseException:
            made.release()
            raise
        return made

    def _borrow(self, leaves: Leaves) -> None:
        rest: list[int] | range = range(len(leaves))
        if len(leaves) >= _MANY:
            # Imported here: most programs have no collections, or small ones.
            from prefault.memory.many_exports import ManyExports

            self._name_of = leaves.name
            self._many = ManyExports(leaves.values)
            rest = (~self._many.exported).nonzero()[0].tolist()
        for index in rest:
            try:
                memory = borrow(leaves.values[index])
            except (TypeError, ValueError, BufferError) as error:
                raise type(error)(f"{leaves.name(index)}: {error}") from error
            self._singles.append(Member(leaves.name(index), memory, Intervals()))
            if memory.access_guard is not None:
                raise TypeError(
                    f"{leaves.name(index)} is sparse memory, which is populated all or nothing: call its own methods"
                )
            self._singles[-1] = member_of(leaves.name(index), memory)

    def release(self) -> None:
        """Let the owners move or free their memory again. Idempotent, also in a child that is forked in the midst of it."""
        for member in self._singles:
            member.memory.release()
        if self._many is not None:
            self._many.release()
            self._many, self._name_of = None, str  # which knows the objects

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # --- their pages

    @property
    def pages(self) -> Intervals:
        """Base pages that hold a byte of any member, as addresses."""
        return Intervals.union_of(pages for _, _, pages in self.by_kind())

    def by_kind(self) -> Iterator[tuple[bool, bool, Intervals]]:
        """Yield the pages of members that are alike: whether read-only, and whether their owner asked for huge pages."""
        kinds: dict[tuple[bool, bool], list[Intervals]] = {}
        for _, memory, pages in self._singles:
            if pages:
                kinds.setdefault((memory.readonly, memory.huge), []).append(pages)
        if self._many is not None:
            for readonly in (False, True):
                some = (self._many.exported & (self._many.lengths > 0) & (self._many.readonly == readonly)).nonzero()[0]
                if len(some):
                    kinds.setdefault((readonly, False), []).append(self._pages_of(some))
        for (readonly, huge), each in kinds.items():
            yield readonly, huge, Intervals.union_of(each)

    @property
    def with_gaps(self) -> str | None:
        """The name of the first member whose items have gaps between them; None where there is none."""
        return next((member.name for member in self._singles if not member.memory.contiguous), None)

    def bytes_by_kind(self) -> Iterator[tuple[bool, Intervals]]:
        """Yield the bytes of the members that are read-only, and of the others, as addresses; none twice."""
        seen = Intervals()
        for readonly in (False, True):
            some = [memory for _, memory, _ in self._singles if memory.readonly == readonly]
            found = Intervals((memory.address, memory.address + memory.length) for memory in some)
            if self._many is not None:
                index = (self._many.exported & (self._many.lengths > 0) & (self._many.readonly == readonly)).nonzero()[0]
                starts = self._many.starts[index]
                found |= Intervals.from_arrays(starts, starts + self._many.lengths[index])
            yield readonly, found - seen
            seen |= found

    def within(self, start: int, stop: int) -> Iterator[Member]:
        """Yield the members that have a byte in the pages from ``start`` to ``stop``."""
        for member in self._singles:
            if member.pages.clipped(start, stop):
                yield member
        if self._many is not None:
            starts, lengths = self._many.starts, self._many.lengths
            begin, end = starts - starts % PAGE_SIZE, starts + lengths
            for index in (self._many.exported & (lengths > 0) & (begin < stop) & (end > start)).nonzero()[0].tolist():
                readonly = bool(self._many.readonly[index])
                memory = Borrowed(int(starts[index]), int(lengths[index]), readonly=readonly)
                yield member_of(self._name_of(index), memory)

    def _pages_of(self, indices: numpy.typing.NDArray[numpy.intp]) -> Intervals:
        assert self._many is not None
        starts, stops = self._many.starts[indices], (self._many.starts + self._many.lengths)[indices]
        return Intervals.from_arrays(starts - starts % PAGE_SIZE, stops + -stops % PAGE_SIZE)

    # --- names in errors

    def member_at(self, address: int) -> Member | None:
        """Return the last member by address that has a byte in the page at ``address``."""
        page = address - address % PAGE_SIZE
        return max(self.within(page, page + PAGE_SIZE), key=lambda member: member.memory.address, default=None)

    def place_of(self, address: int) -> tuple[int, str]:
        """Return the origin of the offset of a page, and which member that is in words."""
        member = self.member_at(address)
        if member is None:
            return 0, ""
        size = format_size(member.memory.length)
        return member.memory.address, f" of {member.name} ({size})" if member.name else f" of {size}"

    def name_in(self, error: PopulateError) -> None:
        """Have an error of another source, such as a device's driver, name the member, and count its offset from there."""
        member = self.member_at(error.address)
        if member is None or not member.name or member.name in str(error.strerror):
            return
        error.offset = error.address - member.memory.address
        error.strerror = f"{error.strerror} (in {member.name})"
        error.args = (error.errno, error.strerror)


def borrowed_collection(collection: Any, offset: Size, length: Size | None, error: TypeError) -> Members:
    """Borrow all buffers of a collection.

    Args:
        collection: see :func:`prefault.memory.collecting.leaves_of`.
        offset: must be 0.
        length: must be None.
        error: raised where ``collection`` is no collection.
    """
    leaves = leaves_of(collection)
    if leaves is None:
        raise error
    if length is not None or parse_size(offset):
        raise ValueError("offset and length are those of one buffer: a collection is taken in whole")
    return Members.of_leaves(leaves)


def member_of(name: str, memory: Borrowed, wanted: Intervals | None = None) -> Member:
    """Return a member for borrowed memory.

    Args:
        name: how errors call it.
        memory: borrowed.
        wanted: the addresses to populate; None: all of it.
    """
    whole = memory.address, memory.address + memory.length
    if memory.strides is not None:
        touched = touched_pages(memory.strides, whole)
        return Member(name, memory, touched if wanted is None else touched & wanted.outward(PAGE_SIZE))
    return Member(name, memory, (Intervals([whole]) if wanted is None else wanted).outward(PAGE_SIZE))

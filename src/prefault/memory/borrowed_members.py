"""Members of a call on many buffers: each borrowed, with its name and the pages that it touches, the pages of all once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from prefault.errors import PopulateError
from prefault.intervals import Intervals
from prefault.memory.borrowing import Borrowed, borrow
from prefault.memory.collecting import Leaf, leaves_of
from prefault.memory.strides import touched_pages
from prefault.sizes import PAGE_SIZE, Size, format_size, parse_size


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


@contextmanager
def borrowed_collection(
    collection: Any, offset: Size, length: Size | None, error: TypeError
) -> Iterator[list[Member]]:  # fmt: skip
    """Borrow all buffers of a collection while the block runs.

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
    with borrowed_members(leaves) as members:
        yield members


@contextmanager
def borrowed_members(leaves: Iterable[Leaf]) -> Iterator[list[Member]]:
    """Borrow all leaves of a collection while the block runs.

    Raises:
        TypeError, ValueError, BufferError: one of them cannot be borrowed; the message has its name.
    """
    with ExitStack() as stack:
        members = []
        for name, value in leaves:
            try:
                memory = stack.enter_context(borrow(value))
            except (TypeError, ValueError, BufferError) as error:
                raise type(error)(f"{name}: {error}") from error
            if memory.access_guard is not None:
                raise TypeError(f"{name} is sparse memory, which is populated all or nothing: call its own methods")
            members.append(member_of(name, memory))
        yield members


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


class MembersByAddress:
    """Members by address, to name the one that holds a page."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = sorted(members, key=lambda member: member.memory.address)
        self._starts = [member.memory.address - member.memory.address % PAGE_SIZE for member in self._members]

    def member_at(self, address: int) -> Member | None:
        """Return the last member by address that has a byte in the page at ``address``, or begins before it."""
        index = bisect_right(self._starts, address) - 1
        while index >= 0:
            if address in self._members[index].pages:
                return self._members[index]
            index -= 1
        return None

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

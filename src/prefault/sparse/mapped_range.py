"""The mapping behind a sparse memory: made from a backing or of a device's pages, with its protection and access guard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from prefault._kernel import mman
from prefault.engine.discarding import drop
from prefault.engine.methods import Target, best
from prefault.mapping.mapping import HugeAdvice, OwnedMemory
from prefault.memory.backings import BackingSource, OpenedBacking
from prefault.memory.vma import Backing, vma_at
from prefault.sizes import MIB, PAGE_SIZE
from prefault.sparse.accounting import Accounting
from prefault.sparse.device_blocks import DeviceSource
from prefault.sparse.layout import Layout, ensure_length, lay_out
from prefault.sparse.operations import SparseAccessGuard
from prefault.sparse.protection import BlockProtection

ACCESSIBLE = mman.PROT_READ | mman.PROT_WRITE


class Requested(NamedTuple):
    """Size, reservation, block and huge pages as the caller asked for them, in bytes; None: chosen by the backing."""

    size: int | None
    reservation: int | None
    block: int | None
    huge: HugeAdvice


class MappedRange(NamedTuple):
    """A mapped reservation.

    Attributes:
        memory: owner of the mapping.
        layout: block, size and reservation.
        page_size: bytes in a page of the backing or the device.
        shared: MAP_SHARED.
        faults: mapped PROT_NONE: every block is protected.
        merges: the kernel joins parts of equal protection again (not those of hugetlb).
        given: the file behind it is the caller's; nothing is taken from it on a disk.
        require_here: raises DeviceGoneError in a child of fork, which has no memory of a device; None for a backing.
    """

    memory: OwnedMemory
    layout: Layout
    page_size: int
    shared: bool
    faults: bool
    merges: bool
    given: bool
    require_here: Callable[[], None] | None


def map_backing(source: BackingSource, shared: bool, requested: Requested, *, faults: bool) -> MappedRange:
    """Map a reservation of a backing. Nothing is left behind by an error: see :class:`~prefault.SparseMemory`."""
    memory = OwnedMemory()
    try:
        opener = source.when_shared if shared else source  # a memfd can be punched while its blocks are protected
        opened = opener.open(memory.descriptors, requested.size, writable=shared)
        layout = lay_out(source, opened, *requested)
        if opened.fd is not None:
            ensure_length(source, opened.fd, opened.offset, layout.size, opened.page_size)
        memory.map(
            layout.reservation, opened, shared=shared, prot=mman.PROT_NONE if faults else ACCESSIBLE,
            huge=layout.huge, noreserve=True,
        )  # fmt: skip
        merges = opened.page_size == PAGE_SIZE
        mapped = MappedRange(memory, layout, opened.page_size, shared, faults, merges, source.is_given, None)
        return _hide_rest(mapped)
    except BaseException:
        memory.unmap()
        raise


def map_device(
    device: DeviceSource, offset: int, name: str | None, requested: Requested, *, faults: bool
) -> MappedRange:  # fmt: skip
    """Map a reservation of a device's pages, or of those of the object of that name."""
    opened = OpenedBacking(None, device.page_size, offset)
    # Without a size it is all of the device or the object, whose length the mapping tells.
    length = None if requested.size is None else lay_out(device, opened, *requested).reservation
    memory, mapped, huge, require_here = device.map_range(length, offset, name)
    try:
        layout = lay_out(device, opened._replace(size=mapped), *requested)
        if layout.reservation > memory.mapped:
            raise ValueError(
                f"{device.name} has {memory.mapped} bytes from there on, which are fewer than the reservation, or not whole"
                f" blocks of {layout.block} bytes: say how many bytes"
            )
        if faults:
            mman.mprotect(memory.address, memory.mapped, mman.PROT_NONE)
        return _hide_rest(MappedRange(memory, layout, device.page_size, True, faults, not huge, True, require_here))
    except BaseException:
        memory.unmap()
        raise


def _hide_rest(mapped: MappedRange) -> MappedRange:
    """Make the part of a reservation beyond its size inaccessible."""
    layout = mapped.layout
    if not mapped.faults and layout.reservation > layout.size:
        mman.mprotect(mapped.memory.address + layout.size, layout.reservation - layout.size, mman.PROT_NONE)
    return mapped


def make_guard(mapped: MappedRange, accounting: Accounting | None) -> SparseAccessGuard:
    """Return the access guard of a reservation."""
    memory, block = mapped.memory, mapped.layout.block
    protection = _protection(mapped) if mapped.faults else None
    if mapped.require_here is not None:
        return SparseAccessGuard(memory.address, block, protection, accounting, inherited=False)
    vma = vma_at(memory.address)
    assert vma is not None
    on_disk = vma.backing is Backing.FILE
    return SparseAccessGuard(
        memory.address, block, protection, accounting, file_offset=memory.file_offset,
        memory_file=memory.fd if mapped.shared and not on_disk else None,
        scratch_file=memory.fd if mapped.shared and on_disk and not mapped.given else None,
    )  # fmt: skip


def _protection(mapped: MappedRange) -> BlockProtection:
    address, layout = mapped.memory.address, mapped.layout
    if mapped.merges and not mapped.shared:
        # Give all of the mapping one anon_vma. Parts that get one each, at their first fault, are never joined again.
        mman.mprotect(address, PAGE_SIZE, ACCESSIBLE)
        with contextlib.suppress(OSError):  # no memory: it is for the sake of fewer mappings only
            best("write", allocate=False).run(address, PAGE_SIZE, Target())
        mman.mprotect(address, PAGE_SIZE, mman.PROT_NONE)
    protection = BlockProtection(address, layout.reservation, layout.block, merges=mapped.merges)
    if mapped.merges:
        # With the page goes its page table (since Linux 6.14), which would keep a huge page out.
        drop(address, min(layout.reservation, 2 * MIB))
    return protection

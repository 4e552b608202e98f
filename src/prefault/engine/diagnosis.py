"""Cause of a failure to populate a page: the kernel returns EINVAL, EFAULT or ENOMEM; the mapping there tells why."""

import contextlib
import errno
import os
from typing import NamedTuple

from prefault import errors
from prefault._kernel import pagemap
from prefault._kernel._call import explain
from prefault._kernel.mman import EHWPOISON
from prefault._system import proc
from prefault.engine.methods import Access, Method
from prefault.inspection.result import PageState
from prefault.inspection.scan import residency_of
from prefault.limits.limit import FILE_BOUNDS
from prefault.limits.memory_use import use_of_vma
from prefault.limits.process_limits import lock_refusal
from prefault.limits.table import limits_on
from prefault.memory.vma import Backing, Vma, file_size, vm_flags, vma_at
from prefault.ranges import PageRange
from prefault.sizes import PAGE_SIZE


class Cause(NamedTuple):
    """Error class of a failure, the errno that MADV_POPULATE_* gives for it, and a sentence."""

    error: type[errors.PopulateError]
    errno: int
    sentence: str


# madvise has one errno for several causes, and the fallbacks have EFAULT for all of them. Only these errnos are unambiguous.
_UNAMBIGUOUS = (EHWPOISON, errno.ENOSPC, errno.EDQUOT)


def diagnose(address: int, method: Method, error: OSError, fd: int | None) -> Cause:
    """Return the cause of ``error`` at the page at ``address``; ``fd`` is the file behind it, if the caller has one."""
    vma = vma_at(address)
    if vma is None or vma.start > address:
        return Cause(
            errors.HoleError, errno.ENOMEM,
            "nothing is mapped there: map it first (mmap), or populate only what is mapped, by offset= and length=",
        )  # fmt: skip
    number = error.errno or 0
    if number in (errno.EMFILE, errno.ENFILE):
        return Cause(errors.PopulateError, number, f"the method needs a descriptor of its own: {explain(number)}")
    if number in _UNAMBIGUOUS:
        return _by_errno(number, vma, fd)
    if method.locks and number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        return Cause(errors.OutOfMemoryError, number, f"it cannot be locked: {lock_refusal()}")
    if number == errno.ENOMEM:
        return Cause(
            errors.OutOfMemoryError, number,
            "the kernel found no memory for the page or its page table: free some, or raise the memory limit",
        )  # fmt: skip
    return (
        _by_protection(vma, method.access, address)
        or _by_page(address)
        or _by_file(vma, address, fd)
        or _by_backing(vma, fd)
        or _unexplained(vma, address, number)
    )


def _by_errno(number: int, vma: Vma, fd: int | None) -> Cause:
    if number == EHWPOISON:
        return Cause(errors.PoisonedPageError, number, "the page is hardware-poisoned, and its content is lost")
    if number == errno.EDQUOT:
        return Cause(errors.BackingFullError, number, f"the disk quota for {vma.name} is used up")
    full = _by_backing(vma, fd)
    sentence = full.sentence if full is not None else f"no space is left behind {vma.describe()}"
    return Cause(errors.BackingFullError, number, sentence)


def _by_protection(vma: Vma, access: Access, address: int) -> Cause | None:
    flags = vm_flags(vma.start)
    if flags & {"io", "pf"} or vma.name.startswith("/secretmem"):
        return Cause(
            errors.SpecialMappingError, errno.EINVAL,
            f"{vma.name or 'the mapping'} is device or secret memory, which the kernel does not populate",
        )  # fmt: skip
    if not (vma.readable if access == "read" else vma.writable):
        return Cause(errors.ProtectionError, errno.EINVAL, _missing_permission(vma, access))
    if flags & {"um", "ui"} and not _looks_swapped(address):
        return Cause(
            errors.PopulateError, errno.EFAULT,
            "the memory is registered with userfaultfd, and its handler did not or may not supply the page"
            " (UFFD_USER_MODE_ONLY)",
        )  # fmt: skip
    return None


def _missing_permission(vma: Vma, access: Access) -> str:
    if not vma.readable and not vma.writable:
        return (
            "the mapping may be neither read nor written (PROT_NONE): permit it first (mprotect), or leave these pages out"
        )
    if access == "write":
        return "the mapping is not writable (PROT_WRITE is missing): populate it with access='read', or permit it (mprotect)"
    return "the mapping is not readable (PROT_READ is missing): populate it with access='write', or permit it (mprotect)"


def _by_page(address: int) -> Cause | None:
    found = residency_of(PageRange(address, address + PAGE_SIZE))
    if any(run.state & PageState.GUARD for run in found.runs):
        return Cause(
            errors.GuardPageError, errno.EFAULT,
            "the page is a guard region (MADV_GUARD_INSTALL), made to fail: leave it out, or remove the guard first"
            " (MADV_GUARD_REMOVE)",
        )  # fmt: skip
    return None


def _by_file(vma: Vma, address: int, fd: int | None) -> Cause | None:
    if not vma.inode:
        return None
    size = os.fstat(fd).st_size if fd is not None else file_size(vma)
    offset = vma.file_offset + address - vma.start
    if size is None or offset < size:
        return None
    return Cause(
        errors.BeyondEndError, errno.EFAULT,
        f"the page lies at offset {offset} of {vma.name or 'the file'}, which ends at {size}: touching it is a SIGBUS;"
        " make the file longer or populate less",
    )  # fmt: skip


def _by_backing(vma: Vma, fd: int | None) -> Cause | None:
    """Return the limit on the backing that leaves no page; for huge pages, which have no other cause, the tightest."""
    use = use_of_vma(vma, fd)
    limits = []
    with contextlib.suppress(OSError):  # no descriptor is left to read them with
        limits = [limit for limit in limits_on(use.named() if vma.inode else use) if limit.bounds in FILE_BOUNDS]
    short = min(limits, key=lambda limit: limit.available_bytes, default=None)
    if short is None or (vma.backing is not Backing.HUGETLB and short.available_bytes >= PAGE_SIZE):
        return None
    return Cause(
        errors.BackingFullError, errno.EFAULT,
        short.advice,
    )  # fmt: skip


def _unexplained(vma: Vma, address: int, number: int) -> Cause:
    entry = ""
    if number == errno.EFAULT and _looks_swapped(address):
        # The fallbacks get EFAULT from GUP for a poisoned page, and for swap that cannot be read.
        entry = " (its page-table entry is neither empty nor present: poisoned, or in swap that cannot be read)"
    return Cause(errors.PopulateError, number, f"the kernel could not supply the page of {vma.describe()}{entry}")


def _looks_swapped(address: int) -> bool:
    with contextlib.suppress(OSError), proc.opened_proc("/proc/self/pagemap") as fd:
        return bool(int.from_bytes(pagemap.read_pagemap(fd, address // PAGE_SIZE, 1), "little") & pagemap.PM_SWAP)
    return False

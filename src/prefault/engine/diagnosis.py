"""Why a page could not be populated: the kernel says EINVAL, EFAULT or ENOMEM; what is mapped there tells the cause."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from typing import NamedTuple

from prefault import errors
from prefault._kernel import pagemap
from prefault._kernel._call import explain
from prefault._kernel.mman import EHWPOISON
from prefault._system import hugetlb, proc
from prefault.engine.methods import Access, Method
from prefault.inspection.scan import PageState, residency_of
from prefault.memory.vma import Backing, Vma, file_size, mount_directory, vm_flags, vma_at
from prefault.ranges import PageRange
from prefault.sizes import PAGE_SIZE, format_size


class Cause(NamedTuple):
    """The error class, the errno that MADV_POPULATE_* gives for it, and a sentence."""

    error: type[errors.PopulateError]
    errno: int
    sentence: str


# madvise has one errno for several causes, and the fallbacks have EFAULT for all of them. These say something by themselves.
_TELLING = {
    EHWPOISON: errors.PoisonedPageError,
    errno.ENOSPC: errors.BackingFullError,
    errno.EDQUOT: errors.BackingFullError,
}


def diagnose(address: int, method: Method, error: OSError, fd: int | None) -> Cause:
    """The cause of ``error`` at the page at ``address``; ``fd`` is the file behind it, where the caller has one."""
    vma = vma_at(address)
    if vma is None or vma.start > address:
        return Cause(
            errors.HoleError, errno.ENOMEM,
            "nothing is mapped there: map it first (mmap), or populate only what is mapped, by offset= and length=",
        )  # fmt: skip
    number = error.errno or 0
    if number in (errno.EMFILE, errno.ENFILE):
        return Cause(errors.PopulateError, number, f"the method needs a descriptor of its own: {explain(number)}")
    if number in _TELLING:
        return _telling(number, vma, fd)
    if method.locks and number in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "no limit" if limit == resource.RLIM_INFINITY else format_size(limit)
        return Cause(
            errors.OutOfMemoryError, number,
            f"it cannot be locked: RLIMIT_MEMLOCK is {allowed} for all locked memory of this process (ulimit -l)",
        )  # fmt: skip
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


def _telling(number: int, vma: Vma, fd: int | None) -> Cause:
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
    if vma.backing is Backing.HUGETLB:
        pool = hugetlb.read_pool(vma.page_size)
        return Cause(
            errors.BackingFullError, errno.EFAULT,
            f"the pool of {format_size(vma.page_size)} huge pages has {pool.available} of {pool.total} pages left"
            f" (write a larger number to {pool.setting}, or raise a hugetlb cgroup limit)",
        )  # fmt: skip
    if not vma.inode:
        return None
    with contextlib.suppress(OSError):
        # By the mount, not the name: files in memory are often unlinked as soon as they are mapped.
        space = os.fstatvfs(fd) if fd is not None else os.statvfs(mount_directory(vma) or vma.name)
        free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
        if total and free < PAGE_SIZE:
            where = vma.name or "the file system"
            return Cause(
                errors.BackingFullError, errno.EFAULT,
                f"the file system of {where} has {format_size(free)} left of {format_size(total)}:"
                " make it larger, or remove files",
            )  # fmt: skip
    return None


def _unexplained(vma: Vma, address: int, number: int) -> Cause:
    entry = ""
    if number == errno.EFAULT and _looks_swapped(address):
        # What the fallbacks see of a poisoned page, or of swap that cannot be read: GUP says EFAULT for both.
        entry = " (its page-table entry is neither empty nor present: poisoned, or in swap that cannot be read)"
    return Cause(errors.PopulateError, number, f"the kernel could not supply the page of {vma.describe()}{entry}")


def _looks_swapped(address: int) -> bool:
    try:
        fd = proc.open_proc("/proc/self/pagemap")
    except OSError:
        return False
    try:
        entry = int.from_bytes(pagemap.read_pagemap(fd, address // PAGE_SIZE, 1), "little")
    finally:
        os.close(fd)
    return bool(entry & pagemap.PM_SWAP)

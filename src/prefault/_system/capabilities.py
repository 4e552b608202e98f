"""Capabilities of this kernel: probed by doing, cached, explained.

The release number is no evidence: distributions backport, containers filter system calls. Each capability is a small object
with its probe and the Linux version that first has it; ``prefault doctor`` prints them all.

The environment variable ``PREFAULT_WITHOUT`` (names, separated by commas) and :func:`prefault.testing.without` make the
package behave as on a kernel that lacks them.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import addressof, sizeof

from prefault._kernel import cachestat as _cachestat
from prefault._kernel import futex, memfd, mempolicy, mman, pagemap, procmap, uio
from prefault._system import fork_hooks, hugetlb, proc
from prefault.sizes import PAGE_SIZE

disabled: set[str] = {name.strip() for name in os.environ.get("PREFAULT_WITHOUT", "").split(",")} - {""}
"""Names of capabilities that are treated as missing."""

# Answers of a kernel without the feature, of a seccomp filter, and to a missing privilege. Others are defects of a probe.
_REFUSALS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.ENOENT,
    errno.ENODEV,
    errno.ENOMEM,
    errno.EBADF,
    errno.ESRCH,
}


_MEANINGS = {
    errno.ENOSYS: "this kernel has no such system call, or a sandbox hides it",
    errno.EINVAL: "this kernel does not know it",
    errno.ENOTTY: "this kernel does not know it",
    errno.EOPNOTSUPP: "this kernel does not know it",
    errno.EPERM: "this process lacks the privilege, or a sandbox forbids it",
    errno.EACCES: "this process lacks the privilege, or a sandbox forbids it",
}


def _in_plain_words(error: OSError) -> str:
    """Explain a refusal without its errno number; a probe that explains its error itself is quoted."""
    text = error.strerror or str(error)
    if error.filename is not None:
        text = f"{error.filename}: {text}"
    meaning = _MEANINGS.get(error.errno or 0)
    return f"{text} ({meaning})" if meaning and text.endswith(os.strerror(error.errno or 0)) else text


class Capability:
    """One thing that a kernel can or cannot do for this process."""

    def __init__(self, name: str, since: str, question: str, probe: Callable[[], None]) -> None:
        """``probe`` does the thing and raises OSError where it is refused."""
        self.name = name
        self.since = since
        self.question = question
        self._probe = probe
        self._answer: OSError | bool | None = None
        # Reentrant: a signal handler may ask in the middle of a probe.
        self._lock = threading.RLock()

    @property
    def available(self) -> bool:
        """True if the kernel offers the feature to this process, and it is not switched off."""
        answer = self._answer
        if answer is None:
            answer = self._ask()
        return answer is True and self.name not in disabled

    @property
    def refusal(self) -> str | None:
        """The reason why it is not available, in a few words; None where it is."""
        if self.available:
            return None
        if self.name in disabled:
            return "switched off by PREFAULT_WITHOUT or a test"
        answer = self._ask()
        return _in_plain_words(answer) if isinstance(answer, OSError) else None

    def _ask(self) -> OSError | bool:
        with self._lock:
            if self._answer is not None:
                return self._answer
            try:
                self._probe()
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                # It is kept: asked inside of an `except`, it would keep alive what the caller works on.
                error.__context__ = None
                if error.errno != errno.ENOMEM:  # which may pass
                    self._answer = error.with_traceback(None)
                return error.with_traceback(None)
            self._answer = True
            return True

    def forget(self) -> None:
        """Drop the cached answer: the next use probes again."""
        self._answer, self._lock = None, threading.RLock()

    def __repr__(self) -> str:
        return f"Capability({self.name!r}, available={self.available})"


@contextmanager
def _page(flags: int = 0) -> Iterator[int]:
    """Map a private anonymous page; yield its address."""
    address = mman.mmap(0, PAGE_SIZE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | flags)
    try:
        yield address
    finally:
        mman.munmap(address, PAGE_SIZE)


def _populate() -> None:
    # On a real page: some vendor kernels give 23 another meaning, which madvise(0, 0, 23) would not tell.
    # Checked with mincore, which for private memory looks at the page table, and needs no /proc.
    with _page() as address:
        mman.madvise(address, PAGE_SIZE, mman.MADV_POPULATE_WRITE)
        if not mman.mincore(address, PAGE_SIZE)[0] & 1:
            raise OSError(errno.EINVAL, "advice 23 succeeds, but the page is not present: it means something else here")
        mman.madvise(address, PAGE_SIZE, mman.MADV_POPULATE_READ)


def _process_madvise() -> None:
    with _page() as address:
        pidfd = os.pidfd_open(os.getpid())
        try:
            mman.process_madvise(pidfd, [(address, PAGE_SIZE)], mman.MADV_POPULATE_WRITE)
        finally:
            os.close(pidfd)


def _pagemap() -> None:
    with _page() as address, proc.opened_proc("/proc/self/pagemap") as fd:
        pagemap.read_pagemap(fd, address // PAGE_SIZE, 1)


def _scan_for(fd: int, address: int, category: pagemap.PageCategory) -> None:
    region = pagemap.PageRegion()
    argument = pagemap.PmScanArg(sizeof(pagemap.PmScanArg), 0, address, address + PAGE_SIZE)
    argument.vec, argument.vec_len = addressof(region), 1
    argument.category_anyof_mask = argument.return_mask = category
    pagemap.pagemap_scan(fd, argument)


def _pagemap_scan() -> None:
    with _page() as address, proc.opened_proc("/proc/self/pagemap") as fd:
        _scan_for(fd, address, pagemap.PageCategory.PRESENT)


def _page_is_guard() -> None:
    with _page() as address, proc.opened_proc("/proc/self/pagemap") as fd:
        _scan_for(fd, address, pagemap.PageCategory.GUARD)


def _soft_dirty() -> None:
    with _page() as address, proc.opened_proc("/proc/self/pagemap") as fd:
        futex.futex_add_zero(address)
        entry = int.from_bytes(pagemap.read_pagemap(fd, address // PAGE_SIZE, 1), "little")
        # A kernel with soft-dirty bits sets them on every page of a new mapping.
        if not entry & pagemap.PM_SOFT_DIRTY:
            raise OSError(errno.EOPNOTSUPP, "a freshly written page is not soft-dirty: CONFIG_MEM_SOFT_DIRTY is off")


def _procmap_query() -> None:
    with _page() as address, proc.opened_proc("/proc/self/maps") as fd:
        procmap.procmap_query(fd, procmap.ProcmapQuery(sizeof(procmap.ProcmapQuery), 0, address))


def _map_files() -> None:
    line = next(line for line in proc.read_maps() if line.inode)
    os.stat(f"/proc/self/map_files/{line.start:x}-{line.end:x}")


def _cachestat_call() -> None:
    fd = memfd.memfd_create("prefault-probe")
    try:
        _cachestat.cachestat(fd)
    finally:
        os.close(fd)


def _process_vm_readv() -> None:
    with _page() as address:
        vector = mman.IoVec(address, 1)
        local = mman.IoVec(address, 1)
        uio.process_vm_readv(os.getpid(), addressof(local), 1, addressof(vector), 1)


def _futex_add() -> None:
    with _page() as address:
        futex.futex_add_zero(address)


def _mlock_onfault() -> None:
    with _page() as address:
        mman.mlock2(address, PAGE_SIZE, mman.MLOCK_ONFAULT)


def _dontneed_locked() -> None:
    with _page() as address:
        mman.mlock2(address, PAGE_SIZE)
        mman.madvise(address, PAGE_SIZE, mman.MADV_DONTNEED_LOCKED)


def _guard_regions() -> None:
    with _page() as address:
        mman.madvise(address, PAGE_SIZE, mman.MADV_GUARD_INSTALL)


def _collapse() -> None:
    # No byte: on a page it would depend on what is populated, and on the kernel's finding 2 MiB.
    with _page() as address:
        mman.madvise(address, 0, mman.MADV_COLLAPSE)


def _mbind() -> None:
    with _page() as address:
        mempolicy.mbind(address, PAGE_SIZE, *mempolicy.get_mempolicy(address))


def _nodes_of_pages() -> None:
    with _page() as address:
        mempolicy.nodes_of_pages(array("Q", [address]))


def _huge_pages() -> None:
    sizes = hugetlb.page_sizes()
    if not sizes:
        raise OSError(errno.ENOENT, "no hugetlb pools in /sys/kernel/mm/hugepages: not in this kernel, or /sys is hidden")
    if not any(hugetlb.read_pool(size).total for size in sizes):
        raise OSError(errno.ENOMEM, "every hugetlb pool is empty (vm.nr_hugepages = 0)")


def _memory_cgroup() -> None:
    from prefault._system import cgroups

    if not cgroups.directories("memory"):
        raise OSError(errno.ENOENT, "no memory cgroup hierarchy is mounted")


@contextmanager
def _userfaultfd(features: int = 0) -> Iterator[int]:
    from prefault._kernel import userfaultfd

    fd = _any_userfaultfd()
    try:
        userfaultfd.api(fd, features)
        yield fd
    finally:
        os.close(fd)


def _any_userfaultfd() -> int:
    from prefault._kernel import userfaultfd

    try:
        return userfaultfd.userfaultfd(os.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
            raise
        refusal = error
    # EINVAL: before Linux 5.11 there is no such flag. Else a sandbox hides the call, and may pass the device through.
    try:
        return _privileged_userfaultfd()
    except OSError:
        raise refusal from None


def _privileged_userfaultfd() -> int:
    from prefault._kernel import userfaultfd

    try:
        return userfaultfd.userfaultfd_from_device(os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return userfaultfd.userfaultfd(os.O_CLOEXEC)


def _userfaultfd_call() -> None:
    from prefault._kernel import userfaultfd

    with _userfaultfd() as fd, _page() as address:
        userfaultfd.register(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_REGISTER_MODE_MISSING)


def _uffd_kernel_faults() -> None:
    os.close(_privileged_userfaultfd())


@contextmanager
def _shared_page() -> Iterator[int]:
    """Map a page of a memfd that the file has and the page table does not; yield its address."""
    fd = memfd.memfd_create("prefault-probe")
    try:
        os.pwrite(fd, b"x" * PAGE_SIZE, 0)
        address = mman.mmap(0, PAGE_SIZE, mman.PROT_READ | mman.PROT_WRITE, mman.MAP_SHARED, fd)
    finally:
        os.close(fd)
    try:
        yield address
    finally:
        mman.munmap(address, PAGE_SIZE)


def _uffd_minor_shmem() -> None:
    from prefault._kernel import userfaultfd

    with _userfaultfd(userfaultfd.UffdFeature.MINOR_SHMEM) as fd, _shared_page() as address:
        userfaultfd.register(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_REGISTER_MODE_MINOR)
        userfaultfd.continue_(fd, address, PAGE_SIZE)


def _uffd_wp_shmem() -> None:
    from prefault._kernel import userfaultfd

    with _userfaultfd(userfaultfd.UffdFeature.WP_HUGETLBFS_SHMEM) as fd, _shared_page() as address:
        userfaultfd.register(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        userfaultfd.writeprotect(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)


def _uffd_poison() -> None:
    from prefault._kernel import userfaultfd

    with _userfaultfd(userfaultfd.UffdFeature.POISON) as fd, _page() as address:
        userfaultfd.register(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_REGISTER_MODE_MISSING)
        userfaultfd.poison(fd, address, PAGE_SIZE)


def _uffd_wp_async() -> None:
    from prefault._kernel import userfaultfd

    features = userfaultfd.UffdFeature.WP_ASYNC | userfaultfd.UffdFeature.WP_UNPOPULATED
    with _userfaultfd(features) as fd, _shared_page() as address:
        userfaultfd.register(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        userfaultfd.writeprotect(fd, address, PAGE_SIZE, userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)
        futex.futex_add_zero(address)  # would be refused with EFAULT if it had to wait for an answer


MADV_POPULATE = Capability("madv_populate", "5.14", "MADV_POPULATE_WRITE and _READ on a private page", _populate)
PROCESS_MADVISE = Capability(
    "process_madvise", "6.13", "process_madvise on this process with MADV_POPULATE_WRITE", _process_madvise
)
PAGEMAP = Capability("pagemap", "2.6.25", "reading /proc/self/pagemap", _pagemap)
PAGEMAP_SCAN = Capability("pagemap_scan", "6.7", "ioctl(PAGEMAP_SCAN) on a private page", _pagemap_scan)
PAGE_IS_GUARD = Capability("page_is_guard", "6.15", "PAGEMAP_SCAN for PAGE_IS_GUARD", _page_is_guard)
SOFT_DIRTY = Capability("soft_dirty", "3.11", "the soft-dirty bit of a page that was just written", _soft_dirty)
PROCMAP_QUERY = Capability("procmap_query", "6.11", "ioctl(PROCMAP_QUERY) on /proc/self/maps", _procmap_query)
MAP_FILES = Capability("map_files", "3.3", "stat of a file in /proc/self/map_files (CAP_CHECKPOINT_RESTORE)", _map_files)
CACHESTAT = Capability("cachestat", "6.5", "cachestat on a memfd", _cachestat_call)
PROCESS_VM_READV = Capability("process_vm_readv", "3.2", "process_vm_readv of one byte of this process", _process_vm_readv)
FUTEX_ADD = Capability("futex_add", "2.6.14", "FUTEX_WAKE_OP adding 0 to a word", _futex_add)
MLOCK_ONFAULT = Capability("mlock_onfault", "4.4", "mlock2(MLOCK_ONFAULT) of one page", _mlock_onfault)
DONTNEED_LOCKED = Capability("madv_dontneed_locked", "5.18", "MADV_DONTNEED_LOCKED on a locked page", _dontneed_locked)
GUARD_REGIONS = Capability("guard_regions", "6.13", "MADV_GUARD_INSTALL on a private page", _guard_regions)
MADV_COLLAPSE = Capability("madv_collapse", "6.1", "MADV_COLLAPSE of no byte", _collapse)
MBIND = Capability("mbind", "2.6.7", "get_mempolicy and mbind of a private page", _mbind)
MOVE_PAGES = Capability("move_pages", "2.6.18", "move_pages for the node of a private page", _nodes_of_pages)
HUGE_PAGES = Capability("hugetlb_pages", "2.6", "a hugetlb pool that is not empty", _huge_pages)
MEMORY_CGROUP = Capability("memory_cgroup", "2.6.25", "the directory of this process' memory cgroup", _memory_cgroup)
USERFAULTFD = Capability("userfaultfd", "4.3", "userfaultfd on a private page, for faults in user mode", _userfaultfd_call)
UFFD_KERNEL_FAULTS = Capability(
    "uffd_kernel_faults",
    "4.3",
    "userfaultfd for faults in kernel mode as well (or /dev/userfaultfd)",
    _uffd_kernel_faults,
)
UFFD_MINOR_SHMEM = Capability("uffd_minor_shmem", "5.14", "UFFDIO_CONTINUE of a page that a memfd has", _uffd_minor_shmem)
UFFD_WP_SHMEM = Capability("uffd_wp_shmem", "5.19", "UFFDIO_WRITEPROTECT of a page of a memfd", _uffd_wp_shmem)
UFFD_POISON = Capability("uffd_poison", "6.6", "UFFDIO_POISON of a private page", _uffd_poison)
UFFD_WP_ASYNC = Capability(
    "uffd_wp_async", "6.7", "a write to a protected page that the kernel records by itself", _uffd_wp_async
)

ALL: tuple[Capability, ...] = (
    MADV_POPULATE,
    PROCESS_MADVISE,
    PAGEMAP,
    PAGEMAP_SCAN,
    PAGE_IS_GUARD,
    SOFT_DIRTY,
    PROCMAP_QUERY,
    MAP_FILES,
    CACHESTAT,
    PROCESS_VM_READV,
    FUTEX_ADD,
    MLOCK_ONFAULT,
    DONTNEED_LOCKED,
    GUARD_REGIONS,
    MADV_COLLAPSE,
    MBIND,
    MOVE_PAGES,
    HUGE_PAGES,
    MEMORY_CGROUP,
    USERFAULTFD,
    UFFD_KERNEL_FAULTS,
    UFFD_MINOR_SHMEM,
    UFFD_WP_SHMEM,
    UFFD_POISON,
    UFFD_WP_ASYNC,
)
"""Every capability that this package asks about."""


def _forget_answers() -> None:
    """Drop all answers in a forked child: it may drop privileges, and a lock may be held by a thread that it lacks."""
    for capability in ALL:
        capability.forget()


fork_hooks.register(in_child=_forget_answers)

_unknown = disabled - {capability.name for capability in ALL}
if _unknown:
    warnings.warn(f"PREFAULT_WITHOUT names no capability by {', '.join(sorted(_unknown))}", stacklevel=2)

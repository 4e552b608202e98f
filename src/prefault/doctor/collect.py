"""Collect the record: each source is read on its own, and one that cannot be read is unknown, with the reason."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prefault._kernel import mman, userfaultfd
from prefault._system import capabilities, cgroups, hugetlb, proc, thp
from prefault._system.cpus import quota_files, read_quota, usable_cpus
from prefault._system.machine_identity import identify_machine, read_fields
from prefault._system.meminfo import read_meminfo
from prefault._system.memory_cgroups import BOUND_FILES
from prefault._system.proactive_reclaim import proactive_reclaimers
from prefault._version import __version__
from prefault.doctor.record import NOT_MOUNTED, CapabilityAnswer, MachineFacts, Reading, Record, Unit
from prefault.doctor.words import MEANINGS, WITHOUT
from prefault.sizes import PAGE_SIZE

_THP = "/sys/kernel/mm/transparent_hugepage"
_SHM = "/dev/shm"

# What a file that is missing, hidden by a container or of an unexpected form gives.
_UNREADABLE = (OSError, ValueError, KeyError)


def collect() -> Record:
    """Collect the record of this machine and this process. Nothing is changed."""
    return Record(_machine(), tuple(_capabilities()), tuple(_settings()), tuple(_pools()), tuple(_limits()))


def _reading(name: str, unit: Unit, source: str, read: Callable[[], int | float | str | None]) -> Reading:
    try:
        return Reading(name, read(), unit, source)
    except _UNREADABLE as error:
        return Reading(name, None, unit, source, unknown=_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"no {error}" if isinstance(error, KeyError) else f"cannot be understood: {error}"


# --- machine and capabilities


def _machine() -> MachineFacts:
    machine = identify_machine()
    seccomp = read_fields("/proc/self/status").get("Seccomp")
    return MachineFacts(
        kernel=machine.release,
        architecture=machine.architecture,
        cpu_model=machine.cpu_model,
        hypervisor=machine.hypervisor,
        page_size=PAGE_SIZE,
        python=machine.python,
        prefault=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        user_id=os.geteuid(),
        seccomp=int(seccomp) if seccomp is not None and seccomp.isdigit() else None,
    )


def _capabilities() -> Iterator[CapabilityAnswer]:
    for each in capabilities.ALL:
        yield CapabilityAnswer(
            each.name, each.available, each.question, each.since, each.refusal, WITHOUT.get(each.name, "")
        )


# --- huge pages


def _settings() -> Iterator[Reading]:
    pmd = f"hugepages-{(_pmd_size() or 0) // 1024}kB"
    files: tuple[tuple[str, Unit, str], ...] = (
        ("enabled", "word", "enabled"),
        ("enabled_pmd", "word", f"{pmd}/enabled"),
        ("shmem_enabled", "word", "shmem_enabled"),
        ("shmem_enabled_pmd", "word", f"{pmd}/shmem_enabled"),
        ("defrag", "word", "defrag"),
        ("use_zero_page", "flag", "use_zero_page"),
        ("pmd_size", "bytes", "hpage_pmd_size"),
    )
    for name, unit, file in files:
        yield _setting(name, unit, f"{_THP}/{file}", partial(_thp_setting, file, unit))
    yield _setting("process", "flag", "/proc/self/status: THP_enabled", _thp_of_process)
    yield _setting("dev_shm_huge", "word", f"/proc/self/mountinfo: {_SHM}", _huge_option_of_shm)


def _setting(name: str, unit: Unit, source: str, read: Callable[[], int | float | str | None]) -> Reading:
    found = _reading(name, unit, source, read)
    meaning = MEANINGS.get(name, {}).get(found.value) if isinstance(found.value, int | str) else None
    return Reading(found.name, found.value, found.unit, found.source, found.unknown, meaning)


def _pmd_size() -> int | None:
    try:
        return thp.pmd_size()
    except _UNREADABLE:
        return None


def _thp_setting(file: str, unit: str) -> int | str:
    value = thp.read_setting(file)
    if value is None:
        hidden = not Path("/sys/kernel/mm").is_dir()
        raise OSError(errno.ENOENT, "/sys/kernel/mm is not visible here" if hidden else "this kernel has no such setting")
    return value if unit == "word" else int(value)


def _thp_of_process() -> int:
    return int(read_fields("/proc/self/status")["THP_enabled"])


def _shm_mount() -> proc.Mount:
    # The last one is on top.
    mounts = [mount for mount in proc.read_mounts() if mount.directory == _SHM]
    if not mounts:
        raise OSError(errno.ENOENT, NOT_MOUNTED)
    return mounts[-1]


def _huge_option_of_shm() -> str:
    options = _shm_mount().options.split(",")
    # The kernel leaves it out where it is "never".
    return next((option.removeprefix("huge=") for option in options if option.startswith("huge=")), "never")


def _pools() -> Iterator[hugetlb.HugetlbPool]:
    try:
        for size in hugetlb.page_sizes():
            yield hugetlb.read_pool(size)
    except _UNREADABLE:
        return  # the capability hugetlb_pages says so


# --- limits


def _limits() -> Iterator[Reading]:
    yield from _memory()
    yield from _memory_cgroups()
    yield from _rlimits()
    yield from _dev_shm()
    yield _reading("max_map_count", "count", "/proc/sys/vm/max_map_count", lambda: _number("/proc/sys/vm/max_map_count"))
    yield _reading("mappings", "count", "/proc/self/maps", lambda: Path("/proc/self/maps").read_bytes().count(b"\n"))
    yield from _cpus()
    yield from _userfaultfd()
    for reclaimer in proactive_reclaimers():
        yield Reading("proactive_reclaim", reclaimer.cold_s, "seconds", reclaimer.source)


def _number(path: str) -> int:
    return int(Path(path).read_text())


def _meminfo(name: str, key: str) -> Reading:
    return _reading(name, "bytes", f"/proc/meminfo: {key}", lambda: read_meminfo(key)[0])


def _memory() -> Iterator[Reading]:
    yield _meminfo("mem_total", "MemTotal")
    yield _meminfo("mem_available", "MemAvailable")
    yield _meminfo("swap_total", "SwapTotal")
    yield _meminfo("swap_free", "SwapFree")
    mode = _reading("overcommit_mode", "mode", "/proc/sys/vm/overcommit_memory",
                    lambda: _number("/proc/sys/vm/overcommit_memory"))  # fmt: skip
    yield mode
    if mode.value == 2:  # in the other modes the kernel does not enforce it
        yield _meminfo("commit_limit", "CommitLimit")
        yield _meminfo("committed", "Committed_AS")


def _memory_cgroups() -> Iterator[Reading]:
    """Read the limits and the usage of each level. A file that a cgroup lacks (the root of v2 has none) is skipped."""
    try:
        governing = cgroups.governing("memory")
    except _UNREADABLE as error:
        yield Reading("memory_cgroup_limit", None, "bytes", "/proc/self/cgroup", unknown=_reason(error))
        return
    names = {"memory": "memory_cgroup_limit", "high": "memory_cgroup_high"}
    bounds = BOUND_FILES[governing.version]
    files = [(names[counts], limit) for counts, limit, _ in bounds if counts in names]
    files += [("memory_cgroup_usage", usage) for _, _, usage in bounds[:1]]
    for directory in governing.directories:
        for name, file in files:
            path = Path(directory, file)
            if path.exists():
                yield _reading(name, "bytes", str(path), partial(_cgroup_bytes, path))


def _cgroup_bytes(path: Path) -> int | None:
    with path.open():  # cgroup.read_bytes takes a file that it may not read for one without a limit
        return cgroups.read_bytes(path)


def _rlimits() -> Iterator[Reading]:
    for name in ("MEMLOCK", "AS", "DATA"):
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        for which, value in (("", soft), ("_hard", hard)):
            shown = None if value == resource.RLIM_INFINITY else value
            yield Reading(f"rlimit_{name.lower()}{which}", shown, "bytes", f"getrlimit(RLIMIT_{name})")
        if name == "MEMLOCK" and soft != resource.RLIM_INFINITY:
            yield _reading("memlock_enforced", "flag", "mlock2 of one page more", partial(_beyond_memlock, soft))


def _beyond_memlock(limit: int) -> int:
    """Return 1 where locking a page more than the limit is refused, 0 where a privilege (CAP_IPC_LOCK) lifts the limit.

    The question is asked by doing, as the capability counts only outside user namespaces. Nothing is populated.
    """
    length = limit - limit % PAGE_SIZE + PAGE_SIZE
    address = mman.mmap(0, length, mman.PROT_NONE, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_NORESERVE)
    try:
        mman.mlock2(address, length, mman.MLOCK_ONFAULT)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
            raise
        return 1
    finally:
        mman.munmap(address, length)
    return 0


def _dev_shm() -> Iterator[Reading]:
    def statvfs() -> os.statvfs_result:
        _shm_mount()  # a plain directory there would tell of another file system
        return os.statvfs(_SHM)

    # 0 blocks: a tmpfs mounted with size=0, which has no limit.
    yield _reading("dev_shm_size", "bytes", f"statvfs({_SHM})", lambda: statvfs().f_blocks * statvfs().f_frsize or None)
    yield _reading(
        "dev_shm_free", "bytes", f"statvfs({_SHM})",
        lambda: statvfs().f_bavail * statvfs().f_frsize if statvfs().f_blocks else None,
    )  # fmt: skip


def _cpus() -> Iterator[Reading]:
    yield _reading("cpus_online", "cpus", "sysconf(_SC_NPROCESSORS_ONLN)", lambda: os.sysconf("SC_NPROCESSORS_ONLN"))
    yield _reading("cpus_affinity", "cpus", "sched_getaffinity", lambda: len(os.sched_getaffinity(0)))
    try:
        files = quota_files()
    except _UNREADABLE as error:
        yield Reading("cpu_quota", None, "cpus", "/proc/self/cgroup", unknown=_reason(error))
        files = []
    for file in files:
        yield _reading("cpu_quota", "cpus", str(file), partial(read_quota, file))
    yield _reading("cpus_usable", "cpus", "affinity and quotas", usable_cpus)


def _userfaultfd() -> Iterator[Reading]:
    """Read both permissions to use userfaultfd: of /dev/userfaultfd (Linux 6.1), and by the sysctl for all users (5.2)."""
    setting = "/proc/sys/vm/unprivileged_userfaultfd"
    yield _reading("unprivileged_userfaultfd", "flag", setting, lambda: _number(setting))
    yield _reading("userfaultfd_device", "flag", f"access({userfaultfd.DEVICE})", _may_open_userfaultfd)


def _may_open_userfaultfd() -> int:
    os.stat(userfaultfd.DEVICE)  # a missing one is unknown, not forbidden
    return int(os.access(userfaultfd.DEVICE, os.R_OK | os.W_OK, effective_ids=True))

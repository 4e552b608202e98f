"""Plain advice: pure rules over a record.

A rule reads the record and nothing else, so that a test can give it any machine. A rule whose values are unknown is silent.
The figures in the sentences come from the end of ``docs/doctor-json.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefault._system.hugetlb import HugetlbPool
from prefault.doctor.page_cache_advice import proactive_reclaim
from prefault.doctor.record import NOT_MOUNTED, Advice, CapabilityAnswer, Reading, Record
from prefault.sizes import GIB, MIB, format_size

_MEASURED = "where it was measured (Linux 6.18, 2 CPUs)"
_THP = "/sys/kernel/mm/transparent_hugepage"
_BY_TEST = "switched off"
_GRAVITY = {"problem": 0, "warning": 1, "tip": 2}


def advise(record: Record) -> tuple[Advice, ...]:
    """Return the advice for a record, the gravest first. Each rule gives at most one piece of advice."""
    found = [advice for rule in _RULES for advice in rule(record)]
    return tuple(sorted(found, key=lambda advice: _GRAVITY[advice.severity]))


# --- huge pages


def _private_huge_pages(record: Record) -> Iterator[Advice]:
    enabled, pmd = record.word("enabled"), record.word("enabled_pmd")
    if record.number("process") == 0:
        yield Advice(
            "thp-process", "warning",
            "transparent huge pages are disabled for this process, by prctl(PR_SET_THP_DISABLE) in it or in a parent:"
            " private and shared memory is populated in base pages",
            "prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) in the process, or start it from a parent that does not set it",
        )  # fmt: skip
    if enabled is None:
        return
    if _effective(enabled, pmd) == "never":
        # The file for the size overrides the common one, unless it says "inherit" (Linux 6.8).
        file = "enabled" if pmd in (None, "inherit") else _size_file(record, "enabled")
        yield Advice(
            "thp-never", "warning",
            f"transparent huge pages are off ({file} = never): private memory is populated in base pages, which took 4"
            f" to 8 times as long as huge pages {_MEASURED}",
            f"echo madvise > {_THP}/{file}  # then Mapping(huge='advise') gets them",
        )  # fmt: skip
    elif record.word("defrag") == "never":
        yield Advice(
            "thp-defrag", "tip",
            "defrag = never: no memory is compacted for huge pages, so fragmented memory is populated in base pages even"
            " where huge pages were asked for",
            f"echo madvise > {_THP}/defrag",
        )  # fmt: skip


def _shared_huge_pages(record: Record) -> Iterator[Advice]:
    shmem, pmd = record.word("shmem_enabled"), record.word("shmem_enabled_pmd")
    if shmem is None:
        return
    off = "deny" if shmem == "deny" else _effective(shmem, pmd)
    if off in ("never", "deny"):
        common = shmem == "deny" or pmd in (None, "inherit")
        files = ["shmem_enabled"] if common else []
        if pmd == "never":
            files.append(_size_file(record, "shmem_enabled"))
        # within_size, not advise: fallocate, which comes first for a memfd, knows no mapping that could have asked.
        yield Advice(
            "shmem-never", "warning",
            f"shared huge pages are off ({files[0]} = {shmem if common else pmd}): memfds and shared anonymous memory are"
            f" populated in base pages, which took about 10 times as long {_MEASURED}",
            " && ".join(f"echo within_size > {_THP}/{file}" for file in files),
        )  # fmt: skip
    if shmem not in ("deny", "force") and record.word("dev_shm_huge") == "never" and record.size("dev_shm_size") != 0:
        yield Advice(
            "dev-shm-huge", "tip",
            "/dev/shm is mounted without huge=: multiprocessing.shared_memory and the backing 'tmpfs' are populated in base"
            f" pages, which took about 10 times as long {_MEASURED}",
            "mount -o remount,huge=within_size /dev/shm",
        )  # fmt: skip


def _effective(common: str, of_size: str | None) -> str:
    return common if of_size in (None, "inherit") else of_size


def _size_file(record: Record, name: str) -> str:
    return f"hugepages-{(record.size('pmd_size') or 2 * MIB) // 1024}kB/{name}"


def _hugetlb(record: Record) -> Iterator[Advice]:
    if not record.pools:
        return
    if not any(pool.total or pool.overcommit for pool in record.pools):
        smallest = record.pools[0]
        pages = max(1, GIB // smallest.page_size)
        yield Advice(
            "hugetlb-empty", "tip",
            f"the hugetlb pools are empty: the backings 'hugetlb' and 'memfd-hugetlb' cannot be used; shared memory in base"
            f" pages took 10 to 15 times as long to populate as in their pages {_MEASURED}",
            f"{_resize(smallest, pages)}  # sets {format_size(pages * smallest.page_size)} aside",
        )  # fmt: skip
        return
    for pool in record.pools:
        if pool.total and pool.available <= 0 and not pool.overcommit:
            yield Advice(
                "hugetlb-used-up", "warning",
                f"all {pool.total} hugetlb pages of {format_size(pool.page_size)} are in use or reserved ({pool.free} free,"
                f" {pool.reserved} reserved): a further hugetlb mapping is refused",
                _resize(pool, pool.total + max(1, GIB // pool.page_size)),
            )  # fmt: skip
            return


def _resize(pool: HugetlbPool, pages: int) -> str:
    return f"echo {pages} > /sys/kernel/mm/hugepages/hugepages-{pool.page_size // 1024}kB/nr_hugepages"


# --- capabilities


def _populate(record: Record) -> Iterator[Advice]:
    missing = record.lacks("madv_populate")
    if missing is None:
        return
    broken = [answer for name in ("process_vm_readv", "futex_add") if (answer := record.lacks(name))]
    if broken:
        names = " and ".join(answer.name for answer in broken)
        yield Advice(
            "populate-impossible", "problem",
            f"neither MADV_POPULATE_* nor the fallback {names} works here ({missing.refusal}; {broken[0].refusal}):"
            f" populate fails for {' and '.join('reading' if a.name == 'process_vm_readv' else 'writing' for a in broken)}",
            _remedy_for_call(record, missing, "madvise, process_vm_readv and futex"),
        )  # fmt: skip
        return
    yield Advice(
        "populate-missing", "warning",
        f"MADV_POPULATE_* is missing ({missing.refusal}): prefault uses process_vm_readv and futex_add, a page at a time;"
        f" populating private memory writable took about 4 times as long {_MEASURED}",
        _remedy_for_call(record, missing, "madvise advice 22 and 23"),
    )  # fmt: skip


def _remedy_for_call(record: Record, missing: CapabilityAnswer, calls: str) -> str:
    allow = f"; in a container let the seccomp profile allow {calls}" if record.machine.seccomp == 2 else ""
    return _remedy(missing, f"Linux {missing.since} or newer{allow}")


def _residency(record: Record) -> Iterator[Advice]:
    pagemap, scan = record.lacks("pagemap"), record.lacks("pagemap_scan")
    if pagemap is not None:
        yield Advice(
            "residency-mincore", "warning",
            f"/proc/self/pagemap cannot be read ({pagemap.refusal}): residency tells only what mincore tells, and populate"
            " cannot tell what was populated before from its own work",
            _remedy(pagemap, "mount -t proc proc /proc  # in a container: do not mask it"),
        )  # fmt: skip
    elif scan is not None:
        yield Advice(
            "residency-pagemap", "tip",
            f"PAGEMAP_SCAN is missing ({scan.refusal}): residency reads /proc/self/pagemap, slower, and tells neither the"
            " zero page nor huge pages",
            _remedy(scan, f"Linux {scan.since} or newer"),
        )  # fmt: skip


def _privileges(record: Record) -> Iterator[Advice]:
    missing = record.lacks("map_files")
    if missing is None or _by_hand(missing):
        return
    who = "root of this container" if record.machine.user_id == 0 else f"user {record.machine.user_id}"
    yield Advice(
        "privileges", "tip",
        f"map_files cannot be asked by {who}: populate does not need it, only some explanations say less",
        "docker run --cap-add CHECKPOINT_RESTORE"
        if record.machine.user_id == 0
        else "sudo setpriv --reuid=$(id -u) --regid=$(id -g) --init-groups"
        " --inh-caps=+checkpoint_restore --ambient-caps=+checkpoint_restore $(command -v prefault) doctor",
    )  # fmt: skip


def _userfaultfd(record: Record) -> Iterator[Advice]:
    missing = record.lacks("userfaultfd")
    if missing is not None:
        if record.machine.seccomp == 2:
            remedy = (
                "docker run --device /dev/userfaultfd  # with that file writable for the user inside; or let the seccomp"
                " profile allow the system call userfaultfd"
            )
        elif record.number("unprivileged_userfaultfd") == 0:
            remedy = "sysctl vm.unprivileged_userfaultfd=1  # or Linux 5.11 or newer"
        else:
            remedy = f"Linux {missing.since} or newer, built with CONFIG_USERFAULTFD"
        yield Advice(
            "userfaultfd-missing", "warning",
            f"userfaultfd is unavailable ({missing.refusal}): device memory (prefault.device.map, prefault.open_remote) is"
            " refused with DeviceError",
            _remedy(missing, remedy),
        )  # fmt: skip
        return
    old = [answer for name in ("uffd_minor_shmem", "uffd_poison") if (answer := record.lacks(name))]
    if old:
        yield Advice(
            "userfaultfd-old", "warning",
            f"userfaultfd lacks {' and '.join(answer.name for answer in old)} ({old[0].refusal}): device memory"
            " (prefault.device.map, prefault.open_remote) is refused with DeviceError",
            _remedy(old[-1], f"Linux {old[-1].since} or newer"),
        )  # fmt: skip
        return
    privileged = record.lacks("uffd_kernel_faults")
    if privileged is not None and not _by_hand(privileged):
        remedy = "sysctl vm.unprivileged_userfaultfd=1"
        if record.number("userfaultfd_device") == 0:
            remedy = f"sudo setfacl -m u:{record.machine.user_id}:rw /dev/userfaultfd  # or {remedy}"
        yield Advice(
            "userfaultfd-user-mode", "tip",
            "userfaultfd answers faults of user mode only: a system call that is given device memory which is not populated,"
            " such as write(2) from it, fails with EFAULT",
            f"{remedy}; or populate before",
        )  # fmt: skip


def _remedy(missing: CapabilityAnswer, otherwise: str) -> str:
    return "unset PREFAULT_WITHOUT" if _by_hand(missing) else otherwise


def _by_hand(answer: CapabilityAnswer) -> bool:
    return (answer.refusal or "").startswith(_BY_TEST)


# --- limits


def _memory_cgroup(record: Record) -> Iterator[Advice]:
    tightest = _tightest(record, "memory_cgroup_limit")
    available = record.size("mem_available")
    if tightest is not None:
        limit, used, reading = tightest
        if available is None or limit < available:
            left = max(0, limit - used)
            file = reading.source
            than = "" if available is None else f", less than the {format_size(available)} that the machine has available"
            yield Advice(
                "memory-cgroup", "problem" if used > 0.9 * limit else "warning",
                f"the memory cgroup may use {format_size(limit)}{than}, and uses {format_size(used)} (page cache included):"
                f" populating more than some {format_size(left)} brings the OOM killer, which populate cannot prevent",
                f"{_unlimited(file)}  # in a container: docker run --memory=...",
            )  # fmt: skip
    throttled = _tightest(record, "memory_cgroup_high")
    if throttled is not None:
        high, used, reading = throttled
        if (available is None or high < available) and (tightest is None or high < tightest[0]):
            yield Advice(
                "memory-high", "warning",
                f"above memory.high = {format_size(high)} ({format_size(used)} in use) the kernel reclaims from this memory"
                " cgroup and slows it down: populating more crawls",
                _unlimited(reading.source),
            )  # fmt: skip


def _tightest(record: Record, name: str) -> tuple[int, int, Reading] | None:
    """Return limit, usage and reading of the cgroup directory that leaves the least; None without a limit."""
    usages = {_directory(reading): reading.value for reading in record.readings("memory_cgroup_usage")}
    found = []
    for reading in record.readings(name):
        used = usages.get(_directory(reading))
        if isinstance(reading.value, int):
            found.append((reading.value, used if isinstance(used, int) else 0, reading))
    return min(found, key=lambda item: item[0] - item[1], default=None)


def _directory(reading: Reading) -> str:
    return reading.source.rpartition("/")[0]


def _unlimited(file: str) -> str:
    return f"echo {'-1' if file.endswith('_in_bytes') else 'max'} > {file}"


def _overcommit(record: Record) -> Iterator[Advice]:
    if record.number("overcommit_mode") != 2:
        return
    limit, committed = record.size("commit_limit"), record.size("committed")
    left = ""
    if limit is not None and committed is not None:
        left = f" {format_size(max(0, limit - committed))} of {format_size(limit)} are left;"
    yield Advice(
        "overcommit", "warning",
        f"vm.overcommit_memory = 2:{left} a private or shared memory mapping beyond that is refused (ENOMEM), and"
        " noreserve=True does not help in this mode",
        "sysctl vm.overcommit_memory=0",
    )  # fmt: skip


def _rlimits(record: Record) -> Iterator[Advice]:
    space = record.size("rlimit_as")
    if space is not None:
        yield Advice(
            "rlimit-as", "warning",
            f"RLIMIT_AS is {format_size(space)}: mappings beyond that are refused (ENOMEM), and sparse ones count in full",
            _raise(record, "as", "-v"),
        )  # fmt: skip
    data = record.size("rlimit_data")
    if data is not None:
        yield Advice(
            "rlimit-data", "warning",
            f"RLIMIT_DATA is {format_size(data)}: private writable mappings beyond that are refused (ENOMEM), and sparse"
            " ones count in full",
            _raise(record, "data", "-d"),
        )  # fmt: skip
    locked, available = record.size("rlimit_memlock"), record.size("mem_available")
    if locked is not None and record.number("memlock_enforced") != 0 and (available is None or locked < available):
        yield Advice(
            "rlimit-memlock", "tip",
            f"RLIMIT_MEMLOCK is {format_size(locked)}: locking more than that is refused, and with it the method mlock",
            _raise(record, "memlock", "-l"),
        )  # fmt: skip


def _raise(record: Record, name: str, option: str) -> str:
    hard = record.readings(f"rlimit_{name}_hard")
    if hard and hard[0].value is None:
        return f"ulimit {option} unlimited"
    # The hard limit too: CAP_SYS_RESOURCE may.
    return f"sudo prlimit --pid $$ --{name}=unlimited:unlimited  # in a container: docker run --ulimit {name}=-1"


def _dev_shm(record: Record) -> Iterator[Advice]:
    if any(reading.name == "dev_shm_size" and reading.unknown == NOT_MOUNTED for reading in record.limits):
        yield Advice(
            "dev-shm-missing", "warning",
            "nothing is mounted at /dev/shm: multiprocessing.shared_memory and the backing 'tmpfs' have no memory there;"
            " the backing 'memfd' needs none",
            "mkdir -p /dev/shm && mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm",
        )  # fmt: skip
    size, free = record.size("dev_shm_size"), record.size("dev_shm_free")
    tightest = _tightest(record, "memory_cgroup_limit")
    memory = min(filter(None, (record.size("mem_total"), tightest and tightest[0])), default=None)
    if size is None or free is None or memory is None:
        return
    half = f"{max(1, memory // 2 // MIB)}m"
    remedy = f"mount -o remount,size={half} /dev/shm  # in a container: docker run --shm-size={half}"
    if size < memory // 4:
        yield Advice(
            "dev-shm-small", "warning",
            f"/dev/shm holds {format_size(size)}, {format_size(free)} free, of {format_size(memory)} of memory: shared"
            " memory beyond that cannot be populated (BackingFullError), and touching it is a SIGBUS",
            remedy,
        )  # fmt: skip
    elif free < size // 10:
        yield Advice(
            "dev-shm-full", "warning",
            f"/dev/shm has {format_size(free)} of {format_size(size)} left: shared memory beyond that cannot be populated"
            " (BackingFullError), and touching it is a SIGBUS",
            "ls -lS /dev/shm  # and remove files that are not in use",
        )  # fmt: skip


def _map_count(record: Record) -> Iterator[Advice]:
    limit, mappings = record.size("max_map_count"), record.size("mappings")
    if limit is not None and mappings is not None and mappings > 0.8 * limit:
        yield Advice(
            "max-map-count", "warning",
            f"this process has {mappings} of at most {limit} mappings: further ones are refused (ENOMEM)",
            f"sysctl vm.max_map_count={4 * limit}",
        )  # fmt: skip


def _cpus(record: Record) -> Iterator[Advice]:
    usable, affinity, online = (record.size(f"cpus_{name}") for name in ("usable", "affinity", "online"))
    if usable is None or affinity is None or online is None:
        return
    quotas = [(r.value, r) for r in record.readings("cpu_quota") if isinstance(r.value, int | float)]
    threads = "populate uses one thread" if usable == 1 else f"populate uses at most {usable} threads"
    if usable < affinity and quotas:
        quota, reading = min(quotas, key=lambda pair: pair[0])
        remedy = f"echo {'max' if reading.source.endswith('cpu.max') else '-1'} > {reading.source}"
        yield Advice(
            "cpu-quota", "tip",
            f"the CPU quota is {quota:g} of {affinity} CPUs: {threads}",
            f"{remedy}  # in a container: docker run --cpus={affinity}",
        )  # fmt: skip
    elif usable == 1 and online > 1:
        yield Advice(
            "cpu-affinity", "tip",
            f"this process may run on one of {online} CPUs: {threads}",
            f"taskset -cp 0-{online - 1} $$",
        )  # fmt: skip
    elif usable == 1:
        yield Advice(
            "one-cpu", "tip", f"this machine has one CPU: {threads}", "more CPUs: two took about half the time where"
            " it was measured (Linux 6.18)",
        )  # fmt: skip


_RULES: tuple[Callable[[Record], Iterator[Advice]], ...] = (
    _populate,
    _memory_cgroup,
    _overcommit,
    _rlimits,
    _dev_shm,
    _map_count,
    proactive_reclaim,
    _private_huge_pages,
    _shared_huge_pages,
    _hugetlb,
    _residency,
    _userfaultfd,
    _privileges,
    _cpus,
)

"""Fixed texts: what prefault does without a capability, and what the settings of huge pages mean for population."""

from __future__ import annotations

WITHOUT = {
    "madv_populate": "populate uses process_vm_readv (readable) and futex_add (writable), a page at a time",
    "process_madvise": "populate_many and discard_many of sparse memory make a system call for each range;"
    " the method of that name is refused",
    "pagemap": "residency asks mincore, which tells 'present' and nothing else; populate counts every page as its own work",
    "pagemap_scan": "/proc/self/pagemap is read, 8 bytes a page: slower, and it tells neither the zero page nor huge pages",
    "page_is_guard": "residency cannot tell guard regions",
    "soft_dirty": "residency cannot tell written pages, unless userfaultfd write-protects them",
    "procmap_query": "/proc/self/maps is read as a whole, slower with many mappings",
    "map_files": "errors may lack the size of a mapped file that was deleted",
    "cachestat": "residency(...).page_cache is None",
    "process_vm_readv": "memory cannot be populated readable where madv_populate is missing as well",
    "futex_add": "memory cannot be populated writable where madv_populate is missing as well",
    "mlock_onfault": "the method mlock is refused as well; nothing else needs it",
    "madv_dontneed_locked": "locked memory cannot be discarded before it is unlocked",
    "guard_regions": "unpopulated='fault' of sparse memory makes a mapping of each separate run of blocks, and raises"
    " OutOfMemoryError where they would be more than half of vm.max_map_count",
    "madv_collapse": "prefault.collapse leaves all memory in base pages, and says so",
    "mbind": "node= and interleave= are refused with an OSError (Docker allows them with --cap-add SYS_NICE)",
    "move_pages": "residency(nodes=True) does not tell the nodes of pages",
    "hugetlb_pages": "the backings 'hugetlb' and 'memfd-hugetlb' are refused with HugePagesError",
    "memory_cgroup": "limits of memory cgroups are not seen",
    "userfaultfd": "device memory is refused: prefault.device.map and prefault.open_remote raise DeviceError",
    "uffd_kernel_faults": "a system call that is given device memory which is not populated, such as write(2) from it, fails"
    " with EFAULT: populate first; methods other than a device's own populate fail on it as well",
    "uffd_minor_shmem": "device memory is refused with DeviceError",
    "uffd_wp_shmem": "devices cannot evict pages that are writable somewhere, and dirty pages are not tracked",
    "uffd_poison": "device memory is refused with DeviceError: pages that a driver cannot supply could not be reported",
    "uffd_wp_async": "dirty pages of device memory are tracked by the server: a fault for each first write",
}
"""The consequence of a missing capability for prefault, by the name of the capability."""

MEANINGS: dict[str, dict[str | int, str]] = {
    "enabled": {
        "always": "private memory gets huge pages wherever they fit, also where little of them is used",
        "madvise": "private memory gets huge pages where it asks: Mapping(huge='advise')",
        "never": "private memory gets base pages only",
    },
    "enabled_pmd": {
        "always": "overrides enabled for this size: wherever they fit",
        "inherit": "as enabled says",
        "madvise": "overrides enabled for this size: where a mapping asks",
        "never": "overrides enabled for this size: none",
    },
    "shmem_enabled": {
        "always": "memfds and shared anonymous memory get huge pages",
        "within_size": "memfds and shared anonymous memory get huge pages that lie wholly within their size",
        "advise": "a shared mapping gets huge pages where it asks, unless fallocate came first",
        "never": "memfds and shared anonymous memory get base pages only",
        "deny": "all shared memory, also on tmpfs, gets base pages only",
        "force": "all shared memory, also on tmpfs, gets huge pages: meant for testing",
    },
    "shmem_enabled_pmd": {
        "always": "overrides shmem_enabled for this size: always",
        "inherit": "as shmem_enabled says",
        "within_size": "overrides shmem_enabled for this size: wholly within the size",
        "advise": "overrides shmem_enabled for this size: where a mapping asks",
        "never": "overrides shmem_enabled for this size: none",
    },
    "defrag": {
        "always": "a fault compacts memory for a huge page, and may wait for it",
        "defer": "a fault never waits: base pages where no huge page is free, the kernel collects later",
        "defer+madvise": "a fault compacts memory and may wait only where the mapping asked for huge pages",
        "madvise": "a fault compacts memory and may wait only where the mapping asked for huge pages",
        "never": "no compaction: base pages where no huge page is free",
    },
    "use_zero_page": {
        1: "populating readable maps one shared huge page of zeros, where huge pages apply",
        0: "populating readable maps the shared base page of zeros",
    },
    "process": {1: "not disabled for this process", 0: "disabled for this process by prctl(PR_SET_THP_DISABLE)"},
    "dev_shm_huge": {
        "never": "files in /dev/shm get base pages only",
        "advise": "files in /dev/shm get huge pages where a mapping asks, unless fallocate came first",
        "within_size": "files in /dev/shm get huge pages that lie wholly within their size",
        "always": "files in /dev/shm get huge pages",
    },
}
"""The meaning of a setting for population, by its name and value."""

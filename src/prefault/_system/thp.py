"""The transparent huge page settings in sysfs (Documentation/admin-guide/mm/transhuge.rst)."""

from __future__ import annotations

import re

from prefault.sizes import KIB

_SETTINGS = "/sys/kernel/mm/transparent_hugepage"


def read_setting(name: str) -> str | None:
    """Read the chosen word of a setting such as ``shmem_enabled``; None where the kernel has no such file."""
    try:
        with open(f"{_SETTINGS}/{name}") as file:
            text = file.read().strip()
    except FileNotFoundError:
        return None
    chosen = re.search(r"\[(.+?)\]", text)
    return chosen[1] if chosen else text


def pmd_size() -> int | None:
    """Read the size in bytes of a huge page of the PMD level (2 MiB on x86-64); None without THP."""
    text = read_setting("hpage_pmd_size")
    return None if text is None else int(text)


def pmd_setting() -> str:
    """Read whether private memory gets huge pages: ``"always"``, ``"madvise"`` or ``"never"``, by size where that is set."""
    size = pmd_size()
    by_size = None if size is None else read_setting(f"hugepages-{size // KIB}kB/enabled")  # Linux 6.8
    return by_size if by_size not in (None, "inherit") else read_setting("enabled") or "never"


def is_disabled_for_process() -> bool:
    """Return whether prctl(PR_SET_THP_DISABLE) keeps huge pages from this process; False before Linux 5.0."""
    with open("/proc/self/status", "rb") as file:
        return b"\nTHP_enabled:\t0\n" in file.read()

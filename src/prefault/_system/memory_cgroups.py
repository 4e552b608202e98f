"""The memory and hugetlb controllers' files in one cgroup directory, v1 and v2.

Documentation/admin-guide/cgroup-v1/memory.rst and hugetlb.rst; Documentation/admin-guide/cgroup-v2.rst.
"""

import os
from typing import NamedTuple

from prefault._system.cgroups import limited, read_bytes, read_text
from prefault._system.kept_files import KeptFile


class Bound(NamedTuple):
    """A limit of one cgroup and the usage charged against it, children included; in bytes.

    ``file`` is the file of the limit, ``counts`` is ``"memory"``, ``"memory+swap"``, or ``"high"`` for ``memory.high``.
    """

    file: str
    counts: str
    limit: int
    usage: int


class MemoryStat(NamedTuple):
    """The memory of a cgroup by kind, children included; in bytes, from ``memory.stat``.

    ``file`` is the page cache on the LRU lists. Shmem is not in it, as it is on the anonymous lists, and neither are locked
    pages, which are ``unevictable``.
    """

    file: int
    dirty: int
    writeback: int
    anonymous: int
    slab_reclaimable: int
    unevictable: int


class MemoryCgroup:
    """The memory controller's files in one directory. A file that is missing or cannot be read means no limit."""

    def __init__(self, directory: str, version: int) -> None:
        self.directory = directory
        self.version = version
        self._files: dict[str, KeptFile] = {}

    def bounds(self) -> list[Bound]:
        """Return the limits that are set. The usage of a cgroup without limits is not read."""
        found = []
        for counts, limit_file, usage_file in BOUND_FILES[self.version]:
            limit = self._number(limit_file)
            if limit is None:
                continue
            usage = self._number(usage_file)
            if usage is not None:
                found.append(Bound(os.path.join(self.directory, limit_file), counts, limit, usage))
        return found

    def statistics(self) -> MemoryStat:
        """Read ``memory.stat``. The kernel gathers it from every CPU, and may be behind by 64 pages for each."""
        values = {}
        for line in self._read("memory.stat").splitlines():
            key, _, value = line.partition(b" ")
            if value.isdigit():
                values[key.decode()] = int(value)
        # v1 has the counters of the cgroup without its children, too, and none of slab.
        v1 = self.version == 1
        lists, dirty, writeback = (
            ("total_", "total_dirty", "total_writeback") if v1 else ("", "file_dirty", "file_writeback")
        )
        inactive_file, active_file, inactive_anon, active_anon, unevictable = (
            values.get(lists + name, 0)
            for name in ("inactive_file", "active_file", "inactive_anon", "active_anon", "unevictable")
        )
        return MemoryStat(
            inactive_file + active_file, values.get(dirty, 0), values.get(writeback, 0), inactive_anon + active_anon,
            values.get("slab_reclaimable", 0), unevictable,
        )  # fmt: skip

    def swap_left(self) -> int | None:
        """Return the bytes of swap that this cgroup may still use; None without a limit (v1 limits memory+swap instead)."""
        if self.version == 1:
            return 0 if self._read("memory.swappiness").strip() == b"0" else None
        limit, usage = self._number("memory.swap.max"), self._number("memory.swap.current")
        return None if limit is None else max(0, limit - (usage or 0))

    def hierarchical(self) -> bool:
        """Return whether it counts its children: False only for v1 with ``memory.use_hierarchy`` 0 (before Linux 5.11)."""
        return self.version == 2 or read_text(os.path.join(self.directory, "memory.use_hierarchy")) != "0"

    def _number(self, name: str) -> int | None:
        text = self._read(name).strip()
        return limited(int(text)) if text.isdigit() else None  # "max", or a root without the file

    def _read(self, name: str) -> bytes:
        file = self._files.get(name)
        if file is None:
            file = self._files.setdefault(name, KeptFile(os.path.join(self.directory, name)))
        try:
            return file.read()
        except OSError:
            return b""


BOUND_FILES = {
    0: (),
    1: (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory+swap", "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    2: (
        ("memory", "memory.max", "memory.current"),
        ("high", "memory.high", "memory.current"),
    ),
}
"""By version: what each bound counts, as in :class:`Bound`, and the files of the limit and of the usage."""


def hugetlb_bounds(directory: str, version: int, page_size: int) -> list[Bound]:
    """Return a cgroup's limits on huge pages of a size: ``counts`` is ``"pages"`` or ``"reservations"`` (Linux 5.7)."""
    stem = os.path.join(directory, f"hugetlb.{_size_name(page_size)}")
    limit_name, usage_name = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    found = []
    for counts, part in (("pages", ""), ("reservations", "rsvd.")):
        limit_file = f"{stem}.{part}{limit_name}"
        limit, usage = read_bytes(limit_file), read_bytes(f"{stem}.{part}{usage_name}")
        if limit is not None and usage is not None:
            found.append(Bound(limit_file, counts, limit, usage))
    return found


def _size_name(page_size: int) -> str:
    """Return the page size as the kernel writes it in file names: 2MB, 1GB, 64KB."""
    for shift, unit in ((30, "GB"), (20, "MB")):
        if page_size >> shift:
            return f"{page_size >> shift}{unit}"
    return f"{page_size >> 10}KB"
